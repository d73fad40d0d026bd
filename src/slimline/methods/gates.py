"""Hard-concrete gates: random variables in [0, 1] that are 0 or 1 with probability above 0, and yet have gradients.

Louizos, Welling and Kingma 2018, arXiv:1712.01312. A gate with the parameter ``a`` is
``z = clip(s (ζ − γ) + γ, 0, 1)`` with ``s = sigmoid((log u − log(1 − u) + a) / β)`` and `u` uniform in (0, 1). All
functions work on arrays of any one shape, float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import expit, logit

Array = np.ndarray[Any, np.dtype[Any]]

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
OPEN = 2.4
"""A parameter at which the gate is 1 when it is not random: the least is ``logit(11 / 12)``."""


def sampled(parameter: Array, uniform: Array) -> Array:
    """Gates in [0, 1] for numbers drawn uniformly from (0, 1)."""
    return np.asarray(np.clip(_stretched(_concrete(parameter, uniform)), 0, 1))


def slope(parameter: Array, uniform: Array) -> Array:
    """The derivative of `sampled` by the parameter; 0 where the gate is 0 or 1."""
    s = _concrete(parameter, uniform)
    z = _stretched(s)
    return np.where((z > 0) & (z < 1), (ZETA - GAMMA) * s * (1 - s) / BETA, 0.0)


def expected(parameter: Array) -> Array:
    """The gates used after training, which are not random."""
    return np.asarray(np.clip(_stretched(expit(parameter)), 0, 1))


def cdf(parameter: Array, z: Array | float) -> Array:
    """The probability that a gate is at most `z`, for z in [0, 1)."""
    return np.asarray(expit(BETA * logit((np.asarray(z, np.float64) - GAMMA) / (ZETA - GAMMA)) - parameter))


def open_probability(parameter: Array) -> Array:
    """The probability that a gate is not 0: what the L0 penalty counts in place of open gates."""
    return np.asarray(1 - cdf(parameter, 0.0))


def open_slope(parameter: Array) -> Array:
    """The derivative of `open_probability`."""
    p = open_probability(parameter)
    return np.asarray(p * (1 - p))


def _concrete(parameter: Array, uniform: Array) -> Array:
    return np.asarray(expit((logit(uniform) + parameter) / BETA))


def _stretched(s: Array) -> Array:
    return s * (ZETA - GAMMA) + GAMMA
