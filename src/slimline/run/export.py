"""Artifacts outside of any run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from slimline.basics import arguments
from slimline.basics.arguments import takes
from slimline.basics.errors import SlimlineError
from slimline.files.atomic import writing
from slimline.model.lowering import lower, road
from slimline.model.model import Model, is_model
from slimline.runtimes.base import Runtime, runtime


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
        If the artifact does not answer as the model does, see `slimline.model.lowering`; then nothing is written.
    """
    runtime = runtime_of(target, model)
    path = Path(output)
    if path.suffix != runtime.suffix:
        path = path / f"model{runtime.suffix}"
    with writing(path.parent), _folders(path.parent):
        lower(runtime, model, path)
    return path


@contextmanager
def _folders(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; if what follows fails, those that were made go again."""
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for new_folder in missing:
            with suppress(OSError):  # somebody has put something there
                new_folder.rmdir()
        raise


def runtime_of(name: str, model: Model) -> Runtime:
    """The target called `name`, if it is installed and there is a road to it from the model's framework."""
    target = runtime(name)
    road(model.forms, target)
    missing = target.available()
    if missing:
        raise SlimlineError(missing)
    return target
