"""Unstructured sparsity on arrays: how much each weight matters, how many go in each layer, in which pattern.

A layer is its matrix `W` ``(groups, outputs, inputs)``. What goes as one (a weight, a block, a row) is a *cell*; a
mask is a boolean array in which True stays.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from slimline.basics.errors import SlimlineError, shown
from slimline.methods.gram import Gram

Array = np.ndarray[Any, np.dtype[Any]]
Amount = float | int
"""A part in [0, 1] as a float, a number of weights as an int."""


class Layout(Protocol):
    """How a weight is read as a matrix; a `slimline.graph.matrix.LayerMatrix` is one."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(groups, outputs, inputs)``."""

    def matrix(self, weight: Array) -> Array:
        """The weight as ``(groups, outputs, inputs)``."""

    def tensor(self, matrix: Array, shape: Sequence[int]) -> Array:
        """The inverse of `matrix`."""


@dataclass(frozen=True)
class Axes:
    """A `Layout` by axes.

    Attributes
    ----------
    split : sizes to which the weight is reshaped.
    order : of these axes: that of the groups, the `outputs` ones of outputs, those of inputs.
    """

    split: tuple[int, ...]
    order: tuple[int, ...]
    outputs: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(groups, outputs, inputs)``."""
        groups, *sizes = [self.split[d] for d in self.order]
        return groups, math.prod(sizes[: self.outputs]), math.prod(sizes[self.outputs :])

    def matrix(self, weight: Array) -> Array:
        """The weight as ``(groups, outputs, inputs)``."""
        return weight.reshape(self.split).transpose(self.order).reshape(self.shape)

    def tensor(self, matrix: Array, shape: Sequence[int]) -> Array:
        """The inverse of `matrix`."""
        sizes = [self.split[d] for d in self.order]
        return np.ascontiguousarray(matrix.reshape(sizes).transpose(np.argsort(self.order)).reshape(shape))


@dataclass(frozen=True)
class Pattern:
    """Where zeros may lie.

    Attributes
    ----------
    text : ``element``; ``N:M``, at most N of M neighbouring inputs stay; ``AxB``, blocks of A outputs x B inputs;
        ``row``, all inputs of an output.
    block : outputs and inputs of a cell, None for a whole row.
    group : N and M, or None.
    """

    text: str
    block: tuple[int, int] | None = (1, 1)
    group: tuple[int, int] | None = None

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """From the name."""
        if text == "element":
            return cls(text)
        if text == "row":
            return cls(text, None)
        match = re.fullmatch(r"(\d+)([:x])(\d+)", text)
        if match is None:
            raise SlimlineError(
                f"There is no pattern {shown(text)}: use element, row, N:M such as 2:4, or AxB such as 1x4."
            )
        a, b = int(match[1]), int(match[3])
        if match[2] == "x":
            if a < 1 or b < 1:
                raise SlimlineError(f"A block of {text} is empty: both sizes must be at least 1.")
            return cls(text, (a, b))
        if not 0 < a < b:
            raise SlimlineError(f"The pattern {text} is no sparsity: N of M weights stay, with 0 < N < M.")
        return cls(text, (1, 1), (a, b))

    def misfit(self, shape: tuple[int, int, int]) -> str:
        """Why a layer ``(groups, outputs, inputs)`` cannot have the pattern; empty where it can."""
        _, outputs, inputs = shape
        a, b = (1, self.group[1]) if self.group else self.block or (1, 1)
        if inputs % b:
            return f"its {inputs} inputs (channels x kernel) do not divide into groups of {b}"
        if outputs % a:
            return f"its {outputs} outputs do not divide into groups of {a}"
        return ""

    def size(self, shape: tuple[int, int, int]) -> int:
        """Weights in a cell."""
        return shape[2] if self.block is None else self.block[0] * self.block[1]

    def cells(self, score: Array) -> Array:
        """Mean score of every cell, ``(groups, rows of cells, cells in a row)``."""
        groups, outputs, inputs = score.shape
        a, b = (1, inputs) if self.block is None else self.block
        means: Array = score.reshape(groups, outputs // a, a, inputs // b, b).mean(axis=(2, 4))
        return means

    def spread(self, cells: Array, shape: tuple[int, int, int]) -> Array:
        """A value of every cell at each of its weights: the inverse of `cells`."""
        a, b = (1, shape[2]) if self.block is None else self.block
        return cells.repeat(a, axis=1).repeat(b, axis=2)


def count(amount: Amount, size: int) -> int:
    """How many of `size` weights `amount` is."""
    if isinstance(amount, float):
        return round(amount * size)
    if amount > size:
        raise SlimlineError(f"There are {size:,} weights, of which {amount:,} cannot go: lower the amount.")
    return amount


NEEDS_GRADIENT = frozenset({"taylor", "movement"})
NEEDS_GRAM = frozenset({"wanda", "obs"})


def score(
    criterion: str, weight: Array, gradient: Array | None = None, gram: Gram | None = None, seed: int = 0
) -> Array:
    """Importance of every weight, float64, of the shape of `weight` ``(groups, outputs, inputs)``.

    ``random``; ``l1``, ``l2``, … ``ln``: ``|w|ⁿ``; ``taylor``: ``|w g|`` (Molchanov et al. 2019, arXiv:1906.10771);
    ``movement``: ``-w g``, high where training moves a weight away from zero (Sanh et al. 2020, arXiv:2005.07683);
    ``wanda``: ``|w| ‖x‖`` (Sun et al. 2023, arXiv:2306.11695). For ``obs`` see `slimline.methods.obs`.
    """
    w = np.asarray(weight, np.float64)
    if criterion == "random":
        return np.random.default_rng(seed).random(w.shape)
    if re.fullmatch(r"l[1-9]\d*", criterion):
        return np.asarray(np.abs(w) ** int(criterion[1:]))
    if criterion in NEEDS_GRADIENT:
        if gradient is None:
            raise ValueError(f"the {criterion} criterion needs gradients")
        return np.asarray(np.abs(w * gradient) if criterion == "taylor" else -w * gradient)
    if criterion == "wanda":
        if gram is None:
            raise ValueError("the wanda criterion needs a Gram matrix")
        return np.asarray(np.abs(w) * gram.norm[:, None, :])
    raise ValueError(f"unknown criterion {criterion!r}")


def checked(scores: Any, shape: tuple[int, ...], name: str) -> Array:
    """What a user's criterion returned, if it is one finite number for each weight."""
    array = np.asarray(scores, np.float64)
    if array.shape != shape:
        raise SlimlineError(
            f"The criterion {name} returned shape {array.shape} for a weight of {shape}: return one score per weight."
        )
    if not np.isfinite(array).all():
        raise SlimlineError(f"The criterion {name} returned NaN or infinity: return finite scores.")
    return array


