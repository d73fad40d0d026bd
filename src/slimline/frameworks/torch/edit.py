"""Edits of a torch model, each by the module that knows how."""

from __future__ import annotations

from collections.abc import Sequence

from slimline.frameworks.base import Array
from slimline.frameworks.torch import cut, fakequant, mask, rewire, rewrite
from slimline.frameworks.torch.native import Native
from slimline.frameworks.torch.replace import replace
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


def edit(native: Native, edits: Sequence[Edit], example: tuple[Array, ...]) -> Native:
    """A copy to which the edits were done, one after the other; see `slimline.graph.edits`."""
    for change in edits:
        native = _edit(native, change, example)
    return native


def _edit(native: Native, change: Edit, example: tuple[Array, ...]) -> Native:
    match change:
        case Resize():
            return rewrite.apply(native, change.removal, example)
        case Mask():
            return mask.mask(native, change.removal)
        case Narrow():
            return cut.cut(native, change.cuts, example)
        case Replace():
            return replace(native, change, example)
        case Rewire():
            return rewire.rewire(native, change.instead, example)
        case Silence():
            return rewire.silence(native, change.values)
        case Threshold():
            return rewire.truncate(native, change.thresholds)
        case PutTensors():
            return rewrite.replace(native, change.tensors)
        case FoldNorms():
            return fakequant.fold(native, example)  # type: ignore[return-value]
        case Round():
            return fakequant.quantize(native, change.quantization)  # type: ignore[return-value]
