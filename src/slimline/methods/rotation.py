"""Rotations that spread what a few channels hold over all of them, so that none needs a wide grid."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.linalg import hadamard

Array = np.ndarray[Any, np.dtype[Any]]


def randomized_hadamard(width: int, seed: int = 0) -> Array:
    """An orthogonal matrix ``(width, width)``, float64: a Hadamard matrix with random signs (QuaRot, Ashkboos et al.
    2024, arXiv:2404.00456).

    Of a width that is no power of two the part that is one is a Hadamard matrix, the rest a random rotation.
    """
    rng = np.random.default_rng(seed)
    power = width & -width
    rest, _ = np.linalg.qr(rng.normal(size=(width // power, width // power)))
    signs = rng.choice([-1.0, 1.0], width)
    return np.asarray(np.kron(rest, hadamard(power) / np.sqrt(power)) * signs[:, None])
