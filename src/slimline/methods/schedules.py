"""Schedules: the learning rate over the steps of a training, the pruned part over the rounds of a pruning."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np


def warmup_cosine(step: Any, total: int, warmup: float) -> Any:
    """Factor in [0, 1] of the learning rate: a linear rise, then a cosine to zero (arXiv:1608.03983, no restarts).

    Parameters
    ----------
    step : the optimiser step, from 0; an integer, or an array of them for an array of factors.
    total : number of steps; from there on the factor is 0.
    warmup : part of `total` in [0, 1) that rises; its last step has factor 1.
    """
    rise = round(warmup * total)
    step = np.asarray(step, dtype=np.float64)
    progress = np.clip((step - rise) / max(total - rise, 1), 0.0, 1.0)
    factor = np.where(step < rise, (step + 1) / max(rise, 1), 0.5 * (1 + np.cos(np.pi * progress)))
    return factor if factor.ndim else float(factor)


def ratios(schedule: Literal["oneshot", "uniform", "iterative"], rounds: int, target: float) -> list[float]:
    """The part pruned of the original after each round: ``rounds`` equal parts that end at exactly `target`.

    ``oneshot`` is a single round, whatever `rounds` says.
    """
    if schedule == "oneshot":
        return [target]
    return [target * done / rounds for done in range(1, rounds)] + [target]
