"""How much a residual block does, judged by what goes in and what comes out."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def block_influence(before: Array, after: Array) -> Array:
    """One less the cosine between a block's input and its output, per sample (Men et al. 2024, arXiv:2403.03853).

    Parameters
    ----------
    before, after : ``(samples, …)``, of one shape.

    Returns
    -------
    ``(samples,)`` in [0, 2]; 0 where the block changes nothing but the scale, and where either is all zero.
    """
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (before, after))
    product = np.sqrt(np.square(a).sum(1) * np.square(b).sum(1))
    cosine = np.divide((a * b).sum(1), product, out=np.ones(len(a)), where=product > 0)
    return np.asarray(1 - cosine)


def relative_error(reference: Array, outputs: Array) -> float:
    """``‖outputs − reference‖² / ‖reference‖²`` over all samples; infinite where `outputs` is not finite."""
    difference = np.square(np.asarray(outputs, np.float64) - reference).sum()
    if not np.isfinite(difference):
        return float("inf")
    return float(difference / max(np.square(np.asarray(reference, np.float64)).sum(), 1e-300))
