"""What users hand to the library's functions: refused in one sentence where it cannot be what is meant."""

from __future__ import annotations

import functools
import inspect
import numbers
import os
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

from slimline.basics.errors import SlimlineError, shown

P = ParamSpec("P")
R = TypeVar("R")
Check = Callable[[str, Any], None]


def takes(**checks: Check) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator that looks at arguments, by name, before the function sees them."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            given = signature.bind(*args, **kwargs).arguments
            for name, check in checks.items():
                if name in given:
                    check(name, given[name])
            return function(*args, **kwargs)

        return checked

    return decorate


def seed(name: str, given: Any) -> None:
    """What a random generator starts from."""
    whole(given, name, 0, 2**32)


def whole(given: object, name: str, least: int, end: int) -> int:
    """An integer in ``[least, end)``, or the error that says what is wrong."""
    if isinstance(given, bool) or not isinstance(given, numbers.Integral) or not least <= int(given) < end:
        raise SlimlineError(f"{name} is {shown(given)}: give a whole number from {least} to {end - 1}.")
    return int(given)


def path(name: str, given: Any) -> None:
    """A place in the file system."""
    if not isinstance(given, str | os.PathLike) or "\0" in os.fspath(given):
        raise SlimlineError(f"{name} is {str(given)[:40]!r}: give a path.")


def text(name: str, given: Any) -> None:
    """A name."""
    if not isinstance(given, str):
        raise SlimlineError(f"{name} is a {type(given).__name__}: give a name.")


def sizes(name: str, given: Any) -> None:
    """Several whole numbers."""
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise SlimlineError(f"{name} is {str(given)[:40]!r}: give a list of whole numbers, such as (1, 32).")


def progress(name: str, given: Any) -> None:
    """A callback, or whether there are to be bars."""
    if given is not None and not isinstance(given, bool) and not callable(given):
        raise SlimlineError(f"{name} is {shown(given)}: give a function, True for bars, False for silence, or nothing.")


def optional(check: Check) -> Check:
    """The same, or None."""
    return lambda name, given: None if given is None else check(name, given)
