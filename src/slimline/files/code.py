"""What ``package.module:name`` is, for callers that may import it; nothing here asks whether they may."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slimline.basics.errors import SlimlineError, first_line, unknown


def call(name: str, what: str) -> Any:
    """Call ``package.module:factory``; see `find`."""
    try:
        with _here():
            return find(name, what)()
    except SlimlineError:
        raise
    except Exception as e:
        raise SlimlineError(f"{name} failed: {type(e).__name__}: {first_line(e)}.") from e


@contextmanager
def _here() -> Iterator[None]:
    """Put the working directory first where Python looks for modules, and afterwards last: what the user's code imports
    later is found there, and nothing that lies there takes the place of what slimline imports."""
    folder = str(Path.cwd())
    added = folder not in sys.path
    if added:
        sys.path.insert(0, folder)
    try:
        yield
    finally:
        if added and folder in sys.path:
            sys.path.remove(folder)
            sys.path.append(folder)


def find(name: str, what: str) -> Any:
    """What ``package.module:name`` is, with the working directory importable as for ``python -m``."""
    module_name, _, attribute = name.partition(":")
    try:
        with _here():
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        if e.name and (module_name == e.name or module_name.startswith(f"{e.name}.")):
            raise SlimlineError(f"There is no module {module_name} for the {what} {name}: check the name.") from e
        raise SlimlineError(f"Importing {module_name} failed: {e}.") from e
    except Exception as e:
        raise SlimlineError(f"Importing {module_name} failed: {type(e).__name__}: {first_line(e)}.") from e
    if not hasattr(module, attribute):
        names = [n for n in vars(module) if not n.startswith("_")]
        raise unknown(f"name in {module_name} called", attribute, names)
    return getattr(module, attribute)


@contextmanager
def entered(folder: str | None) -> Iterator[None]:
    """Work in the folder in which a run was started; None stays in the present one."""
    if folder is None:
        yield
        return
    before = Path.cwd()
    try:
        os.chdir(folder)
    except OSError as e:
        raise SlimlineError(
            f"The folder {folder}, in which the run was started, cannot be entered ({e.strerror}): make it again."
        ) from e
    try:
        yield
    finally:
        os.chdir(before)
