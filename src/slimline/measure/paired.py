"""One-sided upper confidence bounds on a paired drop: pure functions of counts and arrays.

Of `n` samples the original alone gets `losses` right and the compressed model alone gets `gains` right; the
drop is ``P(loss) - P(gain)``, estimated by ``(losses - gains) / n``. By symmetry a lower bound is the negative
of the upper bound with losses and gains exchanged. Counts may be fractional, which sizes a future sample.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import betaincinv

CountBound = Callable[[float, float, float, float], float]
"""Losses, gains, n and confidence to the upper bound."""


def tango(losses: float, gains: float, n: float, confidence: float) -> float:
    """Upper end of the score interval of Tango (Statistics in Medicine 17, 1998): asymptotic.

    It inverts the score test of ``drop = delta``: the statistic is the estimate's distance from `delta`
    in standard errors under the constrained maximum-likelihood estimate of the gain probability.
    """
    if losses == n:
        return 1.0

    def excess(delta: float) -> float:
        return float(tango_excess(losses, gains, n, confidence, delta))

    # The score is zero at the estimate, where the variance may be zero too (no discordance): start just above.
    start = (losses - gains) / n + 1e-12
    return float(brentq(excess, start, 1.0, xtol=1e-12))


def tango_excess(losses: Any, gains: Any, n: float, confidence: float, delta: float) -> Any:
    """By how much losses less gains exceed what `delta` would let be rejected; element-wise for arrays of counts."""
    z = NormalDist().inv_cdf(confidence)
    b = (2 * n - losses + gains) * delta - losses - gains
    c = -gains * delta * (1 - delta)
    gain_probability = (np.sqrt(np.maximum(0.0, b * b - 8 * n * c)) - b) / (4 * n)
    variance = n * (2 * gain_probability + delta * (1 - delta))
    return losses - gains - n * delta + z * np.sqrt(np.maximum(0.0, variance))


def clopper_pearson(losses: float, gains: float, n: float, confidence: float) -> float:
    """Exact and conservative: the upper bound of P(loss) less the lower bound of P(gain), at half the risk each.

    Clopper and Pearson (Biometrika 26, 1934), joined by Bonferroni's inequality, so it holds whatever the
    dependence of losses and gains.
    """
    risk = (1 - confidence) / 2
    upper = 1.0 if losses >= n else float(betaincinv(losses + 1, n - losses, 1 - risk))
    lower = 0.0 if gains <= 0 else float(betaincinv(gains, n - gains + 1, risk))
    return upper - lower


def bootstrap(drops: np.ndarray, confidence: float, seed: int, resamples: int = 9999) -> tuple[float, float]:
    """Lower and upper one-sided bounds on the mean of `drops` ``(n,)`` by the BCa bootstrap, seeded.

    Bias-corrected and accelerated percentiles of the resampled means (Efron, JASA 82, 1987). A bootstrap
    cannot see what is rarer than one sample in `n`; where all drops are equal both bounds are that drop.
    """
    n, mean = len(drops), float(drops.mean())
    centred = drops - mean
    spread = float((centred**2).sum())
    if spread <= n * (1e-12 * max(1.0, float(np.abs(drops).max()))) ** 2:
        return mean, mean
    rng = np.random.default_rng(seed)
    chunk = max(1, 4_000_000 // n)
    means = np.concatenate(
        [drops[rng.integers(0, n, (min(chunk, resamples - i), n))].mean(axis=1) for i in range(0, resamples, chunk)]
    )
    return bca(mean, means, centred, confidence)


def bca(estimate: float, resampled: np.ndarray, influences: np.ndarray, confidence: float) -> tuple[float, float]:
    """Lower and upper one-sided bounds: bias-corrected and accelerated percentiles of what was resampled.

    Parameters
    ----------
    estimate : on the samples themselves.
    resampled : the same on resamples, in any order.
    influences : of each sample, or of each of many parts of them, on the estimate, in any unit; their skewness
        accelerates.
    """
    if not len(resampled) or np.ptp(resampled) <= 1e-12 * max(1.0, abs(estimate)):
        return estimate, estimate
    normal = NormalDist()
    below = ((resampled < estimate).sum() + 0.5 * (resampled == estimate).sum() + 0.5) / (len(resampled) + 1)
    bias = normal.inv_cdf(float(below))
    spread = float((influences**2).sum())
    acceleration = float((influences**3).sum()) / (6 * spread**1.5) if spread else 0.0

    def level(z: float) -> float:
        stretch = 1 - acceleration * (bias + z)
        return normal.cdf(bias + (bias + z) / stretch) if stretch > 0 else float(z > 0)

    z = normal.inv_cdf(confidence)
    low, high = np.quantile(resampled, [level(-z), level(z)])
    return float(low), float(high)
