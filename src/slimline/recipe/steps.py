"""The steps of a recipe: frozen, validated configurations that round-trip through YAML, each family in its own file."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from slimline.steps.activations.step import ActivationPruning
from slimline.steps.channels.step import ChannelPruning
from slimline.steps.depth.step import DepthPruning
from slimline.steps.quantization.step import StaticQuantization
from slimline.steps.sparse.step import SparsePruning
from slimline.recipe.step import Step
from slimline.recipe.training import Distillation, SparseTraining

AnyStep = Annotated[
    ActivationPruning
    | ChannelPruning
    | DepthPruning
    | Distillation
    | SparsePruning
    | SparseTraining
    | StaticQuantization,
    Field(discriminator="step"),
]

STEPS: dict[str, type[Step]] = {
    c.__name__: c
    for c in (
        ActivationPruning,
        ChannelPruning,
        DepthPruning,
        Distillation,
        SparsePruning,
        SparseTraining,
        StaticQuantization,
    )
}
