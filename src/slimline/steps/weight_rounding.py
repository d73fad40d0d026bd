"""The rounding of one weight, which all steps that quantize weights share: scales, and the number for each weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from slimline.graph.matrix import LayerMatrix
from slimline.methods.adaround import adaround
from slimline.methods.formats import Array, IntegerGrid, Levels, Scaled, spread
from slimline.methods.gptq import gptq, nearest_of, sweeps
from slimline.methods.gram import Gram, output_energy
from slimline.methods.hqq import half_quadratic
from slimline.methods.obs import damped
from slimline.methods.reconstruction import reconstruct
from slimline.methods.scales import Energy, in_pieces, least_squares

RoundingName = Literal["nearest", "mse", "gptq", "adaround", "hqq"]
SECOND_ORDER = ("gptq", "adaround")
"""Those that cannot do without calibration samples."""
MEASURED = ("mse", *SECOND_ORDER)
"""Those that weigh errors by the inputs' Gram matrix where there is one."""
_PIECE = 2**22  # weights


class WeightRounding:
    """The rounding of one weight.

    Parameters
    ----------
    weight : of any layout.
    matrix : the layer that reads it; None where it is no matrix.
    gram : of that layer's inputs; None where they are unknown. One that is paired is that of inputs which are not what
        they were, with what the layer gave before.
    mask : boolean, of the weight's shape; what is False stays zero.
    damping : part of the mean diagonal of the Gram matrix that is added to it.

    Attributes
    ----------
    target : what is rounded: the weight, or where `gram` is paired, the one that gives what the layer gave before
        (and where `mask` is False, what others make up for).
    """

    def __init__(
        self,
        weight: Array,
        matrix: LayerMatrix | None = None,
        gram: Gram | None = None,
        mask: Array | None = None,
        damping: float = 0.01,
    ) -> None:
        self.weight, self.matrix, self.gram, self.mask, self.damping = weight, matrix, gram, mask, damping
        self.target = weight
        if matrix is not None and gram is not None and gram.paired:
            own, second, cross = matrix.matrix(weight), gram.second, gram.cross
            solved = np.empty(own.shape, weight.dtype)
            for rows in self._rows():
                solved[:, rows] = reconstruct(np.asarray(own[:, rows], np.float64), second, cross[:, rows], damping)
            self.target = matrix.tensor(solved, weight.shape)

    @property
    def visible(self) -> Array:
        """`target` with zeros where `mask` is False."""
        return self.target if self.mask is None else np.where(self.mask, self.target, np.zeros((), self.target.dtype))

    def fitted(self, each: Scaled, rounding: RoundingName) -> Scaled:
        """`each`, which holds the whole range of `visible`, with the scales of a way of rounding."""
        if rounding in MEASURED and not isinstance(each, Levels):  # whose scale is of least error already
            energy = self._energy(each)
            if isinstance(each, IntegerGrid) and self._parts(each):
                return in_pieces(self.visible, each, lambda weight, grid: least_squares(weight, grid, energy))
            return least_squares(self.visible, each, energy)
        if rounding == "hqq" and isinstance(each, IntegerGrid):
            return half_quadratic(self.visible, each)
        return each

    def rounded(self, each: Scaled, rounding: RoundingName) -> Array:
        """The numbers of a format that take the weight's place."""
        nearest = each.round(self.visible)
        if rounding not in SECOND_ORDER or self.matrix is None or self.gram is None:
            return nearest
        better = self.matrix.tensor(self._second_order(each, nearest, rounding), self.weight.shape)
        return each.round(better.astype(self.weight.dtype, copy=False))

    def error(self, rounded: Array) -> float:
        """Of the layer's output where its inputs are known, else of the weight; relative to its energy.

        With a paired Gram matrix that is by what the output differs from what it was, wrong inputs included.
        """
        if self.matrix is None or self.gram is None:
            change = np.asarray(self.weight - rounded, np.float64)
            return float((change**2).sum() / (np.asarray(self.weight, np.float64) ** 2).sum().clip(1e-300))
        before, after, second = self.matrix.matrix(self.weight), self.matrix.matrix(rounded), self.gram.second
        cross = self.gram.cross if self.gram.paired else None
        total = energy = 0.0 if cross is None else float(self.gram.others_energy.sum())
        for rows in self._rows():
            old, new = (np.asarray(x[:, rows], np.float64) for x in (before, after))
            if cross is None:
                total += output_energy(old - new, second).sum()
                energy += output_energy(old, second).sum()
            else:
                total += (output_energy(new, second) - 2 * np.einsum("goi,goi->go", new, cross[:, rows])).sum()
        return float(max(total, 0.0) / max(energy, 1e-300))

    def _rows(self) -> Iterator[slice]:
        """All outputs of the matrix, a few at a time: each is rounded by itself, in numbers of eight bytes."""
        assert self.matrix is not None
        _, outputs, inputs = self.matrix.shape
        count = max(_PIECE // inputs, 1)
        return (slice(first, first + count) for first in range(0, outputs, count))

    def _parts(self, each: Scaled) -> bool:
        """Whether `_energy` is there for some outputs alone, along the dimensions with a scale for each place."""
        shape = [1 if block == 1 else n for n, block in zip(self.weight.shape, each.blocks, strict=False)]
        return self.matrix is None or self.gram is None or self.matrix.part(shape) is not None

    def _energy(self, each: Scaled) -> Energy:
        """What an error of the weights costs: of the output, as far as weights of one scale make it together."""
        layer = self.matrix
        if layer is None or self.gram is None:
            return np.square
        count = np.arange(each.scale.size).reshape(each.scale.shape)
        blocks = self._in_matrix(count, each)[:, 0]  # the same for all outputs, but for where they begin
        h = [damped(second, self.damping) for second in self.gram.second]
        parts = [(g, at, h[g][at][:, at]) for g, own in enumerate(blocks) for at in _alike(own)]

        def energy(error: Array) -> Array:
            here = layer.part(error.shape) or layer
            matrix = here.matrix(error)
            cost = here.matrix(np.empty(error.shape, np.float64))
            for group, at, second in parts:
                own = matrix[group][:, at]
                cost[group][:, at] = own * (own @ second)
            return here.tensor(cost, error.shape)

        return energy

    def _in_matrix(self, per_block: Array, each: Scaled) -> Array:
        """What there is per block, for every weight of the matrix."""
        assert self.matrix is not None
        shape = self.weight.shape
        return self.matrix.matrix(np.broadcast_to(spread(per_block, each.blocks, shape), shape))

    def _second_order(self, each: Scaled, nearest: Array, rounding: RoundingName) -> Array:
        """By AdaRound, or GPTQ and coordinate descent behind it, ``(groups, outputs, inputs)``; a row that is no better
        so stays rounded to nearest."""
        assert self.matrix is not None and self.gram is not None
        scale = self._in_matrix(each.scale, each)
        zero = self._in_matrix(each.zero, each) if isinstance(each, IntegerGrid) else np.zeros_like(scale)
        weight, result = self.matrix.matrix(self.target), np.array(self.matrix.matrix(nearest))
        keep = None if self.mask is None else self.matrix.matrix(self.mask)
        for group, second in enumerate(self.gram.second):
            h = damped(second, self.damping)
            for rows in self._rows():
                at = group, rows
                own = None if keep is None else keep[at]
                target, now = (np.asarray(x[at], np.float64) for x in (weight, result))
                if rounding == "adaround" and isinstance(each, IntegerGrid):
                    steps = np.asarray(scale[at], np.float64)
                    refined = adaround(target, h, steps, each.low - zero[at], each.high - zero[at], own)
                else:
                    code = nearest_of(each, *(np.asfortranarray(x[at]) for x in (scale, zero)))  # it reads inputs
                    refined = sweeps(target, gptq(target, h, code, own), h, code, own)
                errors = [output_energy((target - x)[None], h[None])[0] for x in (refined, now)]
                result[at] = np.where((errors[0] < errors[1])[:, None], refined, now)
        return result


def _alike(labels: Array) -> list[Array | slice]:
    """The positions of each label; a run of them as a slice, whose columns need no copy."""
    order = np.argsort(labels, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    return [slice(at[0], at[-1] + 1) if at[-1] - at[0] == len(at) - 1 else at for at in parts]
