"""The one exception that users meet, and the helpers that word it."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
from collections.abc import Iterable
from types import ModuleType
from typing import Any

_MOST_CHOICES = 12
_LONGEST = 80
_TERMINAL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
"""Codes by which frameworks make their messages bold or coloured."""


class SlimlineError(Exception):
    """Bad input or an impossible wish, said in one sentence that tells how to mend it.

    The command line prints the sentence and exits with code 2; no traceback, nothing half-written.
    """


class NoExample(SlimlineError):
    """A model that needs example inputs came without."""


class NothingToPrune(SlimlineError):
    """Every axis that a step may prune is frozen."""


def shown(value: Any) -> str:
    """A value as messages show it: on one line, and short."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a list in itself
        return f"a very large {type(value).__name__}"
    text = text.encode("unicode_escape").decode() if not text.isprintable() else text
    return text if len(text) <= _LONGEST else f"{text[:60]}… ({len(text)} characters)"


def raised(error: BaseException) -> str:
    """What a function of the user's did wrong, in words that follow its name: the kind of error and its first line."""
    kind = type(error).__name__
    return f"raised {kind} ({first_line(error)[:200]})" if str(error).strip() else f"raised {kind}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message without the full stop, to be quoted; the error's type where it has none."""
    lines = (line.strip() for line in _TERMINAL.sub("", str(error)).splitlines())
    return next((line.rstrip(".:") for line in lines if line), type(error).__name__)


def unknown(what: str, name: str, choices: Iterable[str]) -> SlimlineError:
    """An error for a name that is not among `choices`, with the nearest one suggested."""
    known = sorted({str(choice) for choice in choices if choice})
    near = difflib.get_close_matches(str(name)[:_LONGEST], known, 1, 0.4)
    if not known:
        return SlimlineError(f"There is no {what} {shown(name)}, and nothing to choose from: leave it out.")
    some = ", ".join(known[:_MOST_CHOICES])
    more = f" and {len(known) - _MOST_CHOICES} more" if len(known) > _MOST_CHOICES else ""
    hint = f"did you mean {near[0]!r}?" if near else f"choose one of {some}{more}."
    return SlimlineError(f"There is no {what} {shown(name)}; {hint}")


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or raise the line that names the pip command which installs it."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise SlimlineError(f"{module} is not installed: run pip install 'slimline[{extra}]'.")
    return importlib.import_module(module)
