"""Upper confidence bounds on the mean of bounded samples, by betting: valid for every distribution on the range.

A gambler bets against "the mean is at least m", on one sample after the other: with the stake decided before a sample
is seen, the capital is a martingale if m is the mean, so it reaches 1/risk with probability at most the risk (Ville).
The m against which it does are ruled out. Waudby-Smith and Ramdas, "Estimating means of bounded random variables by
betting", JRSS B 86 (2024): their one-sided fixed-n bets, sized by the variance of the samples seen so far.

The capital depends on the order of the samples. It is averaged over orders that are drawn once and for all, the same
for everyone, which stays valid as each has a mean of at most one, and leaves nobody a seed to choose.
"""

from __future__ import annotations

import math

import numpy as np

_ORDERS = 16
_BOLDEST = 0.75
"""The largest part of the capital at stake, reached where samples hardly vary."""
_TOLERANCE = 1e-6
"""How far outside the range a sample may be, in parts of it, by rounding."""


def fits(samples: np.ndarray, low: float, high: float) -> bool:
    """Whether all samples are in the range, up to rounding."""
    slack = _TOLERANCE * (high - low)
    return bool(len(samples)) and bool(samples.min() >= low - slack and samples.max() <= high + slack)


def upper(samples: np.ndarray, low: float, high: float, confidence: float) -> float:
    """A number that is below the mean of what `samples` ``(n,)`` are drawn from with probability at most the risk.

    Parameters
    ----------
    samples : independent, or exchangeable in blocks that are given as their means; each in ``[low, high]``.
    confidence : one less the risk.
    """
    game = _Game(np.clip((samples - low) / (high - low), 0.0, 1.0), confidence)
    inside, outside = float(game.samples.mean()), 1.0
    if not game.won(1.0):
        return high
    while outside - inside > 1e-9:
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if game.won(middle) else (middle, outside)
    return low + (high - low) * outside


class _Game:
    """The orders of the samples, in [0, 1], and the stake before each. The capital grows with the mean bet against."""

    def __init__(self, samples: np.ndarray, confidence: float) -> None:
        self.samples = samples
        n = len(samples)
        self.goal = math.log(1 / (1 - confidence))
        rng = np.random.default_rng(0)
        orders = max(2, min(_ORDERS, 2**22 // n))
        self.rounds = [samples[rng.permutation(n)] for _ in range(orders)]
        self.stakes = [self._stakes(x) for x in self.rounds]

    def _stakes(self, x: np.ndarray) -> np.ndarray:
        """For each sample how much is bet, from those before it."""
        n = len(x)
        seen = np.arange(1, n + 1)
        means = (0.5 + np.cumsum(x)) / (seen + 1)
        variances = (0.25 + np.cumsum((x - means) ** 2)) / (seen + 1)
        before = np.concatenate([[0.25], variances[:-1]])
        return np.asarray(np.sqrt(2 * self.goal / (n * before)))

    def won(self, mean: float) -> bool:
        """Whether the capital, averaged over the orders, reaches one over the risk against this mean."""
        most = _BOLDEST / (1 - mean) if mean < 1.0 else math.inf
        logs = [
            float(np.log1p(np.minimum(stake, most) * (mean - x)).sum())
            for x, stake in zip(self.rounds, self.stakes, strict=True)
        ]
        peak = max(logs)
        return peak + math.log(sum(math.exp(v - peak) for v in logs) / len(logs)) >= self.goal
