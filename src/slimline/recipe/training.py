"""What steps that train share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from slimline.recipe.step import Step


class Training(Step):
    """What all steps that train share.

    Attributes
    ----------
    loss : ``kl`` between softened outputs, ``logit-standard`` the same with standardised logits
        (Sun et al. 2024, arXiv:2403.01427), ``mse`` between raw outputs. Outputs of quantities and of features are
        always compared by the squared error.
    temperature : of the softening.
    output_weights : of the losses of single outputs in their sum, by the outputs' names; 1 where none is given, 0
        leaves an output out.
    alpha : weight of the distance to the original's outputs; ``1 - alpha`` weighs the hard labels, where there are
        any.
    epochs, batch_size : of training.
    optimizer, learning_rate, weight_decay, momentum : ``adamw`` or ``sgd`` (Nesterov momentum).
    warmup : part of all optimiser steps in which the rate rises linearly; a cosine to zero follows.
    refresh_batches : batches over which batch-norm statistics are recomputed.
    precision : ``float32``, or ``bfloat16`` for forward and backward passes where the framework has it.
    """

    step: str
    loss: Literal["kl", "logit-standard", "mse"] = "kl"
    temperature: Annotated[float, Field(gt=0)] = 4.0
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.9
    epochs: Annotated[int, Field(ge=0)] = 5
    batch_size: Annotated[int, Field(ge=1)] = 128
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    refresh_batches: Annotated[int, Field(ge=0)] = 16
    precision: Literal["float32", "bfloat16"] = "float32"
    output_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("train", "selection")

    @property
    def needs_gradients(self) -> bool:
        return self.epochs > 0

    @property
    def stops_after(self) -> int | None:
        """Epochs without a better selection score before training stops early; None never stops."""
        return None
