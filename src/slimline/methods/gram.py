"""The Gram matrix of a layer's inputs, streamed: all that post-training methods need to know of the data."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
LEAST_LOADING = 1e-12  # of the diagonal of `H`, that it can be inverted


class Gram:
    """``H = XᵀX / n`` and the mean row, over rows seen a batch at a time.

    Parameters
    ----------
    groups, inputs : of the rows, ``(groups, rows, inputs)``.
    others : inputs of a second set of rows, seen pairwise with the first; None keeps the first alone.
    """

    def __init__(self, groups: int, inputs: int, others: int | None = None) -> None:
        self.count = 0
        self._second = np.zeros((groups, inputs, inputs))
        self._first = np.zeros((groups, inputs))
        self._cross = None if others is None else np.zeros((groups, others, inputs))
        self._others_first = np.zeros((groups, others or 0))
        self._others_square = np.zeros((groups, others or 0))

    def see(self, rows: Array, others: Array | None = None) -> None:
        """Add rows ``(groups, rows, inputs)``, and with them those of the second set."""
        self.count += rows.shape[1]
        x = np.ascontiguousarray(rows, np.float32)
        self._second += x.swapaxes(1, 2) @ x
        self._first += x.sum(axis=1, dtype=np.float64)
        if self._cross is not None and others is not None:
            y = np.ascontiguousarray(others, np.float32)
            self._cross += y.swapaxes(1, 2) @ x
            self._others_first += y.sum(axis=1, dtype=np.float64)
            self._others_square += np.square(y).sum(axis=1, dtype=np.float64)

    @property
    def second(self) -> Array:
        """``(groups, inputs, inputs)``: mean of the products of two inputs, `H`."""
        second: Array = self._second / max(self.count, 1)
        return second

    @property
    def mean(self) -> Array:
        """``(groups, inputs)``: mean of each input."""
        return self._first / max(self.count, 1)

    @property
    def covariance(self) -> Array:
        """``(groups, inputs, inputs)``: `H` of the inputs less their means, for which a bias makes up."""
        mean = self.mean
        covariance: Array = self.second - mean[:, :, None] * mean[:, None, :]
        return covariance

    @property
    def cross(self) -> Array:
        """``(groups, others, inputs)``: mean of the products of an input of the second set and one of the first."""
        if self._cross is None:
            raise ValueError("this Gram matrix was made for one set of rows")
        return self._cross / max(self.count, 1)

    @property
    def paired(self) -> bool:
        """Whether there is a second set of rows."""
        return self._cross is not None

    @property
    def others_mean(self) -> Array:
        """``(groups, others)``: mean of each input of the second set."""
        return self._others_first / max(self.count, 1)

    @property
    def others_energy(self) -> Array:
        """``(groups, others)``: mean square of each input of the second set."""
        return self._others_square / max(self.count, 1)

    @property
    def norm(self) -> Array:
        """``(groups, inputs)``: root mean square of each input."""
        norm: Array = np.sqrt(np.diagonal(self.second, axis1=1, axis2=2))
        return norm

    def divided(self, by: Array) -> Gram:
        """Of the same rows, each input divided by a number, ``(groups, inputs)``."""
        groups, inputs = by.shape
        other = Gram(groups, inputs)
        other.count = self.count
        other._second = self._second / (by[:, :, None] * by[:, None, :])
        other._first = self._first / by
        other._cross = None if self._cross is None else self._cross / by[:, None, :]
        other._others_first, other._others_square = self._others_first, self._others_square
        return other


def output_energy(weight: Array, second: Array) -> Array:
    """``(groups, outputs)``: the mean square of each output of a layer, ``diag(W H Wᵀ)``.

    Parameters
    ----------
    weight : ``(groups, outputs, inputs)``, or the difference of two weights: then it is the error of the outputs.
    second : ``(groups, inputs, inputs)``, `H`; a covariance gives the variance.
    """
    return np.asarray(np.einsum("goi,goi->go", weight @ second, weight))


def diagonal_loading(second: Array, part: float, least: float = LEAST_LOADING) -> Array:
    """``(…,)``: what is added to the diagonal of `H`, ``(…, inputs, inputs)``: a `part` of its mean, and at least so
    much that it can be inverted."""
    return np.asarray(np.maximum(part * np.diagonal(second, axis1=-2, axis2=-1).mean(axis=-1), least))


def loaded(second: Array, part: float) -> Array:
    """`H` with `diagonal_loading` on its diagonal."""
    return np.asarray(second + diagonal_loading(second, part)[..., None, None] * np.eye(second.shape[-1]))
