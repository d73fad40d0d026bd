"""JSON that anybody may have written, read into models; mistakes are one sentence."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from slimline.basics.errors import SlimlineError
from slimline.basics.text import visible
from slimline.files import strictjson
from slimline.files.strictjson import Malformed

_LARGEST = 1e100
_SHOWN = 40

M = TypeVar("M", bound=BaseModel)


def parse(text: str | bytes, where: str) -> Any:
    """What JSON `text` holds; `where` names it in messages.

    Raises
    ------
    SlimlineError
        What `strictjson.parse` refuses, a number beyond all use, or half a character.
    """
    if not isinstance(text, str | bytes):
        raise damaged(where, f"it is a {type(text).__name__}, not text")
    try:
        loaded = strictjson.parse(text)
        _check(loaded)
    except Malformed as reason:
        raise damaged(where, f"it {reason}") from reason
    return loaded


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
        message = first["msg"].removeprefix("Input ").replace("should be", "is not")
        message = message.replace("Field required", "is missing")
        raise damaged(where, f"{place} {message[:1].lower()}{message[1:]}" if place else message) from e


def damaged(where: str, why: str) -> SlimlineError:
    """The error for a file that is not what slimline wrote."""
    return SlimlineError(f"{where} is damaged: {why}; put a whole copy in its place, or run slimline again.")


def _check(loaded: Any) -> None:
    """Refuse numbers that no report has, and strings that no file or terminal takes."""
    pending = [loaded]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            pending += value
        elif isinstance(value, float) and abs(value) > _LARGEST:
            raise Malformed(f"holds the number {value:g}, which is out of range")
        elif isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
            raise Malformed("holds half a character (a lone surrogate)")
