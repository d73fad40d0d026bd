"""What goes along with a training and changes the weights besides the optimiser. Knows no framework."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from slimline.frameworks.base import Array, Batch, Trainer
from slimline.recipe.step import Step

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


@dataclass(frozen=True)
class Company:
    """A `Companion` to be.

    Attributes
    ----------
    steps : whose it is: part of what makes two trainings the same.
    begin : makes it for a training of so many optimiser updates.
    """

    steps: tuple[Step, ...]
    begin: Callable[[int], Companion]
