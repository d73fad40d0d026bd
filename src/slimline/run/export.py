"""Artifacts outside of any run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from slimline.basics import arguments
from slimline.basics.arguments import takes
from slimline.basics.errors import SlimlineError
from slimline.files.atomic import writing
from slimline.model.model import Model, is_model
from slimline.runtimes.base import Runtime, runtime, usual
from slimline.runtimes.gate import lower


@takes(model=is_model, target=arguments.text, output=arguments.path)
def export(model: Model, target: str, output: str | Path) -> Path:
    """Write the artifact that the runtime `target` loads.

    Parameters
    ----------
    output : a folder, in which it is called ``model`` with the target's suffix, or a path with that suffix.

    Returns
    -------
    Path of the artifact.

    Raises
    ------
    SlimlineError
        If the artifact does not answer as the model does, see `slimline.runtimes.gate`; then nothing is written.
    """
    found = runtime_of(target, model)
    path = Path(output)
    if path.suffix != found.suffix:
        path = path / f"model{found.suffix}"
    with writing(path.parent), _folders(path.parent):
        lower(found, model, path)
    return path


@contextmanager
def _folders(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; if what follows fails, those that were made go again."""
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for made in missing:
            with suppress(OSError):  # somebody has put something there
                made.rmdir()
        raise


def runtime_of(target: str, model: Model) -> Runtime:
    found = runtime(target)
    if model.framework not in found.frameworks:
        usable = usual(model.framework)
        raise SlimlineError(f"{target} does not take {model.framework} models yet: choose the target {usable}.")
    missing = found.available()
    if missing:
        raise SlimlineError(missing)
    return found
