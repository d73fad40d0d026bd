"""Training of shared weights: which share a value stays fixed, the values are learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from slimline.frameworks.base import Array, Batch, Trainer
from slimline.methods.adam import Adam
from slimline.steps.weight_sharing.share import chosen, codes
from slimline.steps.weight_sharing.step import WeightSharing
from slimline.training.companions import Companion, Company

if TYPE_CHECKING:
    from slimline.model import Model

_PREFIX = "sharing/"


def learned_centroids(step: WeightSharing, student: Model) -> Company:
    """The company of a training of `student`, whose weights share values."""
    tensors, _ = chosen(student, step)
    stored = student.parameters()
    groups = codes(stored, tensors, step)
    return Company((step,), lambda updates: LearnedCentroids(groups, {name: stored[name] for name in groups}))


class LearnedCentroids(Companion):
    """After every optimiser step shared weights are put where Adam moves their values, by the sum of the gradients of
    all weights that share one (Han et al. 2016); zeros stay zero.

    Parameters
    ----------
    groups : by weight name, of the weight's shape: the number of the value; -1 for zeros.
    weights : by name, as they are before training.
    """

    def __init__(self, groups: Mapping[str, Array], weights: Mapping[str, Array]) -> None:
        self.groups = {name: numbers.ravel() + 1 for name, numbers in groups.items()}  # 0 are the zeros
        self.shapes = {name: weight.shape for name, weight in weights.items()}
        self.values: dict[str, Array] = {}
        for name, numbers in self.groups.items():
            self.values[name] = np.zeros(int(numbers.max()) + 1)
            self.values[name][numbers] = weights[name].ravel()
        self.optimizers = {name: Adam(values.shape) for name, values in self.values.items()}

    def after(self, trainer: Trainer, rate: float, batch: Batch) -> None:
        """Move the values, and put them into the network."""
        slopes = trainer.slopes()
        for name, numbers in self.groups.items():
            gradient = np.bincount(numbers, slopes[name].ravel(), len(self.values[name]))
            gradient[0] = 0
            self.values[name] = self.values[name] - self.optimizers[name].step(gradient, rate)
        shared = {name: values[self.groups[name]].astype(np.float32) for name, values in self.values.items()}
        trainer.set_weights({name: weight.reshape(self.shapes[name]) for name, weight in shared.items()})

    def state(self) -> dict[str, Array]:
        """Values, and what the optimiser remembers of them."""
        state = {f"{_PREFIX}{name}/values": values for name, values in self.values.items()}
        for name, optimizer in self.optimizers.items():
            state |= {f"{_PREFIX}{name}/{part}": array for part, array in optimizer.state().items()}
        return state

    def restore(self, state: Mapping[str, Array], trainer: Trainer) -> None:
        """Continue from `state`."""
        for name, optimizer in self.optimizers.items():
            self.values[name] = state[f"{_PREFIX}{name}/values"]
            optimizer.restore({part: state[f"{_PREFIX}{name}/{part}"] for part in optimizer.state()})
