"""Searches that ask few questions, because each answer costs an artifact, a measurement or a training.

Pure functions of a question that is asked by position or by set; an answer is asked for at most once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache


def mildest(start: int, count: int, meets: Callable[[int], bool]) -> int | None:
    """The first of the rungs `start`, …, ``count - 1`` that meets what is asked; None where none does.

    By bisection: exact where every rung above one that meets does too, and otherwise still a rung that was asked and
    meets. At most ``2 + log2(count - start)`` rungs are asked, `start` first.
    """
    if meets(start):
        return start
    below, above = start, count
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (below, middle) if meets(middle) else (middle, above)
    return above if above < count else None


def strongest(start: int, count: int, passes: Callable[[int], bool | None]) -> int | None:
    """The last of the rungs `start`, …, ``count - 1`` that passes; None where not even `start` does.

    By bisection from the middle, `start` first. The search ends where an answer is None (nothing more may be asked):
    then it is the last that was seen to pass.
    """
    if not passes(start):
        return None
    below, above = start, count
    while above - below > 1:
        middle = (below + above) // 2
        answer = passes(middle)
        if answer is None:
            break
        below, above = (middle, above) if answer else (below, middle)
    return below


def culprits(pool: Sequence[str], passes: Callable[[frozenset[str]], bool], most: int) -> tuple[str, ...]:
    """A small part of `pool` without which all is well, in its order: by halves (Zeller and Hildebrandt 2002).

    Parameters
    ----------
    pool : without all of it, all is well; that is not asked.
    passes : whether all is well without these.
    most : questions that may be asked; the part is larger than it could be where they do not suffice.

    A single culprit among `n` is found by at most ``2 log2(n)`` questions, and every further one by as many again.
    """
    remaining = most

    @cache
    def well(without: frozenset[str]) -> bool:
        nonlocal remaining
        remaining -= 1
        return passes(without)

    def small(fixed: frozenset[str], part: tuple[str, ...]) -> tuple[str, ...]:
        """Of `part`, without which and `fixed` all is well."""
        if len(part) < 2:
            return part
        halves = part[: len(part) // 2], part[len(part) // 2 :]
        for half in halves:
            if remaining <= 0:
                return part
            if well(fixed | frozenset(half)):
                return small(fixed, half)
        first = small(fixed | frozenset(halves[1]), halves[0])
        return (*first, *small(fixed | frozenset(first), halves[1]))

    return small(frozenset(), tuple(pool))
