"""Adam on an array, for the few parameters that are trained outside of a framework (arXiv:1412.6980)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

FIRST, SECOND, EPSILON = 0.9, 0.999, 1e-8


class Adam:
    """The moments of one array of parameters, float64."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.mean, self.square, self.count = np.zeros(shape), np.zeros(shape), 0

    def step(self, gradient: Array, rate: float) -> Array:
        """What to take from the parameters."""
        self.count += 1
        self.mean = FIRST * self.mean + (1 - FIRST) * gradient
        self.square = SECOND * self.square + (1 - SECOND) * gradient**2
        mean, square = self.mean / (1 - FIRST**self.count), self.square / (1 - SECOND**self.count)
        return np.asarray(rate * mean / (np.sqrt(square) + EPSILON))

    def state(self) -> dict[str, Array]:
        """All that the next step depends on."""
        return {"mean": self.mean, "square": self.square, "count": np.array(self.count)}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Continue from `state`."""
        self.mean, self.square, self.count = state["mean"], state["square"], int(state["count"])
