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


def dense(weight: Array, groups: int) -> Array:
    """A grouped weight as one of all inputs, zero where a group does not look."""
    outputs, inputs = weight.shape[:2]
    if groups == 1:
        return weight
    whole = np.zeros((outputs, groups * inputs, *weight.shape[2:]))
    for group, rows in enumerate(np.split(np.arange(outputs), groups)):
        whole[rows, group * inputs : (group + 1) * inputs] = weight[rows]
    return whole


def chained(first: Array, constant: Array, second: Array, bias: Array) -> tuple[Array, Array]:
    """Weight and bias of a layer and the one behind it, of which in each dimension one looks at every position alone.

    Parameters
    ----------
    first, constant : weight and bias of the layer before.
    second, bias : of the one behind; a `constant` counts at all positions of its kernel.
    """
    outputs, hidden, inputs, rank = len(second), len(first), first.shape[1], first.ndim - 2
    one, two = first.reshape(hidden, inputs, -1), second.reshape(outputs, hidden, -1)
    weight = np.einsum("omk,mil->oikl", two, one).reshape(outputs, inputs, *second.shape[2:], *first.shape[2:])
    order = [2 + d + side * rank for d in range(rank) for side in (0, 1)]
    kernel = [n * k for n, k in zip(second.shape[2:], first.shape[2:], strict=True)]
    return weight.transpose(0, 1, *order).reshape(outputs, inputs, *kernel), bias + two.sum(2) @ constant
