"""Proximal steps on arrays: what a penalty does to weights after an optimiser step, in closed form.

``prox(v) = argmin_w ½ ‖w − v‖² + t·penalty(w)`` for a step of size `t`, which is the learning rate times the penalty's
strength (Parikh and Boyd 2014, Proximal Algorithms). Unlike a gradient of the penalty it reaches exact zeros, and an
adaptive optimiser does not rescale it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def soft_threshold(values: Array, amount: float) -> Array:
    """Prox of ``amount · ‖w‖₁``: every value is moved towards zero by `amount`, at most to zero; same shape, dtype."""
    return np.asarray(np.sign(values) * np.maximum(np.abs(values) - amount, 0), values.dtype)


def ridge_factor(amount: float | Array) -> Any:
    """Prox of ``amount / 2 · ‖w‖²``: the factor by which the weights shrink."""
    return 1 / (1 + np.asarray(amount, np.float64))


def group_factors(squares: Array, amounts: Array) -> Array:
    """Prox of ``Σ amounts[g] · ‖w_g‖``: by group the factor by which its weights shrink, 0 where all of it goes.

    Parameters
    ----------
    squares : ``(groups,)``, the sum of squares of each group.
    amounts : ``(groups,)``; Yuan and Lin (2006) weigh each group by the root of its size, see `adaptive_weights` too.
    """
    norms = np.sqrt(np.asarray(squares, np.float64))
    return np.asarray(np.maximum(0.0, 1 - np.divide(amounts, norms, out=np.full(norms.shape, np.inf), where=norms > 0)))


def adaptive_weights(squares: Array, sizes: Array, units: Array) -> Array:
    """By group how strongly it is to be penalised: from 1 for the smallest of its unit to 1/16 for the largest.

    ``2^(-4 (r - min r) / (max r - min r))`` with `r` the group's root mean square (Fang et al. 2023, arXiv:2301.12900,
    divided by its largest value): large groups are left to the loss, so that not all shrink alike.

    Parameters
    ----------
    squares, sizes : ``(groups,)``, the sum of squares and the number of weights of each group.
    units : ``(groups,)``, the number of its unit, from 0.
    """
    roots = np.sqrt(np.asarray(squares, np.float64) / sizes)
    low, high = np.full(units.max() + 1, np.inf), np.zeros(units.max() + 1)
    np.minimum.at(low, units, roots)
    np.maximum.at(high, units, roots)
    span = (high - low)[units]
    return np.asarray(2.0 ** (-4 * np.divide(roots - low[units], span, out=np.zeros_like(roots), where=span > 0)))
