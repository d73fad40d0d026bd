"""Rounding to a format by operations of Keras, and layers that have a format.

An integer grid with one scale, or one per position of an axis, is the native fake-quantization op (Jacob et al. 2018,
arXiv:1712.05877), from which LiteRT's converter takes its scales. All other formats are written out, so that the model
computes exactly what `Format.round` does. Gradients go straight through (Bengio et al. 2013, arXiv:1308.3432).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import keras
import numpy as np
from keras import ops

from slimline.basics.errors import SlimlineError
from slimline.methods.dynamic import HIGH, LEVELS, LOW, NARROWEST
from slimline.methods.formats import FloatFormat, Format, IntegerGrid, Levels, Masked, Scaled, assembled, spread

_STORED = "format."
"""Before the names of a format's arrays in a file of weights."""


def rounded(x: Any, each: Format, computed: bool = False) -> Any:
    """``each.round(x)`` for a tensor, straight-through for gradients.

    Where `x` is `computed` a sign of it is one of codes, and gradients reach it within its two numbers alone; a stored
    weight they always reach. Call it inside a layer's `call` only: on a symbolic `KerasTensor` Keras forgets the number
    of bits.
    """
    if isinstance(each, IntegerGrid) and (each.per_tensor or each.axis is not None):
        return _native(x, each)
    if isinstance(each, Masked):
        return rounded(x, each.inner) * each.keep.astype(np.float32)
    assert isinstance(each, Scaled)
    if isinstance(each, Levels) and each.is_sign and computed:
        return _sign(x, each)
    return ops.stop_gradient(_written_out(x, each)) + (x - ops.stop_gradient(x))


def _native(x: Any, each: IntegerGrid) -> Any:
    """By the op that the converter knows, which clips gradients beyond the ends of the grid."""
    low, high = (end.ravel() for end in each.ends)
    op = keras.quantizers.fake_quant_with_min_max_vars
    if each.axis is None:
        return op(x, low[0], high[0], num_bits=each.bits, narrow_range=each.narrow)
    # The op rounds along the last axis only, and the converter follows a reshape but no transpose.
    shape = tuple(x.shape)
    repeats = int(np.prod(shape[each.axis + 1 :], dtype=int))
    flat = x if repeats == 1 and each.axis == len(shape) - 1 else ops.reshape(x, (*shape[: each.axis], -1))
    low, high = np.repeat(low, repeats), np.repeat(high, repeats)
    y = op(flat, low, high, num_bits=each.bits, narrow_range=each.narrow, axis=-1)
    return y if flat is x else ops.reshape(y, shape)


def _sign(x: Any, each: Levels) -> Any:
    """One of two numbers, on a grid of 8 bits that holds them, so that they are codes in the artifact."""
    size, grid = each.scale.item(), each.grid
    assert grid is not None

    @ops.custom_gradient  # type: ignore[untyped-decorator]
    def run(x: Any) -> Any:
        def backward(*arguments: Any, upstream: Any = None) -> Any:
            gradient = arguments[0] if upstream is None else upstream
            return ops.where(ops.abs(x) <= size, gradient, 0)

        signs = ops.cast(ops.where(x > 0, size, -size), x.dtype)
        return _native(signs, replace(grid, bits=8, narrow=False)), backward

    return run(x)


def rounded_by_rows(x: Any, axes: Sequence[int]) -> Any:
    """`x` rounded to the grid ``int8_per_row`` of `slimline.methods.dynamic`, of which the numbers along `axes` share
    one."""
    low = ops.minimum(ops.min(x, axes, keepdims=True), 0.0)
    high = ops.maximum(ops.max(x, axes, keepdims=True), 0.0)
    factor = LEVELS / ops.maximum(high - low, NARROWEST)
    first, last = low * factor, high * factor
    nearer = (first + LOW) + (last + HIGH) > 0
    zero = ops.round(ops.clip(ops.where(nearer, LOW - first, HIGH - last), LOW, HIGH))
    return (ops.clip(ops.round(x * factor) + zero, LOW, HIGH) - zero) * (1 / factor)


def _written_out(x: Any, each: Scaled) -> Any:
    if isinstance(each, FloatFormat) and each.is_plain:
        return _float(x, each)
    scale = _spread(each.scale, each, x)
    units = x / scale
    match each:
        case IntegerGrid():
            zero = _spread(each.zero.astype(np.float32), each, x)
            units = ops.clip(ops.round(units) + zero, each.low, each.high) - zero
        case FloatFormat():
            units = _float(units, each)
        case Levels():
            units = _looked_up(units, each)
        case _:
            raise SlimlineError(f"Keras does not simulate {each.describe()}: choose another format.")
    return units * scale


def _looked_up(x: Any, each: Levels | FloatFormat) -> Any:
    codes = ops.searchsorted(each.bounds, ops.reshape(x, (-1,)), side="left")
    return ops.reshape(ops.take(each.codebook, codes), ops.shape(x))


def _float(x: Any, each: FloatFormat) -> Any:
    if each.code_bits < 8:  # of which no backend has a type
        return _looked_up(x, each)
    return ops.cast(ops.cast(ops.clip(x, -each.largest, each.largest), each.dtype), "float32")


def _spread(array: np.ndarray, each: Scaled, x: Any) -> np.ndarray:
    sizes = tuple(x.shape)
    if any(n is None and b not in (None, 1) for n, b in zip(sizes, each.blocks, strict=False)):
        raise SlimlineError("A value cannot be rounded in blocks along a dimension of any size: divide another.")
    return spread(array, each.blocks, sizes)


class Formatted:
    """A layer with a format: its config says which kind, and its numbers are stored where those of the layer are.

    Parameters
    ----------
    format : a `Format`, or the outline of one whose arrays `load_own_variables` brings.
    """

    def __init__(self, *args: Any, format: Format | Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._format = format if isinstance(format, Format) else None
        self._outline = json.dumps(format.outline() if isinstance(format, Format) else format)

    @property
    def format(self) -> Format:
        """What it rounds to.

        Raises
        ------
        SlimlineError : a layer that was rebuilt from its config alone.
        """
        if self._format is None:
            layer: Any = self
            raise SlimlineError(
                f"Layer {layer.name!r} was rebuilt from its config, which lacks the numbers of its format: save the "
                "quantized model and load it."
            )
        return self._format

    def adopt(self, other: Formatted) -> None:
        """Take the format of a layer that this one is a copy of."""
        self._format = other._format

    def get_config(self) -> dict[str, Any]:
        """What rebuilds the layer, but for its numbers."""
        return {**super().get_config(), "format": json.loads(self._outline)}  # type: ignore[misc]

    def save_own_variables(self, store: Any) -> None:
        """Write weights and the format's arrays."""
        super().save_own_variables(store)  # type: ignore[misc]
        for name, array in self.format.arrays.items():
            store[f"{_STORED}{name}"] = array

    def load_own_variables(self, store: Any) -> None:
        """Read weights and the format's arrays, which are checked."""
        held = {name: store[name] for name in store.keys()}  # noqa: SIM118  it is no mapping
        super().load_own_variables({k: v for k, v in held.items() if not k.startswith(_STORED)})  # type: ignore[misc]
        arrays = {k.removeprefix(_STORED): np.asarray(v) for k, v in held.items() if k.startswith(_STORED)}
        self._format = assembled(json.loads(self._outline), arrays)
