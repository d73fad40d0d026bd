"""Code that files name, such as the criterion of a recipe: it is used only with the user's word for it in this call.

A name in a file is data. What it names is imported where the user has said that very name to the command that uses it,
or has handed over the function itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from slimline.basics.errors import SlimlineError
from slimline.files.code import entered, find
from slimline.recipe.criterion import name_of
from slimline.recipe.step import Step

Function = Callable[..., Any]
_granted: ContextVar[Mapping[str, Function]] = ContextVar("granted", default=MappingProxyType({}))


def names(steps: Iterable[Step]) -> list[str]:
    """What steps name as ``package.module:function``, each once; not the functions that they hold themselves."""
    criteria = [getattr(step, "criterion", "") for step in steps]
    return list(dict.fromkeys(c for c in criteria if isinstance(c, str) and ":" in c))


def refuse(named: Sequence[str], asker: str, pickles: Sequence[str] = ()) -> None:
    """Say what would be imported and unpickled, if there is anything, and how to allow it.

    Parameters
    ----------
    asker : names it, for the sentence: ``The recipe``.
    """
    if not named and not pickles:
        return
    what = [f"import and call {', '.join(named)}"] * bool(named) + [f"unpickle {', '.join(pickles)}"] * bool(pickles)
    flags = [f"--allow-code {name}" for name in named] + ["--allow-pickle"] * bool(pickles)
    python = [f"allow_code={list(named)}"] * bool(named) + ["allow_pickle=True"] * bool(pickles)
    raise SlimlineError(
        f"{asker} would {' and '.join(what)}, which can do anything: pass {' '.join(flags)} if you trust it "
        f"(in Python {', '.join(python)})."
    )


def as_names(allow_code: str | Iterable[str]) -> tuple[str, ...]:
    """What the user allows, checked to be names."""
    allowed = (allow_code,) if isinstance(allow_code, str) else tuple(allow_code)
    for name in allowed:
        module, _, attribute = str(name).partition(":")
        if not module or not attribute:
            raise SlimlineError(f"--allow-code {name} names no code: write package.module:function.")
    return allowed


@contextmanager
def granted(steps: Sequence[Step], allow_code: str | Iterable[str] = (), folder: str | None = None) -> Iterator[None]:
    """Let `steps` use, inside the block, the functions that they hold and those that the user allows by name.

    Parameters
    ----------
    folder : from which they are imported; the working directory by default.

    Raises
    ------
    SlimlineError : a name that is not allowed, or that no function goes by; before anything is imported.
    """
    held = {name_of(c): c for step in steps if callable(c := getattr(step, "criterion", None))}
    allowed = as_names(allow_code)
    named = [name for name in names(steps) if name not in held]
    refuse([name for name in named if name not in allowed], "The recipe")
    with entered(folder if named else None):
        functions = {name: find(name, "criterion") for name in named}
    for name, function in functions.items():
        if not callable(function):
            raise SlimlineError(f"The criterion {name} is a {type(function).__name__}: name a function.")
    token = _granted.set({**_granted.get(), **held, **functions})
    try:
        yield
    finally:
        _granted.reset(token)


def function_of(criterion: str | Function) -> Function:
    """The user's function, from itself or from a name that was allowed."""
    if not isinstance(criterion, str):
        return criterion
    if criterion not in _granted.get():
        raise SlimlineError(
            f"The criterion {criterion} is the name of code, which is not imported here: give the function itself, or "
            "allow_code= to slimline.compress."
        )
    return _granted.get()[criterion]
