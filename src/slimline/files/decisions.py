"""Decisions read back from a run's journal: data like any other, checked before it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from slimline.basics.errors import SlimlineError

M = TypeVar("M", bound=BaseModel)


def checked(kind: type[M], record: Mapping[str, Any], what: str) -> M:
    """The `record` of a decision as what it must be.

    Raises
    ------
    SlimlineError : it is not; `what` names the decision.
    """
    try:
        return kind.model_validate(record)
    except (ValidationError, RecursionError) as error:
        raise SlimlineError(
            f"What the run's journal holds of {what} is damaged: start a new run in another directory."
        ) from error
