"""Least squares on a layer: the weight with which other inputs give the outputs that the old ones gave.

He et al. 2017 (arXiv:1707.06168) reconstruct a pruned layer's outputs so; with the inputs of the pruned network on one
side and the outputs of the dense one on the other, what earlier layers got wrong is made up for too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from slimline.methods.gram import diagonal_loading

Array = np.ndarray[Any, np.dtype[Any]]

RIDGE = 1e-3


def reconstruct(weight: Array, second: Array, cross: Array, ridge: float = RIDGE, constant: bool = False) -> Array:
    """The `V` that minimises ``mean ‖y − V x‖² + ridge · mean(x²) ‖V − weight‖²`` in every group.

    Parameters
    ----------
    weight : ``(groups, outputs, inputs)``, where the ridge pulls: what is right if nothing changed.
    second : ``(groups, inputs, inputs)``, mean of ``x xᵀ``.
    cross : ``(groups, outputs, inputs)``, mean of ``y xᵀ``.
    ridge : relative to the mean square of an input.
    constant : whether the last input is always 1 (its weight is a bias), which the ridge leaves alone.
    """
    groups, _, inputs = weight.shape
    free = inputs - int(constant)
    pull = np.zeros((groups, inputs))
    pull[:, :free] = diagonal_loading(second[:, :free, :free], ridge)[:, None]
    left = second + pull[:, :, None] * np.eye(inputs)
    right = cross + weight * pull[:, None, :]
    return np.asarray(np.linalg.solve(left, right.swapaxes(1, 2)).swapaxes(1, 2))
