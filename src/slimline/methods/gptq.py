"""GPTQ: rounding one input after the other, the inputs that follow making up for the error so far.

Rounding a row `w` of a layer costs the output error ``(w - ŵ)ᵀ H (w - ŵ)``. When one weight is rounded, the best that
the others can do is known in closed form, and the Cholesky factor of ``H⁻¹`` holds it for all turns at once (Frantar
et al. 2022, arXiv:2210.17323). Inputs with the most energy come first, while most others can still make up for them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import linalg

from slimline.methods.formats import Array, IntegerGrid, Scaled
from slimline.methods.obs import BLOCK, inverse

Nearest = Callable[[Array, Array], Array]
"""The nearest numbers that the format of some inputs holds: of weights ``(outputs, n)`` and the inputs ``(n,)``."""


def nearest_of(each: Scaled, scale: Array, zero: Array) -> Nearest:
    """That of a format whose scales and zero points are given for every weight, both ``(outputs, inputs)``."""
    if isinstance(each, IntegerGrid):
        low, high = each.low, each.high

        def code(weight: Array, inputs: Array) -> Array:
            steps, offset = scale[:, inputs], zero[:, inputs]
            rounded: Array = (np.clip(np.rint(weight / steps) + offset, low, high) - offset) * steps
            return rounded

        return code
    unit = each.unscaled

    def number(weight: Array, inputs: Array) -> Array:
        steps = scale[:, inputs]
        return unit.round(weight / steps) * steps

    return number


def gptq(weight: Array, h: Array, nearest: Nearest, keep: Array | None = None, block: int = BLOCK) -> Array:
    """The rounded weights ``(outputs, inputs)``, float64.

    Parameters
    ----------
    weight : ``(outputs, inputs)``.
    h : ``(inputs, inputs)``, the Gram matrix of the inputs, positive definite (`slimline.methods.obs.damped`).
    keep : boolean, of the shape of `weight`; what is False is zero and stays zero.
    block : inputs between two products of matrices.
    """
    order = np.argsort(-np.diagonal(h), kind="stable")
    upper = linalg.cholesky(inverse(h[np.ix_(order, order)]), lower=False)
    w = np.array(weight.T[order], np.float64)  # an input's weights lie side by side
    rounded = np.empty_like(w)
    n = len(order)
    for start in range(0, n, block):
        stop = min(start + block, n)
        errors = np.empty((stop - start, w.shape[1]))
        for j in range(start, stop):
            value = nearest(w[j : j + 1].T, order[j : j + 1])[:, 0]
            rounded[j] = value if keep is None else np.where(keep[:, order[j]], value, 0.0)
            errors[j - start] = (w[j] - rounded[j]) / upper[j, j]
            w[j + 1 : stop] -= upper[j, j + 1 : stop, None] * errors[j - start]
        w[stop:] -= upper[start:stop, stop:].T @ errors
    result = np.empty(weight.shape)
    result[:, order] = rounded.T
    return result


def sweeps(
    weight: Array,
    rounded: Array,
    h: Array,
    nearest: Nearest,
    keep: Array | None = None,
    n: int = 2,
    block: int = BLOCK,
) -> Array:
    """Coordinate descent from `rounded`: each weight in turn takes the number of its format that is best while all
    others stay; the error under `h` never grows.

    Parameters
    ----------
    n : how often each weight has its turn.
    block : inputs between two products of matrices.
    """
    order = np.argsort(-np.diagonal(h), kind="stable")
    h = h[np.ix_(order, order)]
    current, w = (np.array(x.T[order], np.float64) for x in (rounded, weight))  # an input's weights lie side by side
    gradient = h @ (current - w)
    for _ in range(n):
        for start in range(0, len(order), block):
            stop = min(start + block, len(order))
            before, own = current[start:stop].copy(), gradient[start:stop].copy()
            for j in range(start, stop):
                at = slice(j, j + 1)
                value = nearest((current[at] - own[j - start] / h[j, j]).T, order[at])[:, 0]
                if keep is not None:
                    value = np.where(keep[:, order[j]], value, 0.0)
                own += h[start:stop, j, None] * (value - current[j])
                current[j] = value
            gradient += h[:, start:stop] @ (current[start:stop] - before)
    result = np.empty(weight.shape)
    result[:, order] = current.T
    return result
