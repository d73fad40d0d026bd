"""Edits of a Keras model, each by the module that knows how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slimline.frameworks.base import Array
from slimline.frameworks.keras import cut, fakequant, rewire, rewrite
from slimline.frameworks.keras.replace import replace
from slimline.graph.edits import (
    Edit,
    FoldNorms,
    Mask,
    Narrow,
    PutTensors,
    Replace,
    Resize,
    Rewire,
    Round,
    Silence,
    Threshold,
)


def edit(native: Any, edits: Sequence[Edit], example: tuple[Array, ...]) -> Any:
    """A copy to which the edits were done, one after the other; see `slimline.graph.edits`."""
    for change in edits:
        native = _edit(native, change, example)
    return native


def _edit(native: Any, change: Edit, example: tuple[Array, ...]) -> Any:
    match change:
        case Resize():
            return rewrite.apply(native, change.removal, example)
        case Mask():
            return rewrite.mask(native, change.removal)
        case Narrow():
            return cut.cut(native, change.cuts)
        case Replace():
            return replace(native, change)
        case Rewire():
            return rewire.rewire(native, change.instead)
        case Silence():
            return rewire.silence(native, change.values)
        case Threshold():
            return rewire.truncate(native, change.thresholds)
        case PutTensors():
            return rewrite.replace(native, change.tensors)
        case FoldNorms():
            return fakequant.fold(native, example)
        case Round():
            return fakequant.quantize(native, change.quantization)
