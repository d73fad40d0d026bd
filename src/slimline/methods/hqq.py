"""Half-quadratic quantization: scales that ignore outliers, found without data.

The error of the weights in a norm below one, which outliers hardly move, is split in two: a part that is explained away
(by a shrinkage in closed form), and a rest that the grid fits by least squares; both are done in turn (Badri and Shaji
2023, "Half-Quadratic Quantization of Large Machine Learning Models").
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from slimline.methods.formats import Array, IntegerGrid, spread
from slimline.methods.scales import per_block

NORM = 0.7
_STARTS = (1.0, 0.8, 0.65, 0.5, 0.4, 0.3)  # of the scale given: from each, another minimum may be near
_ROUNDS = 10
_BETA, _GROWTH = 1.0, 1.1  # weight of the rest against the part that is explained away, in steps of the grid


def half_quadratic(weight: Array, grid: IntegerGrid) -> IntegerGrid:
    """Per block the grid near `grid` with the least error of `weight` in the norm; `grid` where none is better."""
    best, least = grid, norm_error(weight, grid)
    for start in _STARTS:
        current, beta = replace(grid, scale=(grid.scale * start).astype(np.float32)), _BETA
        for _ in range(_ROUNDS):
            current = _fitted(weight, current, beta)
            error = norm_error(weight, current)
            better = error < least
            best = _where(better, current, best)
            least = np.where(better, error, least)
            beta *= _GROWTH
    return best


def norm_error(weight: Array, grid: IntegerGrid) -> Array:
    """Sum of ``|w - ŵ| ** NORM`` of each block."""
    return per_block(np.add, np.abs(weight - grid.round(weight)).astype(np.float64) ** NORM, grid.blocks)


def _fitted(weight: Array, grid: IntegerGrid, beta: float) -> IntegerGrid:
    """One turn: explain away, then fit scale and zero point to the codes."""
    step = spread(grid.scale, grid.blocks, weight.shape).astype(np.float64)
    zero = spread(grid.zero, grid.blocks, weight.shape).astype(np.float64)
    codes = grid.encode(weight).astype(np.float64)
    error = weight / step - (codes - zero)
    size = np.abs(error)
    shrunk = np.maximum(size - np.maximum(size, 1e-6) ** (NORM - 1) / beta, 0.0)
    rest = weight - np.sign(error) * shrunk * step
    if grid.zero_point is None:
        return replace(grid, scale=_slope(codes, rest, grid))
    count = per_block(np.add, np.ones(weight.shape), grid.blocks)
    mean_code, mean_rest = (per_block(np.add, x, grid.blocks) / count for x in (codes, rest))
    zeros = np.clip(np.rint(mean_code - mean_rest / grid.scale), grid.low, grid.high).astype(np.int32)
    moved = replace(grid, zero_point=zeros)
    units = codes - spread(zeros, grid.blocks, weight.shape)
    return replace(moved, scale=_slope(units, rest, grid))


def _slope(units: Array, rest: Array, grid: IntegerGrid) -> Array:
    """The scale by which `units` fit `rest` best; the grid's own where there is none."""
    products, squares = (per_block(np.add, units * x, grid.blocks) for x in (rest, units))
    sound = (products > 0) & (squares > 0)
    slope = np.divide(products, squares, out=np.ones_like(products), where=sound)
    return np.where(sound & (slope > 1e-30), slope, grid.scale).astype(np.float32)


def _where(choice: Array, one: IntegerGrid, other: IntegerGrid) -> IntegerGrid:
    zero = None if one.zero_point is None else np.where(choice, one.zero_point, other.zero).astype(np.int32)
    return replace(one, scale=np.where(choice, one.scale, other.scale), zero_point=zero)
