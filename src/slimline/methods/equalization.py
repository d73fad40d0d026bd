"""By what channels are divided before they are rounded, and what rounding does to means."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import ndtr

Array = np.ndarray[Any, np.dtype[Any]]


def equal_scales(first: Array, second: Array) -> Array:
    """By which each channel is divided where it is made and multiplied where it is read, so that the largest weight is
    the same on both sides: ``(channels,)``, 1 where either side is zero (Nagel et al. 2019, arXiv:1906.04721).

    Parameters
    ----------
    first, second : ``(channels,)``, the largest absolute weight that makes a channel, and that reads it.
    """
    sound = (first > 0) & (second > 0)
    return np.sqrt(np.divide(first, second, out=np.ones_like(first), where=sound))


def smoothing_scales(inputs: Array, weights: Array, strength: float) -> Array:
    """By which each channel is divided so that its largest number gets less and the weights that read it more:
    ``(channels,)``, 1 where either is zero (SmoothQuant, Xiao et al. 2022, arXiv:2211.10438).

    Parameters
    ----------
    inputs, weights : ``(channels,)``, the largest absolute number of a channel, and of the weights that read it.
    strength : 0 makes the weights of all channels alike, 1 the channels.
    """
    sound = (inputs > 0) & (weights > 0)
    inputs, weights = np.where(sound, inputs, 1.0), np.where(sound, weights, 1.0)
    return np.asarray(inputs**strength / weights ** (1 - strength))


def salience_scales(size: Array, exponent: float) -> Array:
    """By which each channel is divided so that the weights of large ones are rounded more finely: ``(channels,)``,
    around 1 (AWQ, Lin et al. 2023, arXiv:2306.00978).

    Parameters
    ----------
    size : ``(channels,)``, what a channel's numbers are like; where it is zero, the scale is 1.
    exponent : 0 leaves all alike, 1 makes all channels of one size.
    """
    sound = size > 0
    scales = np.where(sound, size, 1.0) ** exponent
    if sound.any():
        scales /= np.sqrt(scales[sound].max() * scales[sound].min())
    return np.asarray(np.where(sound, scales, 1.0))


def clipped_normal_mean(mean: Array, deviation: Array, low: float, high: float) -> Array:
    """Of normal numbers that are clipped to ``[low, high]``, of the shape of `mean`; the ends may be infinite (Nagel et
    al. 2019)."""
    mean, deviation = np.asarray(mean, np.float64), np.maximum(np.asarray(deviation, np.float64), 1e-30)
    a, b = (low - mean) / deviation, (high - mean) / deviation
    below, above = ndtr(a), ndtr(-b)
    inside = mean * (1 - below - above) - deviation * (_density(b) - _density(a))
    ends = (low * below if np.isfinite(low) else 0.0) + (high * above if np.isfinite(high) else 0.0)
    return np.asarray(inside + ends)


def _density(x: Array) -> Array:
    """Of standard normal numbers."""
    return np.asarray(np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi))
