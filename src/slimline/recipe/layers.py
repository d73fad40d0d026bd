"""Which layers a step is about: patterns on the user's own names, or on the types of layers.

=================== =====================================================================
``stages.*.conv1``  a glob on names (`fnmatch`, case counts)
``re:stages\\.[12]`` a regular expression that the whole name has to match
``type:conv*``      a glob on the type, as the framework calls it (``Conv2d``) or the
                    neutral graph (``conv``); case does not count
=================== =====================================================================
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from re import _constants as opcodes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from types import MappingProxyType
from typing import Annotated, Any, Protocol

from pydantic import AfterValidator

from slimline.basics.errors import SlimlineError, unknown

Types = Mapping[str, Collection[str]]
"""By layer, what its operators are called."""

REGULAR, TYPE = "re:", "type:"
_MOST_ENDLESS = 3
_UNTYPED: Types = MappingProxyType({})


def _valid(patterns: tuple[str, ...]) -> tuple[str, ...]:
    for pattern in patterns:
        if pattern.startswith(REGULAR):
            _compiled(pattern)
    return patterns


Globs = Annotated[tuple[str, ...], AfterValidator(_valid)]
"""Patterns of layers, as a field of a step."""

LayerPattern = Annotated[str, AfterValidator(lambda pattern: _valid((pattern,))[0])]
"""One of them."""


class Choice(Protocol):
    """What chooses layers, as a step does by these fields."""

    @property
    def step(self) -> str:
        """Its name."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Patterns of those that it is about."""

    @property
    def keep(self) -> tuple[str, ...]:
        """Patterns of those that it leaves alone."""


def matches(names: Iterable[str], patterns: Iterable[str], types: Types = _UNTYPED) -> bool:
    """Whether any of the layers called `names` fits any of the patterns."""
    patterns = tuple(patterns)
    return any(_fits(name, pattern, types) for name in names for pattern in patterns)


def selected(names: Iterable[str], layers: Iterable[str], keep: Iterable[str], types: Types = _UNTYPED) -> bool:
    """Whether any of `names` is among `layers` and none among those to `keep`."""
    names = tuple(names)
    return matches(names, layers, types) and not matches(names, keep, types)


def first_match(names: Iterable[str], patterns: Iterable[str], types: Types = _UNTYPED) -> str | None:
    """The first pattern that any of the layers called `names` fits; None where none does."""
    names = tuple(names)
    return next((pattern for pattern in patterns if matches(names, (pattern,), types)), None)


def refuse_unmatched(what: str, patterns: Iterable[str], names: Iterable[str], types: Types = _UNTYPED) -> None:
    """Raise `unknown` for a pattern that fits none of `names`; ``*`` always fits.

    Parameters
    ----------
    what : is chosen, for the sentence: ``layer for keep``.
    """
    names = tuple(names)
    for pattern in patterns:
        if pattern != "*" and not matches(names, (pattern,), types):
            choices = [f"{TYPE}{t}" for name in names for t in types.get(name, ())]
            raise unknown(what, pattern, choices if pattern.startswith(TYPE) else names)


def _fits(name: str, pattern: str, types: Types) -> bool:
    if pattern.startswith(TYPE):
        glob = pattern.removeprefix(TYPE).lower()
        return any(fnmatchcase(kind.lower(), glob) for kind in types.get(name, ()))
    if pattern.startswith(REGULAR):
        return _compiled(pattern).fullmatch(name) is not None
    return fnmatchcase(name, pattern)


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    text = pattern.removeprefix(REGULAR)
    try:
        if _endless(parser.parse(text)) > _MOST_ENDLESS:
            raise SlimlineError(
                f"The regular expression {text[:80]!r} can take for ever: write it with at most {_MOST_ENDLESS} "
                "repetitions, and none around another."
            )
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as reason:
        raise SlimlineError(f"{text[:80]!r} is no regular expression ({reason}): mend it, or write a glob.") from reason


def _endless(parsed: Iterable[Any], inside: bool = False) -> int:
    """How many repetitions there are, far too many where one lies in another. A recipe may come from anybody, so the
    time that a match takes is bounded: names are short, and it grows with their length to the power of this."""
    count = 0
    for operator, argument in parsed:
        if operator in (opcodes.MAX_REPEAT, opcodes.MIN_REPEAT, opcodes.POSSESSIVE_REPEAT):
            if inside:
                return _MOST_ENDLESS + 1
            many = argument[1] > 1
            count += many + _endless(argument[2], many)
        elif operator in (opcodes.SUBPATTERN, opcodes.ATOMIC_GROUP, opcodes.ASSERT, opcodes.ASSERT_NOT):
            count += _endless(argument if operator == opcodes.ATOMIC_GROUP else argument[-1], inside)
        elif operator == opcodes.BRANCH:
            count += inside * (_MOST_ENDLESS + 1) + sum(_endless(branch) for branch in argument[1])
        elif operator == opcodes.GROUPREF_EXISTS:
            count += sum(_endless(branch, inside) for branch in argument[1:] if branch)
    return count
