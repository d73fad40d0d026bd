"""Recovery of a compressed model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from slimline.recipe.training import Training


class Distillation(Training):
    """Recovery: train the compressed model towards the original's outputs (Hinton et al. 2015, arXiv:1503.02531).

    Attributes
    ----------
    loss, temperature, alpha, epochs, batch_size, optimizer, learning_rate, weight_decay, momentum, warmup,
    refresh_batches, precision : see `Training`. Batch-norm statistics are recomputed before training.
    patience : epochs without a better selection score before training stops early; None never stops.
    """

    kind = "recovery"
    step: Literal["Distillation"] = "Distillation"
    patience: Annotated[int, Field(ge=1)] | None = None

    @property
    def stops_after(self) -> int | None:
        return self.patience
