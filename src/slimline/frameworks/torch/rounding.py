"""Rounding to a format as plain aten operators, which stay differentiable, export again and are saved as they are.

An integer grid with one scale, or one per position of an axis, is an operator of torch, which the exporter carries into
the artifact. All other formats are written out, so that the model computes exactly what `Format.round` does. Gradients
go straight through (Bengio et al. 2013, arXiv:1308.3432): the rounded number plus ``x - x``, whose value is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from slimline.basics.errors import SlimlineError
from slimline.methods.dynamic import HIGH, LEVELS, LOW, NARROWEST
from slimline.methods.formats import FloatFormat, Format, IntegerGrid, Levels, Masked, Scaled

_aten = torch.ops.aten
_FAKE_QUANTIZE = _aten.fake_quantize_per_tensor_affine.default
WHOLE = (1.0, 0, -256, 255)
"""Scale, zero point and ends with which that operator rounds to whole numbers; no grid of 8 bits has such ends."""
Store = Callable[[str, np.ndarray], fx.Node]


@dataclass(frozen=True)
class Rounder:
    """Puts operators behind `source` in its graph, where the graph's cursor is.

    Attributes
    ----------
    store : keeps an array as a buffer of this ending, and gives the node that reads it.
    computed : whether the source is computed, so that a sign of it is one of codes and learns within its two numbers
        alone; a stored weight learns wherever it is.
    """

    source: fx.Node
    store: Store
    computed: bool = True

    def round(self, each: Format) -> fx.Node:
        """The node that computes ``each.round(source)``."""
        x = self.source
        if isinstance(each, IntegerGrid) and each.per_tensor:
            step = each.scale.item(), each.zero.item()
            return self._call(_FAKE_QUANTIZE, x, *step, *_ends(each))
        if isinstance(each, IntegerGrid) and each.axis is not None:
            scale, zero = self.store("scale", each.scale.ravel()), self.store("zero_point", each.zero.ravel())
            args = x, scale, zero, each.axis, *_ends(each)
            return self._call(_aten.fake_quantize_per_channel_affine.default, *args)
        if isinstance(each, Masked):
            inner = self.round(each.inner)
            return self._emit(_aten.mul.Tensor, inner, self.store("keep", each.keep.astype(np.float32)))
        assert isinstance(each, Scaled)
        if isinstance(each, Levels) and each.is_sign and self.computed:
            size = each.scale.item()
            return self._through(self._sign(each), self._emit(_aten.clamp.default, x, -size, size))
        return self._through(self._rounded(each), x)

    def _through(self, rounded: fx.Node, x: fx.Node) -> fx.Node:
        """A number with the gradient of another."""
        nothing = self._emit(_aten.sub.Tensor, x, self._emit(_aten.detach.default, x))
        return self._emit(_aten.add.Tensor, self._emit(_aten.detach.default, rounded), nothing)

    def _sign(self, each: Levels) -> fx.Node:
        """One of two numbers, which the integer grid behind them holds, so that they are codes in the artifact."""
        size = each.scale.item()
        positive = self._emit(_aten.gt.Scalar, self.source, 0.0)
        signs = self._emit(_aten.where.Scalar, positive, size, -size)
        grid = each.grid
        assert grid is not None
        return self._emit(_FAKE_QUANTIZE, signs, size, 0, *_ends(grid))

    def _rounded(self, each: Scaled) -> fx.Node:
        if isinstance(each, FloatFormat) and each.is_plain:
            return self._float(self.source, each)
        scale = self._spread("scale", each.scale, each)
        units = self._emit(_aten.div.Tensor, self.source, scale)
        match each:
            case IntegerGrid():
                zero = self._spread("zero_point", each.zero.astype(np.float32), each)
                shifted = self._emit(_aten.add.Tensor, self._emit(_aten.round.default, units), zero)
                units = self._emit(_aten.sub.Tensor, self._emit(_aten.clamp.default, shifted, *_ends(each)), zero)
            case FloatFormat():
                units = self._float(units, each)
            case Levels():
                units = self._looked_up(units, each)
            case _:
                raise SlimlineError(f"PyTorch does not simulate {each.describe()}: choose another format.")
        return self._emit(_aten.mul.Tensor, units, scale)

    def _looked_up(self, x: fx.Node, each: Levels | FloatFormat) -> fx.Node:
        bounds, codebook = self.store("bounds", each.bounds), self.store("codebook", each.codebook)
        return self._emit(_aten.take.default, codebook, self._emit(_aten.bucketize.Tensor, x, bounds))

    def _float(self, x: fx.Node, each: FloatFormat) -> fx.Node:
        if each.code_bits < 8:  # of which PyTorch has no type
            return self._looked_up(x, each)
        limited = self._emit(_aten.clamp.default, x, -each.largest, each.largest)
        narrow = self._emit(_aten.to.dtype, limited, getattr(torch, each.dtype))
        return self._emit(_aten.to.dtype, narrow, torch.float32)

    def _spread(self, name: str, array: np.ndarray, each: Scaled) -> fx.Node:
        """One number per block, repeated so that it broadcasts against the source."""
        node = self.store(name, array)
        for axis, block in enumerate(each.blocks):
            if block is None or block == 1:
                continue
            size = self.source.meta["val"].shape[axis]
            if not isinstance(size, int):
                raise SlimlineError(
                    f"{self.source.name} cannot be rounded in blocks along a dimension of any size: divide another."
                )
            node = self._emit(_aten.repeat_interleave.self_int, node, min(block, size), axis)
            if size % block and size > block:
                node = self._emit(_aten.slice.Tensor, node, axis, 0, size)
        return node

    def _call(self, operator: Any, *args: Any) -> fx.Node:
        """An operator whose result is like the source."""
        node = self.source.graph.call_function(operator, args)
        node.meta = dict(self.source.meta)
        return node

    def _emit(self, operator: Any, *args: Any) -> fx.Node:
        """An operator whose result may be of another shape or type."""
        node = self._call(operator, *args)
        values = [arg.meta.get("val") if isinstance(arg, fx.Node) else arg for arg in args]
        if all(value is not None for value in values):
            node.meta["val"] = operator(*values)
        return node


def round_dynamically(source: fx.Node, axes: Sequence[int] = ()) -> fx.Node:
    """The node that computes the source rounded to a grid of `slimline.methods.dynamic`: ``int8_per_row`` with one for
    all numbers along `axes`, where there are some, else ``uint8_per_tensor``; put where the graph's cursor is.
    """
    put = Rounder(source, lambda part, array: source)._emit
    if axes:
        return _by_rows(put, source, list(axes))
    low = put(_aten.clamp.default, put(_aten.min.default, source), None, 0.0)
    high = put(_aten.clamp.default, put(_aten.max.default, source), 0.0)
    span = put(_aten.sub.Tensor, high, low)
    nothing = put(_aten.to.dtype, put(_aten.eq.Scalar, span, 0.0), torch.float32)
    scale = put(_aten.add.Tensor, put(_aten.div.Tensor, span, float(LEVELS)), nothing)
    zero = put(_aten.clamp.default, put(_aten.neg.default, put(_aten.div.Tensor, low, scale)), 0.0, float(LEVELS))
    zero = put(_aten.round.default, zero)
    # Numbers are divided before the operator of rounding sees them, which would multiply by the inverse of its scale.
    whole = put(_FAKE_QUANTIZE, put(_aten.div.Tensor, source, scale), *WHOLE)
    codes = put(_aten.clamp.default, put(_aten.add.Tensor, whole, zero), 0, LEVELS)
    return put(_aten.mul.Tensor, put(_aten.sub.Tensor, codes, zero), scale)


def _by_rows(put: Callable[..., fx.Node], source: fx.Node, axes: list[int]) -> fx.Node:
    low = put(_aten.clamp.default, put(_aten.amin.default, source, axes, True), None, 0.0)
    high = put(_aten.clamp.default, put(_aten.amax.default, source, axes, True), 0.0)
    span = put(_aten.clamp.default, put(_aten.sub.Tensor, high, low), NARROWEST)
    factor = put(_aten.div.Tensor, put(_aten.full_like.default, span, float(LEVELS)), span)
    first, last = put(_aten.mul.Tensor, low, factor), put(_aten.mul.Tensor, high, factor)
    errors = put(_aten.add.Tensor, put(_aten.add.Scalar, first, LOW), put(_aten.add.Scalar, last, HIGH))
    ends = put(_aten.rsub.Scalar, first, LOW), put(_aten.rsub.Scalar, last, HIGH)
    zero = put(_aten.where.self, put(_aten.gt.Scalar, errors, 0.0), *ends)
    zero = put(_aten.round.default, put(_aten.clamp.default, zero, LOW, HIGH))
    whole = put(_FAKE_QUANTIZE, put(_aten.mul.Tensor, source, factor), *WHOLE)
    codes = put(_aten.clamp.default, put(_aten.add.Tensor, whole, zero), LOW, HIGH)
    return put(_aten.mul.Tensor, put(_aten.sub.Tensor, codes, zero), put(_aten.reciprocal.default, factor))


def is_dynamic(node: fx.Node) -> bool:
    """Whether an operator is the rounding in what `round_dynamically` puts."""
    return node.target is _FAKE_QUANTIZE and node.args[1:] == WHOLE


def _ends(each: IntegerGrid) -> tuple[int, int]:
    return each.low, each.high
