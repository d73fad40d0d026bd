"""Scales of a stored tensor: how wide the format of each block is.

`widest` holds the largest number of every block; `least_squares` gives up the largest ones for finer steps where that
costs less, by a search per block: of squared error (the "MSE" scale), or of the output error under the Gram matrix of
the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.methods.formats import Array, BlockFloat, Blocks, FloatFormat, IntegerGrid, Scaled

SMALLEST = float(np.finfo(np.float32).tiny) * 2**23
"""Scale whose square and reciprocal are still sound in float32."""
_TINY = 1e-3  # of the largest scale, below which a slice's own does not decide how fast it learns
_FACTORS = tuple(float(f) for f in np.linspace(1.0, 0.3, 36))  # of the widest scale; at 2 bits about half is best
_PLAIN = ("float16", "bfloat16")
BLOCK_FLOATS = {"mxfp4": ("float4_e2m1fn", "float8_e8m0", 32), "nvfp4": ("float4_e2m1fn", "float8_e4m3fn", 16)}
"""By name the type of the numbers, that of the scales, and how many numbers share one."""

Energy = Callable[[Array], Array]
_PIECE = 2**16  # numbers


def per_block(function: np.ufunc, x: Array, blocks: Blocks) -> Array:
    """`x` reduced by `function` over every block, of the shape that a scale has."""
    if not blocks:
        return np.asarray(function.reduce(x, axis=None))
    for axis, block in enumerate(blocks):
        if block != 1:
            x = function.reduceat(x, range(0, x.shape[axis], block or x.shape[axis]), axis)
    return x


def fitting_blocks(
    shape: Sequence[int], outputs: Sequence[int], inputs: Sequence[int], kernel: Sequence[int], size: int | None
) -> Blocks:
    """Blocks of at most `size` neighbouring weights of one output; of a convolution as many whole kernels as fit, at
    least one.

    Parameters
    ----------
    outputs, inputs, kernel : the dimensions of `shape` that count outputs, inputs and the kernel's positions; there is
        one scale along those that are none of them.
    size : None for one scale per output.
    """
    blocks: list[int | None] = [1 if d in outputs else None for d in range(len(shape))]
    if size is None:
        return tuple(blocks)
    room = max(size // int(np.prod([shape[d] for d in kernel], dtype=int)), 1)
    for d in sorted(inputs, reverse=True):
        if shape[d] > room:
            blocks[d] = room
        room = max(room // shape[d], 1)
    return tuple(blocks)


def widest(weight: Array, dtype: str, blocks: Blocks, symmetric: bool = True) -> Scaled:
    """The format of `weight` whose ends are the largest numbers of each block.

    Parameters
    ----------
    dtype : ``int2`` … ``int8``, a float format or one of `BLOCK_FLOATS`; float16 and bfloat16 need no scales, so
        `blocks` is not used there.
    symmetric : of integers, whether zero is the middle; else each block has a zero point.

    Raises
    ------
    SlimlineError : NaN or infinity, or a number beyond float16.
    """
    if not np.isfinite(weight).all():
        raise SlimlineError("A weight holds NaN or infinity: mend the model before it is quantized.")
    if dtype in _PLAIN:
        plain = FloatFormat.plain(dtype)
        if weight.size and np.abs(weight).max() > plain.largest:
            raise SlimlineError(f"A weight holds numbers beyond {dtype}: choose bfloat16, or a format with scales.")
        return plain
    low, high = (np.asarray(per_block(f, weight, blocks), np.float64) for f in (np.minimum, np.maximum))
    if dtype in BLOCK_FLOATS:
        numbers, scales, _ = BLOCK_FLOATS[dtype]
        largest = FloatFormat.plain(numbers).largest
        return BlockFloat.at_least(_scale(np.maximum(np.abs(low), np.abs(high)) / largest), blocks, numbers, scales)
    if not dtype.startswith("int"):
        largest = FloatFormat.plain(dtype).largest
        return FloatFormat(_scale(np.maximum(np.abs(low), np.abs(high)) / largest), blocks, dtype)
    bits = int(dtype.removeprefix("int"))
    grid = IntegerGrid(np.ones(low.shape, np.float32), blocks, bits, symmetric, narrow=symmetric and bits == 8)
    if symmetric:
        return replace(grid, scale=_scale(np.maximum(high / grid.high, low / grid.low)))
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    scale = _scale((high - low) / grid.high)
    return replace(grid, scale=scale, zero_point=np.clip(np.rint(-low / scale), 0, grid.high).astype(np.int32))


_Scaled = TypeVar("_Scaled", bound=Scaled)


def in_pieces(weight: Array, grid: IntegerGrid, fit: Callable[[Array, IntegerGrid], IntegerGrid]) -> IntegerGrid:
    """What `fit` makes of a weight and its grid, a few positions of a dimension with a scale for each at a time.

    So many that they stay in the processor's cache however often they are rounded.
    """
    axis = next((d for d, block in enumerate(grid.blocks) if block == 1), None)
    if axis is None or weight.size <= _PIECE:
        return fit(weight, grid)
    rows = max(_PIECE * weight.shape[axis] // weight.size, 1)
    parts = []
    for first in range(0, weight.shape[axis], rows):
        where = (slice(None),) * axis + (slice(first, first + rows),)
        zero = None if grid.zero_point is None else grid.zero_point[where]
        parts.append(fit(np.ascontiguousarray(weight[where]), replace(grid, scale=grid.scale[where], zero_point=zero)))
    zeros = None if grid.zero_point is None else np.concatenate([part.zero for part in parts], axis)
    return replace(grid, scale=np.concatenate([part.scale for part in parts], axis), zero_point=zeros)


def least_squares(weight: Array, widest: _Scaled, energy: Energy = np.square) -> _Scaled:
    """The format of least error, with a scale between three tenths of the widest and the widest, per block.

    Parameters
    ----------
    energy : of an error of the weights, whose sum over a block is minimised; its square by default.
    """
    if isinstance(widest, FloatFormat) and widest.is_plain:
        return widest
    best, least, last = widest, rounding_error(weight, widest, energy), widest.scale
    for factor in _FACTORS[1:]:
        other = widest.rescaled(_scale(widest.scale.astype(np.float64) * factor))
        if np.array_equal(other.scale, last):
            continue
        last = other.scale
        error = rounding_error(weight, other, energy)
        better = error < least
        best = replace(best, scale=np.where(better, other.scale, best.scale))
        least = np.where(better, error, least)
    return best


def rounding_error(weight: Array, each: Scaled, energy: Energy = np.square) -> Array:
    """Of rounding the weights of each block to a format, see `least_squares`; of the scale's shape."""
    return per_block(np.add, energy((weight - each.round(weight)).astype(np.float64)), each.blocks)


def _scale(scale: Any) -> Array:
    """As float32, and 1 where all is zero."""
    scale = np.asarray(scale)
    return np.where(scale > 0, np.maximum(scale, SMALLEST), 1.0).astype(np.float32)


def learning_speeds(each: Scaled, count: int) -> Array:
    """By what to multiply the gradients of the logarithms of a format's scales, so that they learn as fast as what they
    scale (Esser et al. 2020, arXiv:1902.08153); float32 ``(scales,)``.

    Parameters
    ----------
    count : numbers that are rounded; of an activation those of a sample.
    """
    share = max(count // each.scale.size, 1)
    top = each.high if isinstance(each, IntegerGrid) else 1
    sizes = np.maximum(each.scale.ravel(), _TINY * each.scale.max()).astype(np.float64) ** 2
    return np.asarray(1 / (np.sqrt(share * max(top, 1)) * sizes), np.float32)


def zero_learns(each: Scaled) -> bool:
    """Whether all zero points lie inside of their grid, so that they may move."""
    if not isinstance(each, IntegerGrid) or each.zero_point is None:
        return False
    return bool(((each.zero > each.low) & (each.zero < each.high)).all())
