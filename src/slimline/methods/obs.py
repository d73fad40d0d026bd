"""Second-order pruning without training: which weights to remove, and how those that stay make up for them.

Removing weights of a row `w` of a layer costs the output error ``(w - ŵ)ᵀ H (w - ŵ)``. The optimal brain surgeon
(Hassibi and Stork 1993) removes one weight at a time and updates the others in closed form; here `H` is the Gram
matrix of the layer's inputs, so rows are independent (Frantar and Alistarh 2022, arXiv:2208.11580). All functions
work on one group: `weight` ``(outputs, inputs)`` and `h` ``(inputs, inputs)``, positive definite (see `damped`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import linalg

from slimline.methods.gram import diagonal_loading

Array = np.ndarray[Any, np.dtype[Any]]

BLOCK = 64  # eliminations between two products of matrices


def damped(h: Array, damping: float) -> Array:
    """`h` plus `damping` times the mean of its diagonal on the diagonal (1 where all inputs are zero)."""
    return np.asarray(h + (float(diagonal_loading(h, damping, 0.0)) or 1.0) * np.eye(len(h)))


def inverse(h: Array) -> Array:
    """Of a positive definite matrix, symmetric."""
    result: Array = linalg.cho_solve(linalg.cho_factor(h), np.eye(len(h)))
    return (result + result.T) / 2


def saliency(weight: Array, h: Array, inputs: int = 1) -> Array:
    """What removing each run of `inputs` neighbouring inputs of a row costs, ``(outputs, runs)``.

    ``w_Bᵀ ([H⁻¹]_BB)⁻¹ w_B``, the others updated; exact for the removal of one run.
    """
    outputs, n = weight.shape
    runs = np.arange(n).reshape(-1, inputs)
    blocks = inverse(h)[runs[:, :, None], runs[:, None, :]]
    w = weight.reshape(outputs, -1, inputs)
    costs: Array = np.einsum("orb,rbc,orc->or", w, np.linalg.inv(blocks), w, optimize=True)
    return costs


def traces(weight: Array, h: Array, most: int | None = None, group: tuple[int, int] | None = None) -> Array:
    """What each weight costs at its turn, when rows are emptied one weight at a time: exact OBS at all sparsities.

    Each row is a pivoted Cholesky factorisation of ``H⁻¹`` whose next pivot is the weight that costs the least. The
    costs are made monotone along a row (the largest so far), so that the lowest costs of all rows together are the
    greedy choice over rows, whatever their number.

    Parameters
    ----------
    most : weights that go from a row at most; all by default.
    group : N and M, to leave N of every M neighbouring inputs.

    Returns
    -------
    ``(outputs, inputs)``; infinite where a weight never goes.
    """
    outputs, n = weight.shape
    limit = n if most is None else most
    if group is not None:
        limit = min(limit, n // group[1] * (group[1] - group[0]))
    start = inverse(h)
    costs = np.full((outputs, n), np.inf)
    for row in range(outputs):
        _trace(np.array(weight[row], np.float64), start, limit, group, costs[row])
    return costs


def _trace(w: Array, inv: Array, limit: int, group: tuple[int, int] | None, costs: Array) -> None:
    """Empty one row and write the costs: the inverse is held as ``inv - Fᵀ F`` and shrunk to what is left."""
    remaining = np.arange(len(w))
    room = None if group is None else np.full(len(w) // group[1], group[1] - group[0])
    worst, gone = 0.0, 0
    while gone < limit:
        steps = min(BLOCK, limit - gone)
        factor = np.empty((steps, len(remaining)))
        diagonal = np.diagonal(inv).copy()
        free = np.ones(len(remaining), bool) if room is None or group is None else room[remaining // group[1]] > 0
        alive = np.ones(len(remaining), bool)
        for k in range(steps):
            cost = np.where(free, w * w / diagonal, np.inf)
            p = int(cost.argmin())
            worst = max(worst * (1 + 1e-9), float(cost[p]))  # the order of the turns stays that of the costs
            costs[remaining[p]] = worst
            column = inv[p] - factor[:k, p] @ factor[:k]
            pivot = column[p]
            factor[k] = column / np.sqrt(pivot)
            w -= w[p] / pivot * column
            diagonal -= factor[k] ** 2
            diagonal[p], w[p] = 1.0, 0.0
            free[p] = alive[p] = False
            if room is not None and group is not None:
                own = remaining[p] // group[1]
                room[own] -= 1
                if room[own] == 0:
                    free &= remaining // group[1] != own
        gone += steps
        stays = factor[:, alive]
        inv = inv[np.ix_(alive, alive)] - stays.T @ stays
        remaining, w = remaining[alive], w[alive]


def refit(weight: Array, keep: Array, h: Array, cross: Array | None = None, damping: float = 0.0) -> Array:
    """The weights at `keep` that give the outputs of `weight` best, zeros elsewhere: least squares, row by row.

    Parameters
    ----------
    keep : boolean, of the shape of `weight`.
    h : of the inputs that the new weights will see, damped.
    cross : mean product of an input that `weight` saw (rows) and one the new weights will see (columns); None where
        they are the same.
    damping : what `damped` added to the diagonal of `h`, with `cross`: pulls towards the old weights.
    """
    target = weight @ (h if cross is None else cross + damping * np.eye(len(h)))
    solution = np.zeros(weight.shape)
    for row, stays in enumerate(keep):
        at = np.flatnonzero(stays)
        if len(at):
            solution[row, at] = linalg.solve(h[np.ix_(at, at)], target[row, at], assume_a="pos")
    return solution


def blockwise(
    weight: Array, h: Array, gone: int, group: tuple[int, int] | None = None, block: int = 128
) -> tuple[Array, Array]:
    """OBS for wide layers: columns from left to right, errors passed on to the columns that follow.

    The Cholesky factor of ``H⁻¹`` holds the inverses of all trailing parts of `h`, so one factorisation serves all
    rows (SparseGPT, Frantar and Alistarh 2023, arXiv:2301.00774).

    Parameters
    ----------
    gone : weights that go, spread evenly over blocks of columns, free over the rows of a block.
    group : N and M instead of `gone`.
    block : columns in a block.

    Returns
    -------
    The new weights ``(outputs, inputs)``, and the mask.
    """
    outputs, n = weight.shape
    block = block if group is None else max(block // group[1], 1) * group[1]
    upper = linalg.cholesky(inverse(h), lower=False)
    w = np.array(weight, np.float64)
    keep = np.ones(weight.shape, bool)
    for start in range(0, n, block):
        stop = min(start + block, n)
        factor = upper[start:stop, start:stop]
        part, errors = w[:, start:stop], np.zeros((outputs, stop - start))
        stays = keep[:, start:stop]
        if group is None:
            number = round(gone * stop / n) - round(gone * start / n)
            cost = (part / np.diagonal(factor)) ** 2
            stays.flat[np.argsort(cost, axis=None, kind="stable")[:number]] = False
        for j in range(stop - start):
            if group is not None and (start + j) % group[1] == 0:
                _choose(part, stays, factor, j, *group)
            errors[:, j] = np.where(stays[:, j], 0.0, part[:, j]) / factor[j, j]
            part[:, j:] -= errors[:, j, None] * factor[j, j:]
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return np.where(keep, w, 0.0), keep


def _choose(part: Array, stays: Array, factor: Array, j: int, n: int, m: int) -> None:
    """Let the `m - n` cheapest of the next `m` columns go from each row."""
    cost = (part[:, j : j + m] / np.diagonal(factor)[j : j + m]) ** 2
    order = np.argsort(cost, axis=1, kind="stable")[:, : m - n]
    np.put_along_axis(stays[:, j : j + m], order, False, axis=1)
