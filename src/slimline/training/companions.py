"""What goes along with a training and changes the weights besides the optimiser. Knows no framework."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from slimline.frameworks.base import Array, Batch, Trainer

if TYPE_CHECKING:
    from slimline.steps.sparse.masker import Masker

Masks = Mapping[str, Array]


class Companion:
    """Told of every optimiser step; this one does nothing.

    Attributes
    ----------
    masks : by weight name what stays, beside the masks that the model has already.
    refreshes : whether batch-norm statistics are to be computed anew after each epoch.
    """

    refreshes = False

    @property
    def masks(self) -> Masks:
        """Those that hold now."""
        return {}

    def start(self, trainer: Trainer) -> None:
        """Called once, before training."""

    def before(self, trainer: Trainer) -> None:
        """Called before an optimiser step."""

    def after(self, trainer: Trainer, rate: float, batch: Batch) -> None:
        """Called after an optimiser step on `batch` at learning rate `rate`."""

    def record(self) -> dict[str, Any]:
        """What an epoch's record says of it: ``pruned`` is False while an epoch is not worth keeping."""
        return {}

    def state(self) -> dict[str, Array]:
        """All that the next step depends on besides the trainer's own state."""
        return {}

    def restore(self, state: Mapping[str, Array], trainer: Trainer) -> None:
        """Continue from `state`."""


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
        return {"sparsity": round(self.masker.sparsity, 6), "pruned": self.masker.settled}

    def state(self) -> dict[str, Array]:
        """Masks and schedule."""
        return self.masker.state()

    def restore(self, state: Mapping[str, Array], trainer: Trainer) -> None:
        """Continue from `state`."""
        self.masker.restore(state)
        trainer.hold(self.masks)
