"""JSON from anybody: bounded in size, depth and numbers, without what JSON does not have, each key once."""

from __future__ import annotations

import json
from typing import Any, NoReturn

DIGITS, DEPTH, BYTES, VALUES = 19, 100, 64 << 20, 4_000_000


class Malformed(ValueError):
    """What is wrong with a JSON text, in words that follow "it"."""


def parse(text: bytes | str, limit: int = BYTES) -> Any:
    """The value that a JSON text holds.

    Raises
    ------
    Malformed : not JSON; more than `limit` bytes, 100 levels, 4 million values (some hundred bytes of memory each)
        or 19 digits of an integer; a key twice in one object; NaN or Infinity, also as a number too large for a float.
    """
    if len(text) > limit:
        raise Malformed(f"is {len(text):,} bytes of JSON, where {limit:,} are allowed")
    if _count(text, ",") + _count(text, "[") + _count(text, "{") > VALUES:
        raise Malformed(f"is JSON of more than {VALUES:,} values")
    try:
        plain = text if isinstance(text, str) else str(text, "utf-8")
        value = json.loads(
            plain, parse_int=_integer, parse_float=_float, parse_constant=_constant, object_pairs_hook=_once
        )
    except Malformed:
        raise
    except RecursionError as reason:
        raise Malformed(f"is nested more than {DEPTH} levels deep") from reason
    except UnicodeDecodeError as reason:
        raise Malformed("is not UTF-8") from reason
    except json.JSONDecodeError as reason:
        raise Malformed(f"is no JSON at line {reason.lineno} ({reason.msg})") from reason
    _shallow(value)
    return value


def _count(text: bytes | str, mark: str) -> int:
    return text.count(mark) if isinstance(text, str) else text.count(mark.encode())


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > DIGITS:
        raise Malformed(f"holds an integer of {len(digits):,} digits")
    return int(digits)


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise Malformed("holds a number that is too large")
    return value


def _constant(name: str) -> NoReturn:
    raise Malformed(f"holds {name}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise Malformed("holds a key twice")
    return value


def _shallow(value: Any) -> None:
    level = [value]
    for _ in range(DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise Malformed(f"is nested more than {DEPTH} levels deep")
