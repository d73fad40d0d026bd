"""Edits are carried out one after the other, each by the function that a framework has for its kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from slimline.frameworks.base import Array
from slimline.graph.edits import Edit

Table = Mapping[type[Any], Callable[[Any, Any, tuple[Array, ...]], Any]]
"""By kind of edit, what makes an edited copy of a native model: ``(native, edit, example inputs)``."""


def carry_out(native: Any, edits: Sequence[Edit], example: tuple[Array, ...], table: Table) -> Any:
    """A copy to which the edits were done; see `slimline.graph.edits`."""
    for edit in edits:
        native = table[type(edit)](native, edit, example)
    return native
