"""Schedules: the learning rate over the steps of a training, the pruned part over the rounds of a pruning."""

from __future__ import annotations

from collections.abc import Sequence
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


Rate = Literal["cosine", "linear", "constant", "one-cycle", "plateau"]


def rate(schedule: Rate, step: int, total: int, warmup: float) -> float:
    """Factor in [0, 1] of the learning rate at an optimiser step, from 0, of `total`.

    ``cosine`` : `warmup_cosine`. ``linear`` and ``constant`` : the same rise, then a line to zero, or 1 for ever.
    ``plateau`` : as ``constant``, to be multiplied by `plateau`. ``one-cycle`` : cosines from 1/25 to 1 in the part
    `warmup` of the steps, then to 4e-6 (Smith 2018, arXiv:1708.07120, as frameworks have it).
    """
    if schedule == "cosine":
        return float(warmup_cosine(step, total, warmup))
    if schedule == "one-cycle":
        top, last = warmup * total - 1, total - 1
        start, end, low, high = (0.0, top, 1 / 25, 1.0) if step <= top else (max(top, 0.0), last, 1.0, 1 / 25e4)
        progress = (step - start) / (end - start) if end > start else 1.0
        return float(high + (low - high) / 2 * (1 + np.cos(np.pi * min(progress, 1.0))))
    rise = round(warmup * total)
    if step < rise:
        return (step + 1) / rise
    return max(0.0, 1 - (step - rise) / max(total - rise, 1)) if schedule == "linear" else 1.0


def plateau(scores: Sequence[float], epochs: int, factor: float = 0.1) -> float:
    """What the learning rate is multiplied by after epochs of these scores, of which higher is better: by `factor`
    again whenever `epochs` in a row brought nothing better."""
    best, waited, scale = -np.inf, 0, 1.0
    for score in scores:
        waited = 0 if score > best else waited + 1
        best = max(best, score)
        if waited == epochs:
            waited, scale = 0, scale * factor
    return scale


def ratios(schedule: Literal["oneshot", "uniform", "iterative"], rounds: int, target: float) -> list[float]:
    """The part pruned of the original after each round: ``rounds`` equal parts that end at exactly `target`.

    ``oneshot`` is a single round, whatever `rounds` says.
    """
    if schedule == "oneshot":
        return [target]
    return [target * number / rounds for number in range(1, rounds)] + [target]


SparsitySchedule = Literal["constant", "polynomial", "exponential", "acdc"]


def sparsity(schedule: SparsitySchedule, progress: float, target: float, power: float = 3.0) -> float:
    """The part of the weights that is pruned at `progress` in [0, 1] of a schedule's time; `target` at its end.

    ``constant``: all at once. ``polynomial``: ``target (1 - (1 - t)^power)``, fast at first (Zhu and Gupta 2017,
    arXiv:1710.01878; cubic by default). ``exponential``: what stays decays exponentially, ``1 - (1 - target)^t``.
    ``acdc`` has its own time, see `dense_phase`.
    """
    t = min(max(progress, 0.0), 1.0)
    if schedule == "polynomial":
        return target * (1 - float((1 - t) ** power))
    if schedule == "exponential":
        return target if t == 1 else 1 - float((1 - target) ** t)
    return target


def dense_phase(step: int, begin: int, end: int, length: int) -> bool:
    """Whether alternating training is dense at a step (AC/DC, Peste et al. 2021, arXiv:2106.12379).

    Dense before `begin`; then phases of `length` steps, sparse and dense by turns; sparse from `end` on.
    """
    return step < begin or (step < end and (step - begin) // length % 2 == 1)


def regrown(progress: float, part: float) -> float:
    """The part of the weights that stay which is exchanged, at `progress` in [0, 1]: a cosine from `part` to zero.

    Evci et al. 2020 (RigL), arXiv:1911.11134.
    """
    return float(part / 2 * (1 + np.cos(np.pi * min(max(progress, 0.0), 1.0))))
