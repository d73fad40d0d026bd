"""Convolutions and linear layers that compute together what one computes.

Weights are ``(outputs, inputs / groups, *kernel)``, biases ``(outputs,)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def identity(channels: int, groups: int) -> Array:
    """``(channels, channels / groups)``: what passes every channel on."""
    return np.tile(np.eye(channels // groups), (groups, 1))


def placed(weight: Array, offsets: Sequence[int], kernel: Sequence[int]) -> Array:
    """A kernel within a larger one that is zero around it (Ding et al. 2021, arXiv:2101.03697)."""
    whole = np.zeros((*weight.shape[:2], *kernel))
    within = tuple(slice(offset, offset + n) for offset, n in zip(offsets, weight.shape[2:], strict=True))
    whole[:, :, *within] = weight
    return whole


def chained(first: Array, constant: Array, second: Array, bias: Array) -> tuple[Array, Array]:
    """Weight and bias of a layer and the one behind it, one of which looks at every position alone.

    Parameters
    ----------
    first, constant : weight and bias of the layer before.
    second, bias : of the one behind; a `constant` counts at all positions of its kernel.
    """
    hidden = len(first)
    one, two = first.reshape(hidden, first.shape[1], -1), second.reshape(len(second), hidden, -1)
    weight = np.einsum("omk,mil->oikl", two, one)
    kernel = first.shape[2:] if one.shape[2] > 1 else second.shape[2:]
    return weight.reshape(len(second), first.shape[1], *kernel), bias + two.sum(2) @ constant
