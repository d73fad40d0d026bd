"""Sparse activations."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from slimline.basics.errors import SlimlineError
from slimline.recipe.layers import Globs
from slimline.recipe.step import Step


class ActivationPruning(Step):
    """Raise the threshold of every ReLU, so that more of its outputs are zero (FATReLU, Kurtz et al. 2020, PMLR 119).

    Attributes
    ----------
    sparsity : part of each ReLU's outputs that is to be zero, in (0, 1); one that has more keeps its threshold of 0.
    error : instead of `sparsity`, the part of each ReLU's sum of squares that may be cut off, in (0, 1).
    samples : calibration samples.
    layers, keep : globs of the ReLUs, or of the layers they belong to, to prune and to leave alone.
    """

    kind = "structural"
    step: Literal["ActivationPruning"] = "ActivationPruning"
    sparsity: Annotated[float, Field(gt=0, lt=1)] | None = None
    error: Annotated[float, Field(gt=0, lt=1)] | None = None
    samples: Annotated[int, Field(ge=1)] = 256
    layers: Globs = ("*",)
    keep: Globs = ()

    @property
    def needs(self) -> tuple[str, ...]:
        return ("calibration",)

    @model_validator(mode="after")
    def _one_goal(self) -> ActivationPruning:
        if (self.sparsity is None) == (self.error is None):
            raise SlimlineError("ActivationPruning takes either sparsity or error: give one of them.")
        return self
