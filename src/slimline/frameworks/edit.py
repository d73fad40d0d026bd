"""Edits are carried out one after the other, each by the function that a framework has for its kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import Array
from slimline.graph.edits import Edit

Table = Mapping[type[Any], Callable[[Any, Any, tuple[Array, ...]], Any]]
"""By kind of edit, what makes an edited copy of a native model: ``(native, edit, example inputs)``."""


def carry_out(native: Any, edits: Sequence[Edit], example: tuple[Array, ...], table: Table) -> Any:
    """A copy to which the edits were done; see `slimline.graph.edits`."""
    for edit in edits:
        native = table[type(edit)](native, edit, example)
    return native


def refuse_unread(products: Mapping[str, Sequence[Any]]) -> None:
    """Refuse to round what is multiplied by a weight (key) that no product reads as it is stored."""
    for name, own in products.items():
        if not own:
            raise SlimlineError(
                f"What is multiplied by {name} cannot be rounded when the model runs, as the weight is computed with "
                "before: leave its layer out by keep."
            )
