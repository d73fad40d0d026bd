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
            bound = signature.bind(*args, **kwargs).arguments
            for name, check in checks.items():
                if name in bound:
                    check(name, bound[name])
            return function(*args, **kwargs)

        return checked

    return decorate


def seed(name: str, value: Any) -> None:
    """What a random generator starts from."""
    whole(value, name, 0, 2**32)


def whole(value: object, name: str, least: int, end: int) -> int:
    """An integer in ``[least, end)``, or the error that says what is wrong."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not least <= int(value) < end:
        raise SlimlineError(f"{name} is {shown(value)}: give a whole number from {least} to {end - 1}.")
    return int(value)


def path(name: str, value: Any) -> None:
    """A place in the file system."""
    if not isinstance(value, str | os.PathLike) or "\0" in os.fspath(value):
        raise SlimlineError(f"{name} is {str(value)[:40]!r}: give a path.")


def text(name: str, value: Any) -> None:
    """A name."""
    if not isinstance(value, str):
        raise SlimlineError(f"{name} is a {type(value).__name__}: give a name.")


def sizes(name: str, value: Any) -> None:
    """Several whole numbers."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise SlimlineError(f"{name} is {str(value)[:40]!r}: give a list of whole numbers, such as (1, 32).")


def progress(name: str, value: Any) -> None:
    """A callback, or whether there are to be bars."""
    if value is not None and not isinstance(value, bool) and not callable(value):
        raise SlimlineError(f"{name} is {shown(value)}: give a function, True for bars, False for silence, or nothing.")


def optional(check: Check) -> Check:
    """The same, or None."""
    return lambda name, value: None if value is None else check(name, value)
