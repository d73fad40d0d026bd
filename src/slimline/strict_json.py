"""JSON that anybody may have written: finite numbers, whole characters, bounded nesting; mistakes are one sentence."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from slimline.errors import SlimlineError
from slimline.text import visible

DEEPEST = 64
_LONGEST_INTEGER = 20  # digits, those of 64 bits
_LARGEST = 1e100
_SHOWN = 40

M = TypeVar("M", bound=BaseModel)


def parse(text: str | bytes, where: str) -> Any:
    """What JSON `text` holds; `where` names it in messages.

    Raises
    ------
    SlimlineError
        It is no JSON, or holds NaN or infinity, a number or nesting beyond all use, or half a character.
    """
    if not isinstance(text, str | bytes):
        raise damaged(where, f"it is a {type(text).__name__}, not text")
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        loaded = json.loads(text, parse_int=_integer, parse_float=_real, parse_constant=_no_number)
        _check(loaded)
    except RecursionError:
        why = f"it is nested deeper than {DEEPEST} levels"
    except UnicodeDecodeError:
        why = "it is not UTF-8"
    except json.JSONDecodeError as e:
        why = f"it is no JSON at line {e.lineno} ({e.msg})"
    except ValueError as e:
        why = str(e)
    else:
        return loaded
    raise damaged(where, why)


def validate(model: type[M], text: str | bytes, where: str) -> M:
    """The `model` that JSON `text` holds, every value of exactly its type."""
    parse(text, where)
    try:
        return model.model_validate_json(text, strict=True)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        place = ".".join(visible(str(part)) for part in first["loc"])
        if len(place) > 2 * _SHOWN:
            place = f"{place[: 2 * _SHOWN]}…"
        said = first["msg"].removeprefix("Input ").replace("should be", "is not")
        said = said.replace("Field required", "is missing")
        raise damaged(where, f"{place} {said[:1].lower()}{said[1:]}" if place else said) from e


def damaged(where: str, why: str) -> SlimlineError:
    """The error for a file that is not what slimline wrote."""
    return SlimlineError(f"{where} is damaged: {why}; put a whole copy in its place, or run slimline again.")


def _integer(digits: str) -> int:
    if len(digits) > _LONGEST_INTEGER:
        raise ValueError(f"it holds a number of {len(digits):,} digits")
    return int(digits)


def _real(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or abs(value) > _LARGEST:
        raise ValueError(f"it holds the number {text[:_SHOWN]}, which is out of range")
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which is no number")


def _check(loaded: Any) -> None:
    """Refuse what is nested too deep, and strings that no file or terminal takes."""
    level, depth = [loaded], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise RecursionError
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += value.keys()
                below += value.values()
            elif isinstance(value, list):
                below += value
            elif isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
                raise ValueError("it holds half a character (a lone surrogate)")
        level = below