def lowest(cells: Array, number: int) -> Array:
    """A mask that is False at the `number` lowest cells; of equal ones the first go."""
    stays = np.ones(cells.size, bool)
    stays[np.argsort(cells, axis=None, kind="stable")[:number]] = False
    return stays.reshape(cells.shape)


def keep_mask(score: Array, gone: int, pattern: Pattern) -> Array:
    """The mask of one layer that loses its lowest cells, about `gone` weights; N:M loses what the pattern says."""
    if pattern.group is not None:
        return n_of_m(score, *pattern.group)
    cells = pattern.cells(score)
    return pattern.spread(lowest(cells, _cells(gone, pattern.size(score.shape))), score.shape)


def keep_rows(score: Array, amount: Amount, pattern: Pattern) -> Array:
    """The mask of one layer whose every row loses the same: `amount` of its inputs."""
    cells = pattern.cells(score)
    size = score.shape[2] // cells.shape[2]
    number = _cells(count(amount, score.shape[2]), size)
    order = np.argsort(cells, axis=2, kind="stable")[:, :, :number]
    stays = np.ones(cells.shape, bool)
    np.put_along_axis(stays, order, False, axis=2)
    return pattern.spread(stays, score.shape)


def n_of_m(score: Array, n: int, m: int) -> Array:
    """The mask that keeps the `n` highest of every `m` neighbouring inputs (of equal ones the last)."""
    groups = score.reshape(-1, m)
    stays = np.ones(groups.shape, bool)
    np.put_along_axis(stays, np.argsort(groups, axis=1, kind="stable")[:, : m - n], False, axis=1)
    return stays.reshape(score.shape)


