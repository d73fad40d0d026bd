"""Criteria in a recipe: a name that slimline knows, or the user's ``package.module:function``."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

from slimline.basics.errors import shown, unknown

Named = Annotated[str | Callable[..., Any], PlainSerializer(lambda value: name_of(value), return_type=str)]


def one_of(known: Sequence[str], pattern: str = "") -> BeforeValidator:
    """Accepts the names in `known`, those that match `pattern`, ``package.module:function``, and functions."""

    def check(value: Any) -> Any:
        if callable(value):
            return value
        named = isinstance(value, str) and (value in known or ":" in value or re.fullmatch(pattern or "(?!)", value))
        if not named:
            name = value if isinstance(value, str) else shown(value)
            raise unknown("criterion", name, [*known, "package.module:function"])
        return value

    return BeforeValidator(check)


def name_of(criterion: str | Callable[..., Any]) -> str:
    """The criterion as recipes write it."""
    if isinstance(criterion, str):
        return criterion
    named = criterion if hasattr(criterion, "__qualname__") else type(criterion)
    return f"{named.__module__}:{named.__qualname__}"


def importable(criterion: object) -> bool:
    """Whether another process finds this very criterion under its `name_of`."""
    if not callable(criterion):
        return True
    module, _, attribute = name_of(criterion).partition(":")
    return getattr(sys.modules.get(module), attribute, None) is criterion
