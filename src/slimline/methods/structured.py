"""Structured pruning on arrays: how much each position of a unit matters, and which positions go."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

Scores = NDArray[np.float64]


def slice_scores(
    weight: NDArray[np.floating], dim: int, criterion: str, gradient: NDArray[np.floating] | None = None
) -> Scores:
    """Importance of every slice of `weight` along dimension `dim`, additive over the slices of a unit.

    ``l1``: sum of magnitudes; ``l2``: sum of squares (Li et al. 2017, arXiv:1608.08710); ``taylor``: sum of
    ``|weight * gradient|``, the first-order change of the loss (Molchanov et al. 2019, arXiv:1906.10771).
    Returns ``(weight.shape[dim],)`` float64.
    """
    other_axes = tuple(i for i in range(weight.ndim) if i != dim)
    w = np.asarray(weight, np.float64)
    if criterion == "l1":
        return np.asarray(np.abs(w).sum(axis=other_axes))
    if criterion == "l2":
        return np.asarray(np.square(w).sum(axis=other_axes))
    if criterion == "taylor":
        if gradient is None:
            raise ValueError("the taylor criterion needs gradients")
        return np.asarray(np.abs(w * gradient).sum(axis=other_axes))
    raise ValueError(f"unknown criterion {criterion!r}")


def slice_products(weight: NDArray[np.floating], gradient: NDArray[np.floating], dim: int) -> Scores:
    """``(weight.shape[dim],)``: the sum of ``weight * gradient`` over every slice, the derivative by a factor on it."""
    other_axes = tuple(i for i in range(weight.ndim) if i != dim)
    return np.asarray((np.asarray(weight, np.float64) * gradient).sum(axis=other_axes))


def obd_scores(weight: NDArray[np.floating], square: NDArray[np.floating], dim: int) -> Scores:
    """``(weight.shape[dim],)``: half the sum of ``weight² * square`` over every slice.

    With `square`, the mean squared gradient of single samples, in place of the Hessian's diagonal: what the loss gains
    to second order (LeCun et al. 1989, optimal brain damage).
    """
    other_axes = tuple(i for i in range(weight.ndim) if i != dim)
    return np.asarray(0.5 * (np.square(weight, dtype=np.float64) * square).sum(axis=other_axes))


def distances(rows: NDArray[np.floating]) -> Scores:
    """``(positions,)``: sum of the distances of each row of ``(positions, features)`` from all others.

    The lowest is nearest to the geometric median, so the others can best replace it (He et al. 2019, arXiv:1811.00250).
    """
    return np.asarray(cdist(rows, rows).sum(axis=1))


def mean_ranks(maps: NDArray[np.floating]) -> Scores:
    """``(channels,)``: mean rank of the feature maps ``(samples, channels, …)`` (Lin et al. 2020, arXiv:2002.10179).

    A map of more than two dimensions counts as the matrix of its last one and all others.
    """
    matrices = maps.reshape(*maps.shape[:2], -1, maps.shape[-1])
    return np.asarray(np.linalg.matrix_rank(matrices).mean(axis=0), np.float64)


def round_width(width: int, size: int, multiple: int) -> int:
    """The multiple of `multiple` nearest to `width` (up at a tie), at least one multiple and at most
    `size`; `width` itself, at least 1, where the unit is smaller than one multiple."""
    if size < multiple:
        return max(1, width)
    return min(size // multiple * multiple, max(multiple, int(width / multiple + 0.5) * multiple))


def around(width: float, size: int, multiple: int) -> tuple[int, int]:
    """The widths next below and above `width`, of at most `size`, that are multiples of `multiple` and of no larger
    power of two; twice `width` itself, rounded, where `size` is smaller than one multiple (a power of two)."""
    if size < multiple:
        return (max(1, round(width)),) * 2
    most = (size // multiple + 1) // 2 - 1
    below = min(max(0, math.floor((width / multiple - 1) / 2)), most)
    return multiple * (2 * below + 1), multiple * (2 * min(below + 1, most) + 1)


def smallest_good(costs: Mapping[int, float], tolerance: float) -> int:
    """The smallest key whose cost is within the part `tolerance` of the lowest."""
    best = min(costs.values())
    return min(key for key, cost in costs.items() if cost <= (1 + tolerance) * best)


def lowest(scores: Scores, count: int) -> tuple[int, ...]:
    """Positions of the `count` smallest scores, ascending; ties go to the later position."""
    order = np.lexsort((-np.arange(len(scores)), scores))
    return tuple(sorted(order[:count].tolist()))


def select_local(scores: Sequence[Scores], fixed: Sequence[int], ratio: float, multiple: int) -> list[tuple[int, ...]]:
    """The same part of every unit, lowest scores first.

    Parameters
    ----------
    scores : one array per unit.
    fixed : positions of the same axis that always stay, which count towards its width.
    ratio : part of each axis that goes.
    multiple : widths that remain are rounded to it.
    """
    chosen = []
    for s, f in zip(scores, fixed, strict=True):
        size = len(s) + f
        width = round_width(size - int(ratio * size + 1e-9), size, multiple)
        chosen.append(lowest(s, min(max(size - width, 0), len(s) - (f == 0))))
    return chosen


def select_global(
    scores: Sequence[Scores],
    fixed: Sequence[int],
    ratio: float,
    multiple: int,
    groups: Sequence[object] | None = None,
    relative: bool = True,
) -> list[tuple[int, ...]]:
    """The positions with the lowest scores over all units of a group.

    Parameters
    ----------
    groups : gives each unit the group it is ranked in (one for all by default); every group loses the part
        `ratio` of its positions.
    relative : divide scores by their unit's mean; False where scores of different units compare as they are.
    """
    label = list(groups) if groups is not None else [0] * len(scores)
    counts = [0] * len(scores)
    for group in dict.fromkeys(label):
        members = [i for i, g in enumerate(label) if g == group]
        ranked = np.concatenate(
            [scores[i] / (max(float(scores[i].mean()), 1e-300) if relative else 1) for i in members]
        )
        unit = np.concatenate([np.full(len(scores[i]), i) for i in members])
        total = sum(len(scores[i]) + fixed[i] for i in members)
        order = np.argsort(ranked, kind="stable")[: int(ratio * total + 1e-9)]
        for i in members:
            counts[i] = int((unit[order] == i).sum())
    chosen = []
    for s, f, count in zip(scores, fixed, counts, strict=True):
        size = len(s) + f
        width = round_width(size - count, size, multiple)
        chosen.append(lowest(s, min(max(size - width, 0), len(s) - (f == 0))))
    return chosen
