"""Half-quadratic quantization: scales that outliers hardly move, found without data.

The error of the weights in a norm below one, which outliers hardly move, is split in two: a part that is explained away
(by a shrinkage in closed form), and a rest that the grid fits by least squares; both are done in turn (Badri and Shaji
2023, "Half-Quadratic Quantization of Large Machine Learning Models").
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from slimline.methods.formats import Array, IntegerGrid, spread
from slimline.methods.scales import in_pieces, per_block

NORM = 0.7
_STARTS = (1.0, 0.8, 0.65, 0.5, 0.4, 0.3)  # of the scale given: from each, another minimum may be near
_ROUNDS = 10
_BETA, _GROWTH = 1.0, 1.1  # weight of the rest against the part that is explained away, in steps of the grid


def half_quadratic(weight: Array, grid: IntegerGrid) -> IntegerGrid:
    """Per block the grid near `grid` with the least error of `weight` in the norm, of those whose squared error is not
    above that of `grid`."""
    return in_pieces(weight, grid, _searched)


def norm_error(weight: Array, grid: IntegerGrid) -> Array:
    """Sum of ``|w - ŵ| ** NORM`` of each block."""
    return _Fit.of(weight, grid).norm


def _searched(weight: Array, grid: IntegerGrid) -> IntegerGrid:
    """As `half_quadratic`, of a piece."""
    before = _Fit.of(weight, grid)
    best, least = grid, before.norm
    for start in _STARTS:
        fit, beta = _Fit.of(weight, replace(grid, scale=(grid.scale * start).astype(np.float32))), _BETA
        for _ in range(_ROUNDS):
            fit = _Fit.of(weight, fit.next(weight, beta))
            better = (fit.norm < least) & (fit.square <= before.square)
            best = _where(better, fit.grid, best)
            least = np.where(better, fit.norm, least)
            beta *= _GROWTH
    return best


class _Fit(NamedTuple):
    """A grid, and how a weight lies on it.

    Attributes
    ----------
    codes : whole numbers.
    deviation : of the weight from what is rounded.
    powers : its size to the power of `NORM`.
    norm, square : sums over each block of these, and of its squares.
    """

    grid: IntegerGrid
    codes: Array
    deviation: Array
    powers: Array
    norm: Array
    square: Array

    @classmethod
    def of(cls, weight: Array, grid: IntegerGrid) -> _Fit:
        """All in float32, but the sums."""
        step = spread(grid.scale, grid.blocks, weight.shape)
        zero = 0 if grid.zero_point is None else spread(grid.zero.astype(np.float32), grid.blocks, weight.shape)
        codes = np.clip(np.rint(weight / step) + zero, grid.low, grid.high)
        deviation = weight - (codes - zero) * step
        powers = np.abs(deviation) ** np.float32(NORM)
        norm, square = (per_block(np.add, x.astype(np.float64), grid.blocks) for x in (powers, deviation**2))
        return cls(grid, codes, deviation, powers, norm, square)

    def next(self, weight: Array, beta: float) -> IntegerGrid:
        """One turn: explain away, then fit scale and zero point to the codes."""
        grid, size = self.grid, np.abs(self.deviation)
        slope = self.powers / np.maximum(size, np.finfo(np.float32).tiny)
        strength = (grid.scale.astype(np.float64) ** (2 - NORM) / beta).astype(np.float32)
        shrunk = np.maximum(size - spread(strength, grid.blocks, weight.shape) * slope, 0)
        rest = weight - np.copysign(shrunk, self.deviation)
        if grid.zero_point is None:
            return replace(grid, scale=_slope(self.codes, rest, grid))
        count = per_block(np.add, np.ones(weight.shape), grid.blocks)
        mean_code, mean_rest = (
            per_block(np.add, x.astype(np.float64), grid.blocks) / count for x in (self.codes, rest)
        )
        zeros = np.clip(np.rint(mean_code - mean_rest / grid.scale), grid.low, grid.high).astype(np.int32)
        units = self.codes - spread(zeros.astype(np.float32), grid.blocks, weight.shape)
        return replace(grid, scale=_slope(units, rest, grid), zero_point=zeros)


def _slope(units: Array, rest: Array, grid: IntegerGrid) -> Array:
    """The scale by which `units` fit `rest` best; the grid's own where there is none."""
    products, squares = (per_block(np.add, (units * x).astype(np.float64), grid.blocks) for x in (rest, units))
    sound = (products > 0) & (squares > 0)
    slope = np.divide(products, squares, out=np.ones_like(products), where=sound)
    return np.where(sound & (slope > 1e-30), slope, grid.scale).astype(np.float32)


def _where(choice: Array, one: IntegerGrid, other: IntegerGrid) -> IntegerGrid:
    zero = None if one.zero_point is None else np.where(choice, one.zero_point, other.zero).astype(np.int32)
    return replace(one, scale=np.where(choice, one.scale, other.scale), zero_point=zero)
