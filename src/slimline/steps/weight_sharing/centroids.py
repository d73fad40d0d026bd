"""Training of shared weights: which share a value stays fixed, the values are learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from slimline.frameworks.base import Array, Batch, Trainer
from slimline.steps.weight_sharing.share import chosen, codes
from slimline.steps.weight_sharing.step import WeightSharing
from slimline.training.companions import Companion, Company

if TYPE_CHECKING:
    from slimline.model import Model


def learned_centroids(step: WeightSharing, student: Model) -> Company:
    """The company of a training of `student`, whose weights share values."""
    tensors, _ = chosen(student, step)
    groups = codes(student.parameters(), tensors, step.per)
    return Company((step,), lambda updates: LearnedCentroids(groups))


class LearnedCentroids(Companion):
    """After every optimiser step, weights that share a value get the mean of what became of them, and zeros zero.

    Parameters
    ----------
    groups : by weight name, of the weight's shape: the number of the value; -1 for zeros.
    """

    def __init__(self, groups: Mapping[str, Array]) -> None:
        self.groups = {name: numbers.ravel() + 1 for name, numbers in groups.items()}
        self.sizes = {name: np.maximum(np.bincount(numbers), 1) for name, numbers in self.groups.items()}

    def after(self, trainer: Trainer, rate: float, batch: Batch) -> None:
        """Put the means into the network."""
        weights = trainer.weights()
        shared = {}
        for name, numbers in self.groups.items():
            means = np.bincount(numbers, weights[name].ravel()) / self.sizes[name]
            means[0] = 0
            shared[name] = means[numbers].astype(weights[name].dtype).reshape(weights[name].shape)
        trainer.set_weights(shared)
