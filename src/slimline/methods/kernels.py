"""Smaller kernels: which positions of a convolution's kernel may stay together, and what leaving the others out costs.

What stays of a kernel must be a kernel again: along each dimension some positions at equal distances, which is a kernel
of fewer positions, dilated where the distance is more than one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimline.methods.gram import loaded

Array = np.ndarray[Any, np.dtype[Any]]
Window = tuple[tuple[int, int, int], ...]
"""Per dimension of a kernel the first position that stays, how many do, and their distance."""

GAP = 1e-6  # of the best sum of errors, by which a choice may miss it


def windows(kernel: Sequence[int], dilated: bool = True) -> list[Window]:
    """Every kernel within a kernel, the whole of it first; without `dilated` only of neighbours."""
    sides = []
    for size in kernel:
        side = [(0, size, 1)]
        for count in range(size - 1, 0, -1):
            most = (size - 1) // (count - 1) if count > 1 and dilated else 1
            for step in range(1, most + 1):
                side += [(first, count, step) for first in range(size - (count - 1) * step)]
        sides.append(side)
    return list(itertools.product(*sides))


def count(window: Window) -> int:
    """Positions that stay."""
    return math.prod(n for _, n, _ in window)


def along(window: Window) -> tuple[NDArray[np.int64], ...]:
    """Per dimension the positions that stay."""
    return tuple(first + step * np.arange(n) for first, n, step in window)


def mask(window: Window, kernel: Sequence[int]) -> NDArray[np.bool_]:
    """``(positions,)``, the last dimension of the kernel varying fastest: what stays."""
    retained = np.zeros(tuple(kernel), bool)
    retained[np.ix_(*along(window))] = True
    return retained.reshape(-1)


def lost(weight: Array, gram: Array, stay: NDArray[np.bool_], damping: float) -> float:
    """The part of a layer's output that is lost when only some inputs stay and their weights are solved anew.

    Parameters
    ----------
    weight : ``(groups, outputs, inputs)``.
    gram : ``(groups, inputs, inputs)``, `H`; the covariance where the bias may change.
    stay : ``(inputs,)``.
    damping : added to the diagonal of H, relative to its mean.
    """
    second = loaded(np.asarray(gram, np.float64), damping)
    cross = np.asarray(weight, np.float64) @ second
    energy = float((cross * weight).sum())
    retained = cross[:, :, stay]
    solved = np.linalg.solve(second[:, stay][:, :, stay], retained.swapaxes(1, 2))
    return max(1 - float((solved.swapaxes(1, 2) * retained).sum()) / max(energy, 1e-300), 0.0)


def cheapest(errors: Sequence[Array], costs: Sequence[Array], limit: float) -> list[int] | None:
    """One option for each layer, so that the costs add up to at most `limit` and the errors to as little as can be.

    Parameters
    ----------
    errors, costs : per layer ``(options,)``.

    Returns
    -------
    Per layer the number of its option; None where the cheapest options are too dear together.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # slow to import, and every graph imports this module

    if sum(float(c.min()) for c in costs) > limit:
        return None
    useful = [_useful(e, c) for e, c in zip(errors, costs, strict=True)]
    error = np.concatenate([e[i] for e, i in zip(errors, useful, strict=True)])
    cost = np.concatenate([c[i] for c, i in zip(costs, useful, strict=True)])
    owner = np.concatenate([np.full(len(i), layer) for layer, i in enumerate(useful)])
    one = (owner == np.arange(len(useful))[:, None]).astype(float)
    scale = max(float(cost.max()), 1.0)
    bounds = [LinearConstraint(one, 1, 1), LinearConstraint(cost[None] / scale, -np.inf, limit / scale)]
    whole = np.ones(len(error), np.int64)
    solution = milp(error, constraints=bounds, integrality=whole, bounds=Bounds(0, 1), options={"mip_rel_gap": GAP})
    assert solution.x is not None  # the cheapest options of all layers are within the limit
    picked = np.asarray(solution.x) > 0.5
    return [int(index[np.argmax(picked[owner == layer])]) for layer, index in enumerate(useful)]


def _useful(error: Array, cost: Array) -> NDArray[np.int64]:
    """Options that no other one beats in both."""
    order = np.lexsort((np.arange(len(error)), error, cost))
    lowest = np.minimum.accumulate(error[order])
    better = np.append(True, error[order][1:] < lowest[:-1])
    return np.asarray(order[better], np.int64)
