"""Weights that go while a network trains."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from slimline.frameworks.base import Array, Batch, Trainer
from slimline.steps.sparse.masker import Masker
from slimline.steps.sparse.prune import chosen
from slimline.steps.sparse.step import SparsePruning
from slimline.training.companions import Companion, Company, Masks

if TYPE_CHECKING:
    from slimline.model import Model

log = logging.getLogger(__name__)


def gradual(step: SparsePruning, student: Model, seed: int = 0) -> Company:
    """The pruning of `step` beside a training of `student`."""

    def begin(updates: int) -> GradualPruning:
        layers, refused = chosen(student, step)
        for entry in refused:
            log.warning("%(what)s is not pruned: %(reason)s.", entry)
        shapes = {name: student.graph.values[name].shape for name in layers}
        return GradualPruning(Masker(step, layers, shapes, updates, seed, student.masks), student.masks)

    return Company((step,), begin)


class GradualPruning(Companion):
    """Prunes as a `Masker` says; `old` are the masks that the model has already."""

    def __init__(self, masker: Masker, old: Masks) -> None:
        self.masker, self.old = masker, old

    @property
    def masks(self) -> Masks:
        """The old ones too."""
        return {**self.old, **self.masker.masks}

    def after(self, trainer: Trainer, rate: float, batch: Batch) -> None:
        """Hold the new masks, where the step was one that changes them."""
        if self.masker.advance(trainer.weights, partial(trainer.gradients, batch)):
            trainer.hold(self.masks)

    def record(self) -> dict[str, Any]:
        """The part that is masked, and whether the amount is reached."""
        return {"sparsity": round(self.masker.sparsity, 6), "pruned": self.masker.complete}

    def state(self) -> dict[str, Array]:
        """Masks and schedule."""
        return self.masker.state()

    def restore(self, state: Mapping[str, Array], trainer: Trainer) -> None:
        """Continue from `state`."""
        self.masker.restore(state)
        trainer.hold(self.masks)
