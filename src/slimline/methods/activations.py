"""Cheaper activations: thresholds under which one is taken for zero, from samples of its values, and functions that are
quicker than those that they stand in for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def _hardsigmoid(x: Array) -> Array:
    return np.asarray(np.clip(x / 6 + 0.5, 0, 1))


FUNCTIONS: Mapping[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "hardsigmoid": _hardsigmoid,
    "hardswish": lambda x: x * _hardsigmoid(x),
}
"""Made of comparisons, sums and products (Howard et al. 2019, arXiv:1905.02244)."""


def threshold_for_sparsity(values: Array, sparsity: float) -> float:
    """The least of the `values` such that at least the part `sparsity` of them is not above it; 0 at least.

    (FATReLU: Kurtz et al. 2020, PMLR 119.) `values` are flat and not negative, as after a ReLU.
    """
    need = int(np.ceil(sparsity * values.size - 1e-9))
    return 0.0 if need < 1 else max(0.0, float(np.partition(values, need - 1)[need - 1]))


def threshold_for_error(values: Array, error: float) -> float:
    """The largest of the `values` such that those not above it hold at most the part `error` of all squares; 0 at
    least."""
    ordered = np.sort(np.asarray(values, np.float64))
    lost = np.cumsum(np.square(ordered))
    # Of equal values all go or none: look at the last of each.
    last = np.append(ordered[1:] > ordered[:-1], True)
    legal = np.flatnonzero(last & (lost <= error * lost[-1]))
    return 0.0 if not len(legal) else max(0.0, float(ordered[legal[-1]]))


def sparsity(values: Array, threshold: float = 0.0) -> float:
    """The part of the values that is not above the threshold."""
    return float(np.mean(values <= threshold))


def l1(xp: Any, values: Any) -> Any:
    """Mean magnitude, a scalar of the namespace `xp` (Georgiadis 2019, arXiv:1812.01529)."""
    return xp.mean(xp.abs(values))


def hoyer_square(xp: Any, values: Any) -> Any:
    """``(Σ|a|)² / (n Σa²)``, a scalar of the namespace `xp`: the part of the values that is not zero, where those are
    equal, and else less; no scale changes it, and it has gradients (Kurtz et al. 2020, PMLR 119)."""
    return xp.mean(xp.abs(values)) ** 2 / (xp.mean(values**2) + 1e-12)
