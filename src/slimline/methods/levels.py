"""Scales of levels: for any codebook the scale of least squared error, found exactly.

For weights `w` on levels `q` the best scale is ``s = w·q / q·q``, and what it leaves of ``w·w`` is less by
``(w·q)² / q·q``. Which level is nearest to ``w / s`` changes only where that crosses the middle between two levels, so
all assignments that can be best are met on the way from a large scale to a small one, by a sort and two running sums.
For two levels that is the mean magnitude of XNOR-Net (Rastegari et al. 2016, arXiv:1603.05279), for three the optimum
which ternary weight networks approximate by a threshold (Li et al. 2016, arXiv:1605.04711).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.methods.formats import Array, Blocks, Levels, spread

_SMALLEST = float(np.finfo(np.float32).tiny) * 2**23  # scale whose square and reciprocal are still sound in float32

FOUR = (-2.0, -1.0, 0.0, 1.0)
TTQ = "ttq"
"""Name of ternary levels of which the one below zero learns apart from the one above."""
NAMED = {
    "binary": Levels.binary(np.ones((), np.float32)),
    "ternary": Levels.ternary(np.ones((), np.float32)),
    TTQ: Levels.ternary(np.ones((), np.float32)),
    "pow2": Levels.powers_of_two(4, np.ones((), np.float32)),
}
"""Lists of levels that have a name."""
SKEWS = 2.0**-8, 2.0**8
"""Factors of the levels below zero, within which both sides still have numbers."""


def levels(dtype: str | tuple[float, ...]) -> Levels | None:
    """The levels of that name, or those of a list, with a scale of one; None for the name of anything else.

    Raises
    ------
    SlimlineError : a list that is no codebook, see `slimline.methods.formats.Levels`.
    """
    if isinstance(dtype, str):
        return NAMED.get(dtype)
    return Levels(np.ones((), np.float32), (), np.array(sorted(dtype), np.float32))


def skewed(each: Levels, factor: float) -> Levels:
    """The levels with those below zero multiplied by a positive factor, so that both sides have scales of their own."""
    book = each.codebook
    return replace(each, codebook=np.where(book < 0, book * np.float32(factor), book))


def fitted(weight: Array, unit: Levels, blocks: Blocks) -> Levels:
    """The levels of `unit` with the scale of least squared error in every block of `weight`.

    Raises
    ------
    SlimlineError : NaN or infinity.
    """
    if not np.isfinite(weight).all():
        raise SlimlineError("A weight holds NaN or infinity: mend the model before it is quantized.")
    counts = tuple(1 if b is None else -(-n // b) for n, b in zip(weight.shape, blocks, strict=False))
    number = np.arange(int(np.prod(counts, dtype=int))).reshape(counts)
    owners = np.broadcast_to(spread(number, blocks, weight.shape), weight.shape).ravel()
    order = np.argsort(owners, kind="stable")
    ends = np.cumsum(np.bincount(owners, minlength=number.size))[:-1]
    scales = [best_scale(part, unit.codebook) for part in np.split(weight.ravel()[order], ends)]
    return replace(unit, scale=np.array(scales, np.float32).reshape(counts), blocks=blocks)


def best_scale(weights: Array, codebook: Array) -> float:
    """The positive ``s`` of least ``Σ (w - s q)²``, where ``s q`` is the multiple of a level that is nearest to ``w``.

    Parameters
    ----------
    weights : any shape, finite.
    codebook : ``(n,)``, ascending.
    """
    w, book = np.asarray(weights, np.float64).ravel(), np.asarray(codebook, np.float64)
    bounds = (book[:-1] + book[1:]) / 2
    start = book[np.searchsorted(bounds, np.sign(w) * np.finfo(np.float64).tiny)]
    crossing, number = np.nonzero(w[:, None] * bounds > 0)
    own, bound = w[crossing], bounds[number]
    below, above = book[number], book[number + 1]
    before, after = np.where(own > 0, below, above), np.where(own > 0, above, below)
    order = np.argsort(-own / bound, kind="stable")
    products = np.sum(w * start) + np.concatenate([[0.0], np.cumsum((own * (after - before))[order])])
    squares = np.sum(start**2) + np.concatenate([[0.0], np.cumsum((after**2 - before**2)[order])])
    products = np.maximum(products, 0.0)
    gains = np.divide(products**2, squares, out=np.zeros_like(squares), where=squares > 1e-12)
    best = int(np.argmax(gains))
    if gains[best] <= 0:  # nothing but zeros, say: without a zero among the levels the nearest there is to it
        return 1.0 if 0 in book else _SMALLEST
    return max(float(products[best] / squares[best]), _SMALLEST)
