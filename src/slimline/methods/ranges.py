"""The ranges that calibration finds for grids of few codes: streaming, in bounded memory.

An observer sees the batches of one tensor and answers the range its grid should cover. Histograms have
bins whose width is a power of two and whose edges include zero, so that doubling the width merges pairs
of bins exactly: what an observer answers does not depend on the order of the batches (but for the moving
average, whose point it is).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from slimline.basics.errors import SlimlineError, unknown
from slimline.methods.formats import FloatFormat, IntegerGrid, Scaled, along

Array = np.ndarray[Any, np.dtype[Any]]

_BINS = 4096  # on each side of zero; at least half of the longer side is in use
_CHUNK = 2**15  # numbers that are counted at a time, which the processor's cache holds
_AVERAGING = 0.1  # part of a moving average that the latest batch is
_TRACE = 1e-4  # of a number, where a divergence would be infinite
_THRESHOLDS = 128  # that `Entropy` tries
_NARROWEST = 2.0**-100  # bin width; its reciprocal is still a float32
GridMaker = Callable[[float, float], Scaled]
"""Of a range, the format that is to cover it, with one scale."""
_SMALLEST = float(np.finfo(np.float32).tiny) * 2**23  # scale whose square and reciprocal are still sound in float32


class Observer(Protocol):
    """What is asked of an observer."""

    def see(self, array: Array) -> None:
        """Take in one batch, of any shape and any float dtype."""

    def range(self) -> tuple[float, float]:
        """Lowest and highest real number that the grid should hold."""


class MinMax:
    """The whole range seen. `name` is that of the value, for messages."""

    def __init__(self, name: str = "the value") -> None:
        self.name = name
        self.low = math.inf
        self.high = -math.inf

    def see(self, array: Array) -> None:
        """Widen the range by `array`; NaN and infinity are refused."""
        if array.size == 0:
            return
        low, high = self._ends(array)
        self.low, self.high = min(self.low, low), max(self.high, high)

    def _ends(self, array: Array) -> tuple[float, float]:
        low, high = float(array.min()), float(array.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise SlimlineError(
                f"Calibration met NaN or infinity in {self.name}: check the calibration data and the model's weights."
            )
        return low, high

    def range(self) -> tuple[float, float]:
        """The least and the greatest number seen."""
        if self.low > self.high:
            raise SlimlineError(f"Calibration saw no number of {self.name}: give at least one calibration batch.")
        return self.low, self.high


class MovingAverage(MinMax):
    """The exponential moving average of the least and of the greatest number of each batch (Jacob et al. 2018,
    arXiv:1712.05877): one batch with an outlier moves it little."""

    def see(self, array: Array) -> None:
        """Move the range towards that of `array`; NaN and infinity are refused."""
        if array.size == 0:
            return
        low, high = self._ends(array)
        if self.low > self.high:
            self.low, self.high = low, high
        else:
            self.low += _AVERAGING * (low - self.low)
            self.high += _AVERAGING * (high - self.high)


class _Histogram(MinMax):
    """Counts of the numbers seen, beside their extremes; exact zeros are counted apart.

    Attributes
    ----------
    counts : int64 ``(2 * _BINS,)``; bin ``_BINS + i`` holds ``i * width <= x < (i + 1) * width``.
    width : of a bin, a power of two; 0.0 before the first number other than zero.
    zeros : count of exact zeros, whose error is none on any grid.
    """

    def __init__(self, name: str = "the value") -> None:
        super().__init__(name)
        self.counts = np.zeros(2 * _BINS, np.int64)
        self.width = 0.0
        self.zeros = 0

    def see(self, array: Array) -> None:
        """Count the numbers of `array`."""
        super().see(array)
        if array.size == 0:
            return
        top = max(abs(self.low), abs(self.high))
        if top == 0.0:
            self.zeros += array.size
            return
        # The smallest power of two with every number inside; `top` itself may lie on the open edge.
        width = max(2.0 ** math.frexp(top)[1] / _BINS, _NARROWEST)
        if self.width == 0.0:
            self.width = width
        while self.width < width:
            self._double()
        flat = array.ravel()
        for start in range(0, flat.size, _CHUNK):
            part = flat[start : start + _CHUNK]
            zeros = int(np.count_nonzero(part == 0))
            scaled = part * (1.0 / self.width)
            if self.low < 0:  # else the whole part is the floor
                np.floor(scaled, out=scaled)
            index = scaled.astype(np.int64)
            index += _BINS
            self.counts += np.bincount(index, minlength=2 * _BINS)
            self.counts[_BINS] -= zeros
            self.zeros += zeros

    def _double(self) -> None:
        merged = self.counts.reshape(-1, 2).sum(1)
        self.counts[:] = 0
        self.counts[_BINS // 2 : _BINS // 2 + _BINS] = merged
        self.width *= 2.0

    def points(self) -> tuple[Array, Array]:
        """Centres (clipped to the extremes) and counts of the bins that hold anything, both ``(n,)``."""
        used = np.flatnonzero(self.counts)
        centres = np.clip((used - _BINS + 0.5) * self.width, self.low, self.high)
        return centres, self.counts[used]


class Percentile(_Histogram):
    """The range that keeps `percentile` percent of the absolute values (exact to a bin)."""

    def __init__(self, percentile: float = 99.99, name: str = "the value") -> None:
        super().__init__(name)
        self.percentile = percentile

    def range(self) -> tuple[float, float]:
        """The extremes, clipped to plus and minus the percentile of the absolute values."""
        low, high = super().range()
        centres, counts = self.points()
        total = int(counts.sum()) + self.zeros
        order = np.argsort(np.abs(centres), kind="stable")
        covered = self.zeros + np.cumsum(counts[order])
        if covered.size == 0:
            return low, high
        at = int(np.searchsorted(covered, total * self.percentile / 100.0))
        limit = abs(float(centres[order][min(at, covered.size - 1)])) + self.width / 2
        return max(low, -limit), min(high, limit)


class MSE(_Histogram):
    """The clipping range of least squared rounding error on the grid that `grid` makes of it.

    A range is searched first by shrinking both ends together, then one end at a time. A range that lies
    on one side of zero keeps zero as its other end, and one that is `symmetric` both ends at the same distance.
    """

    def __init__(self, grid: GridMaker | None = None, name: str = "the value", symmetric: bool = False) -> None:
        super().__init__(name)
        self.grid = grid or affine_grid
        self.symmetric = symmetric

    def range(self) -> tuple[float, float]:
        """The best range; never wider than what was seen, but for the other end of a symmetric one."""
        low, high = super().range()
        low, high = min(low, 0.0), max(high, 0.0)
        centres, counts = self.points()
        if centres.size == 0:
            return low, high
        if self.symmetric and low < 0.0:
            low, high = min(low, -high), max(high, -low)

        def best(candidates: list[tuple[float, float]]) -> tuple[float, float]:
            errors = [squared_error(centres, counts, self.grid(a, b)) for a, b in candidates]
            return candidates[int(np.argmin(errors))]

        coarse = [float(f) for f in np.linspace(1.0, 0.02, 99)]
        ends = best([(low * f, high * f) for f in coarse])
        if low == 0.0 or high == 0.0 or self.symmetric:
            best_factor = (ends[1] - ends[0]) / (high - low)
            factors = np.linspace(max(best_factor - 0.01, 1e-3), min(best_factor + 0.01, 1.0), 21)
            return best([ends, *((low * float(f), high * float(f)) for f in factors)])
        for _ in range(3):
            before = ends
            ends = best([ends, *((low * f, ends[1]) for f in coarse)])
            ends = best([ends, *((ends[0], high * f) for f in coarse)])
            if ends == before:
                break
        return ends


class Entropy(_Histogram):
    """The clipping range whose codes tell the most of the histogram: the least Kullback-Leibler divergence of what is
    clipped to its ends from what the grid that `grid` makes of it tells of the rest (Migacz 2017, "8-bit Inference with
    TensorRT").

    Both ends are clipped at the same distance from zero. Exact zeros, which any grid holds, do not count.
    """

    def __init__(self, grid: GridMaker | None = None, name: str = "the value") -> None:
        super().__init__(name)
        self.grid = grid or affine_grid

    def range(self) -> tuple[float, float]:
        """The best range; never wider than what was seen."""
        low, high = super().range()
        low, high = min(low, 0.0), max(high, 0.0)
        used = np.flatnonzero(self.counts)
        if used.size == 0:
            return low, high
        reach = int(np.abs(used - _BINS + 0.5).max() + 0.5)  # bins on the longer side
        # With fewer bins than codes nothing but the clipping would count.
        codes = 2 ** self.grid(low, high).code_bits
        bins = np.unique(np.linspace(min(codes, reach), reach, _THRESHOLDS).astype(np.int64))[::-1]
        limits = [(max(low, -n * self.width), min(high, n * self.width)) for n in bins.tolist()]
        divergences = [self._divergence(n, *ends) for n, ends in zip(bins.tolist(), limits, strict=True)]
        return limits[int(np.argmin(divergences))]

    def _divergence(self, n: int, low: float, high: float) -> float:
        """Of clipping to `n` bins on each side of zero, which the grid from `low` to `high` holds."""
        inside = self.counts[_BINS - n : _BINS + n]
        clipped = inside.copy()
        clipped[0] += self.counts[: _BINS - n].sum()
        clipped[-1] += self.counts[_BINS + n :].sum()
        held = np.flatnonzero(clipped)
        centres = np.clip((held - n + 0.5) * self.width, low, high)
        codes = self.grid(low, high).encode(centres).astype(np.int64)
        codes -= codes.min()
        shares = np.bincount(codes, inside[held]) / np.maximum(np.bincount(codes), 1)
        told = np.maximum(shares[codes], _TRACE)  # a code may hold nothing but what was clipped
        truth, told = clipped[held] / clipped.sum(), told / told.sum()
        return float(np.dot(truth, np.log(truth / told)))


def squared_error(points: Array, counts: Array, grid: Scaled) -> float:
    """Sum of ``counts * (points - grid.round(points))**2`` on a per-tensor grid."""
    difference = points - grid.round(points)
    return float(np.dot(counts, difference * difference))


def observer(
    name: str,
    percentile: float = 99.99,
    value: str = "the value",
    grid: GridMaker | None = None,
    symmetric: bool = False,
) -> Observer:
    """An observer by its name in a recipe: ``minmax``, ``moving_average``, ``percentile``, ``mse`` or ``entropy``.

    Parameters
    ----------
    value : its name, for messages.
    grid : makes the format that is to cover the range, for `mse` and `entropy`; None for integers of 8 bits.
    symmetric : whether its zero is in the middle, for `mse`.
    """
    makers: dict[str, Callable[[], Observer]] = {
        "minmax": lambda: MinMax(value),
        "moving_average": lambda: MovingAverage(value),
        "percentile": lambda: Percentile(percentile, value),
        "mse": lambda: MSE(grid, value, symmetric),
        "entropy": lambda: Entropy(grid, value),
    }
    if name not in makers:
        raise unknown("observer", name, makers)
    return makers[name]()


def affine_grid(low: float, high: float, bits: int = 8, signed: bool = False) -> IntegerGrid:
    """The per-tensor grid of ``2**bits`` levels over ``[low, high]``, widened to hold zero exactly.

    The scale is a float32 number, as every runtime stores it. A range of width zero gives a grid that
    holds zero and steps of one.
    """
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    levels = 2**bits - 1
    first = -(2 ** (bits - 1)) if signed else 0
    scale = 1.0 if high == low else max(float(np.float32((high - low) / levels)), _SMALLEST)
    zero = min(max(first + round(-low / scale), first), first + levels)
    return IntegerGrid(np.asarray(scale, np.float32), (), bits, signed, zero_point=np.asarray(zero, np.int32))


def centred_grid(low: float, high: float, bits: int = 8, signed: bool = False) -> IntegerGrid:
    """The per-tensor grid over ``[low, high]`` whose zero is the middle of its codes; an unsigned one of numbers that
    are never negative begins with zero."""
    if signed:
        return replace(symmetric_grid(np.asarray((low, high), np.float64), None, bits), narrow=False)
    if low >= 0.0:
        return affine_grid(low, high, bits)
    middle = 2 ** (bits - 1)
    scale = symmetric_grid(np.asarray((low, high), np.float64), None, bits).scale
    return IntegerGrid(scale, (), bits, False, zero_point=np.asarray(middle, np.int32))


def float_format(low: float, high: float, dtype: str = "float8_e4m3fn") -> FloatFormat:
    """The scaled numbers of a short float type whose largest is that of ``[low, high]``; one by one where it is zero.

    Their steps grow with the numbers, so that a narrower range makes the steps of the smallest ones alone finer.
    """
    top = max(abs(float(low)), abs(float(high)))
    scale = max(top / FloatFormat.plain(dtype).largest, _SMALLEST) if top else 1.0
    return FloatFormat(np.asarray(scale, np.float32), (), dtype)


def symmetric_grid(weight: Array, axis: int | None, bits: int = 8) -> IntegerGrid:
    """The symmetric grid ``-127 … 127`` (for 8 bits) of a weight, one scale per position of `axis`, or one in all.

    A slice of zeros takes the largest scale of the others, and 1 where all are zero.
    """
    if not np.isfinite(weight).all():
        raise SlimlineError("A weight holds NaN or infinity: mend the model before it is quantized.")
    high = 2 ** (bits - 1) - 1
    rows = weight.reshape(1, -1) if axis is None else np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    top = np.abs(rows).max(axis=1, initial=0.0).astype(np.float64)
    scales = np.maximum((top / high).astype(np.float32), np.float32(_SMALLEST))
    spare = scales[top > 0].max() if (top > 0).any() else np.float32(1.0)
    scales = np.where(top > 0, scales, spare)
    if axis is None:
        return IntegerGrid(scales.reshape(()), (), bits, True, narrow=True)
    blocks = along(axis, weight.ndim)
    return IntegerGrid(scales.reshape([1 if b is None else -1 for b in blocks]), blocks, bits, True, narrow=True)
