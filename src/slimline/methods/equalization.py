"""Quantization without data: channels of like range, and what rounding does to means (Nagel et al. 2019,
arXiv:1906.04721)."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import norm

Array = np.ndarray[Any, np.dtype[Any]]


def equal_scales(first: Array, second: Array) -> Array:
    """By which each channel is divided where it is made and multiplied where it is read, so that the largest weight is
    the same on both sides: ``(channels,)``, 1 where either side is zero.

    Parameters
    ----------
    first, second : ``(channels,)``, the largest absolute weight that makes a channel, and that reads it.
    """
    sound = (first > 0) & (second > 0)
    return np.sqrt(np.divide(first, second, out=np.ones_like(first), where=sound))


def clipped_normal_mean(mean: Array, deviation: Array, low: float, high: float) -> Array:
    """Of normal numbers that are clipped to ``[low, high]``, of the shape of `mean`; the ends may be infinite."""
    mean, deviation = np.asarray(mean, np.float64), np.maximum(np.asarray(deviation, np.float64), 1e-30)
    a, b = (low - mean) / deviation, (high - mean) / deviation
    below, above = norm.cdf(a), norm.sf(b)
    inside = mean * (1 - below - above) - deviation * (norm.pdf(b) - norm.pdf(a))
    ends = (low * below if np.isfinite(low) else 0.0) + (high * above if np.isfinite(high) else 0.0)
    return np.asarray(inside + ends)
