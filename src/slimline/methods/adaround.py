"""AdaRound: each weight goes up or down, whichever makes the outputs err least together.

To nearest is not best: errors of weights that are read together can cancel. Which way each goes is relaxed to a number
between 0 and 1 (a rectified sigmoid), on which the output error ``(w - ŵ)ᵀ H (w - ŵ)`` is minimised by gradient while a
penalty drives it to one of the ends (Nagel et al. 2020, arXiv:2004.10568). The Gram matrix `H` of the inputs stands for
all samples, so that a step costs one product of matrices whatever their number. Behind it, single weights are turned
while that helps; so they are from the nearest numbers and from what GPTQ makes of the same two choices, and each output
takes the best of the three.
"""

from __future__ import annotations

import numpy as np

from slimline.methods.adam import Adam
from slimline.methods.formats import Array, IntegerGrid, spread
from slimline.methods.gptq import gptq, sweeps
from slimline.methods.gram import output_energy

STRETCH = 1.1, -0.1
"""Ends of the sigmoid before it is rectified."""
_STEPS, _RATE = 400, 0.05
_WARM = 0.2  # part of the steps without penalty
_BETA = 20.0, 2.0  # the penalty at first is flat but near the ends, at last everywhere steep
_PENALTY = 0.02  # against an output error in steps of the grid
_SWEEPS = 4
_FIRST = 0.3  # of the way to a code that another method chose
_DRIVE = 20.0  # of the penalty where the loss is known from a few samples at a time
PARTS = 0.01, 0.99
"""How near to its ends a weight may set out."""
GAIN = 1000.0
"""Of the logit of a weight's way between two codes over what a framework trains, so that the learning rate of a weight
crosses it."""


def adaround(
    weight: Array, h: Array, scale: Array, low: Array, high: Array, keep: Array | None = None, steps: int = _STEPS
) -> Array:
    """The rounded weights ``(outputs, inputs)``, float64: of every weight the multiple of its scale below or above it.

    Its error under `h` is no larger than that of rounding to nearest.

    Parameters
    ----------
    weight, scale : ``(outputs, inputs)``.
    h : ``(inputs, inputs)``, the Gram matrix of the inputs, positive definite.
    low, high : ``(outputs, inputs)``, the ends of the grid in steps.
    keep : boolean, of the shape of `weight`; what is False is zero and stays zero.
    steps : of gradient descent.
    """
    units = np.asarray(weight, np.float64) / scale
    down = np.clip(np.floor(units), low, high)
    up = np.clip(down + 1, low, high)
    if keep is not None:
        down, up = np.where(keep, down, 0.0), np.where(keep, up, 0.0)

    def nearer(value: Array, inputs: Array) -> Array:
        step = scale[:, inputs]
        return np.asarray(np.clip(np.rint(value / step), down[:, inputs], up[:, inputs]) * step)

    every = np.arange(weight.shape[1])
    starts = (
        nearer(np.asarray(weight, np.float64), every),
        np.where(_relaxed(units, h, scale, down, up, steps) > 0.5, up, down) * scale,
        gptq(weight, h, nearer),
    )
    candidates = np.stack([sweeps(weight, start, h, nearer, n=_SWEEPS) for start in starts])
    errors = output_energy(weight - candidates, np.broadcast_to(h, (len(starts), *h.shape)))
    return np.asarray(candidates[errors.argmin(axis=0), np.arange(len(weight))])


def exponent(progress: float) -> float | None:
    """Of the penalty ``1 - |2h - 1| ** exponent`` on a number `h` between 0 and 1, after that part of the steps; None
    while there is none."""
    behind = (min(progress, 1.0) - _WARM) / (1 - _WARM)
    return None if behind <= 0 else float(_BETA[1] + (_BETA[0] - _BETA[1]) * (1 + np.cos(behind * np.pi)) / 2)


def penalty(error: float, count: int) -> float:
    """What to multiply the penalty of each of `count` weights by, beside a loss that rounding raises by `error`.

    That is some whole steps of one weight, each of which costs twelve times its share, as rounding to nearest errs by a
    twelfth of a squared step.
    """
    return _DRIVE * 12 * error / max(count, 1)


def towards(each: IntegerGrid, weight: Array, rounded: Array) -> Array:
    """Weights between the same two codes, moved to the side of the one that is nearer to another rounding of them.

    Parameters
    ----------
    weight, rounded : of one shape and dtype; what is zero stays so.
    """
    scale, zero = (spread(x, each.blocks, weight.shape) for x in (each.scale, each.zero))
    units = weight / scale
    down = np.clip(np.floor(units), each.low - zero, each.high - zero)
    up = np.minimum(down + 1, each.high - zero)
    goal = np.clip(np.rint(rounded / scale), down, up) - down
    part = np.clip(units - down, *PARTS)
    part += _FIRST * (goal - part)
    part = np.where(goal > 0, np.maximum(part, 0.51), np.minimum(part, 0.49))
    return np.asarray(np.where((up > down) & (weight != 0), (down + part) * scale, weight), weight.dtype)


def _relaxed(units: Array, h: Array, scale: Array, down: Array, up: Array, steps: int) -> Array:
    """How far up each weight goes, between 0 and 1 and at the end next to one of them."""
    top, bottom = STRETCH
    free = up > down
    part = np.clip(units - down, *PARTS)
    logit = -np.log((top - bottom) / (part - bottom) - 1)
    adam = Adam(units.shape)
    # In steps of the grid and of the mean input, so that the penalty means the same in every layer.
    energy = max(float(np.diagonal(h).mean()), 1e-30) * np.square(scale).mean(axis=1, keepdims=True)
    for turn in range(steps):
        sigmoid = 1 / (1 + np.exp(-logit))
        soft = np.clip(sigmoid * (top - bottom) + bottom, 0.0, 1.0)
        error = (np.where(free, down + soft, down) - units) * scale
        slope = 2 * (error @ h) * scale / energy
        if (beta := exponent(turn / steps)) is not None:
            away = 2 * soft - 1
            slope -= _PENALTY * 2 * beta * np.sign(away) * np.abs(away) ** (beta - 1)
        inside = (soft > 0) & (soft < 1) & free
        logit -= adam.step(np.where(inside, slope * sigmoid * (1 - sigmoid) * (top - bottom), 0.0), _RATE)
    return np.asarray(np.clip((top - bottom) / (1 + np.exp(-logit)) + bottom, 0.0, 1.0))