def _cells(weights: int, size: int) -> int:
    return int(weights / size + 0.5)


def local_counts(sizes: Sequence[int], amount: Amount) -> list[int]:
    """The same amount from every layer."""
    return [count(amount, n) for n in sizes]


def global_counts(scores: Sequence[Array], amount: Amount, pattern: Pattern) -> list[int]:
    """Weights that go from each layer if the lowest cells of all go."""
    total = count(amount, sum(s.size for s in scores))
    cells = [pattern.cells(s).ravel() for s in scores]
    sizes = np.concatenate([np.full(len(c), pattern.size(s.shape)) for c, s in zip(cells, scores, strict=True)])
    owner = np.concatenate([np.full(len(c), i) for i, c in enumerate(cells)])
    order = np.argsort(np.concatenate(cells), kind="stable")
    gone = order[np.cumsum(sizes[order]) <= total]
    return [int(sizes[gone[owner[gone] == i]].sum()) for i in range(len(scores))]


def erk_counts(shapes: Sequence[tuple[int, ...]], amount: Amount) -> list[int]:
    """Erdős-Rényi kernel densities: a layer keeps the more, the fewer weights it has for its width.

    The density is in proportion to ``sum(shape) / prod(shape)`` (Evci et al. 2020, arXiv:1911.11134), at most 1.
    """
    sizes = np.array([np.prod(s, dtype=int) for s in shapes])
    raw = np.array([sum(s) for s in shapes]) / sizes
    total = count(amount, int(sizes.sum()))
    dense = np.zeros(len(sizes), bool)
    while True:
        remaining = sizes.sum() - total - sizes[dense].sum()
        weight = (raw * sizes)[~dense].sum()
        density = np.where(dense, 1.0, raw * (remaining / weight if weight else 0.0))
        if not (density > 1).any():
            break
        dense |= density > 1
    counts = np.round((1 - density) * sizes).astype(int)
    for i in np.argsort(-sizes):  # what rounding left over goes to the largest layers
        room = total - counts.sum()
        counts[i] += np.clip(room, -counts[i], sizes[i] - counts[i])
    return [int(c) for c in counts]


def allocate(curves: Sequence[tuple[Sequence[int], Sequence[float]]], total: int) -> list[int]:
    """Weights that go from each layer so that the sum of the layers' errors is least.

    Parameters
    ----------
    curves : per layer, ascending numbers of weights that go (the first 0) and the measured error at each. Between
        them the lower convex hull is taken, on which the greedy choice is the best.
    total : weights that go in all.
    """
    pieces = []
    for layer, (numbers, errors) in enumerate(curves):
        hull: list[int] = []
        for k in range(len(numbers)):
            while len(hull) > 1 and _slope(numbers, errors, hull[-2], hull[-1]) >= _slope(numbers, errors, hull[-1], k):
                hull.pop()
            hull.append(k)
        for a, b in pairwise(hull):
            pieces.append((_slope(numbers, errors, a, b), layer, numbers[b] - numbers[a]))
    counts = [0] * len(curves)
    for _, layer, size in sorted(pieces):
        taken = min(size, total)
        counts[layer] += taken
        total -= taken
    return counts


def _slope(numbers: Sequence[int], errors: Sequence[float], a: int, b: int) -> float:
    return (errors[b] - errors[a]) / (numbers[b] - numbers[a])
