"""The steps of a recipe: frozen, validated configurations that round-trip through YAML.

A step says what is wanted; `slimline.apply` does it. Layers are named by fnmatch globs on the user's
own names (``stages.*.conv1``).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from slimline.errors import SlimlineError
from slimline.recipe.config import Config

Ratio = Annotated[float, Field(ge=0, lt=1)]
Globs = tuple[str, ...]


class Step(Config):
    """What all steps share.

    Attributes
    ----------
    kind : decides what may follow what (`slimline.recipe.recipe.ORDER`).
    needs : the roles of the samples the step reads (`slimline.data.ROLES`).
    """

    kind: ClassVar[Literal["structural", "recovery", "quantization"]]

    @property
    def needs(self) -> tuple[str, ...]:
        return ()


class ChannelPruning(Step):
    """Remove whole channels, filters, heads or embedding positions for real (structured pruning).

    Attributes
    ----------
    ratio : part of every unit (or, with a wider `scope`, of all units together) that goes, in [0, 1).
    criterion : ``l1``, ``l2`` (Li et al. 2017, arXiv:1608.08710, summed over every parameter slice of the
        unit), ``taylor`` (first order, Molchanov et al. 2019, arXiv:1906.10771; needs data) or ``random``.
    scope : ``local`` ranks inside each unit; ``global`` ranks all units together, scores divided by
        their unit's mean; ``isomorphic`` ranks together the units of equal topology (Fang et al. 2024,
        arXiv:2407.04616).
    target_macs, target_parameters : instead of `ratio`, the part of the original's that may stay, in (0, 1].
    round_to : keep a multiple of this many positions of each unit that has at least as many.
    layers, keep : globs of the layers to prune (default all) and of those to leave alone.
    factors : of an axis that is a product, such as heads x head width or groups x group width, prune only
        the ``largest`` factor or ``all`` of them.
    schedule : ``oneshot``; ``uniform`` or ``iterative`` prune in `rounds` equal parts of the remaining
        gap, ``iterative`` with the recovery step that follows run after every round.
    rounds : number of rounds of the last two.
    """

    kind = "structural"
    step: Literal["ChannelPruning"] = "ChannelPruning"
    ratio: Ratio | None = None
    criterion: Literal["l1", "l2", "taylor", "random"] = "l2"
    scope: Literal["local", "global", "isomorphic"] = "local"
    target_macs: Annotated[float, Field(gt=0, le=1)] | None = None
    target_parameters: Annotated[float, Field(gt=0, le=1)] | None = None
    round_to: Annotated[int, Field(ge=1)] = 1
    layers: Globs = ("*",)
    keep: Globs = ()
    factors: Literal["largest", "all"] = "largest"
    schedule: Literal["oneshot", "uniform", "iterative"] = "oneshot"
    rounds: Annotated[int, Field(ge=1)] = 1

    @property
    def needs(self) -> tuple[str, ...]:
        return ("calibration",) if self.criterion == "taylor" else ()

    @model_validator(mode="after")
    def _one_goal(self) -> ChannelPruning:
        given = [n for n in ("ratio", "target_macs", "target_parameters") if getattr(self, n) is not None]
        if len(given) != 1:
            said = " and ".join(given) or "none"
            raise SlimlineError(f"ChannelPruning takes one of ratio, target_macs and target_parameters, not {said}.")
        if self.schedule == "oneshot" and self.rounds != 1:
            raise SlimlineError(f"ChannelPruning in {self.rounds} rounds needs schedule: uniform or iterative.")
        return self


class Distillation(Step):
    """Recovery: train the compressed model towards the original's outputs (Hinton et al. 2015, arXiv:1503.02531).

    Attributes
    ----------
    loss : ``kl`` between softened outputs, ``logit-standard`` the same with standardised logits
        (Sun et al. 2024, arXiv:2403.01427), ``mse`` between raw outputs (for regression).
    temperature : of the softening.
    alpha : weight of the distillation loss; ``1 - alpha`` weighs the hard labels, where there are any.
    epochs, batch_size : of training.
    optimizer, learning_rate, weight_decay, momentum : ``adamw`` or ``sgd`` (Nesterov momentum).
    warmup : part of all optimiser steps in which the rate rises linearly; a cosine to zero follows.
    patience : epochs without a better selection score before training stops early; None never stops.
    refresh_batches : batches over which batch-norm statistics are recomputed before training.
    precision : ``float32``, or ``bfloat16`` for forward and backward passes where the framework has it.
    """

    kind = "recovery"
    step: Literal["Distillation"] = "Distillation"
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
    patience: Annotated[int, Field(ge=1)] | None = None
    refresh_batches: Annotated[int, Field(ge=0)] = 16
    precision: Literal["float32", "bfloat16"] = "float32"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("train", "selection")


class StaticQuantization(Step):
    """Post-training integer quantization with calibrated activation ranges.

    Attributes
    ----------
    weights : ``int8``, symmetric, per output channel.
    activations : ``uint8`` or ``int8``, affine, per tensor; None takes what the target runs fastest
        (``uint8`` on ONNX Runtime, ``int8`` on LiteRT).
    observer : ``minmax``, ``percentile`` or ``mse`` (the range of least squared rounding error).
    percentile : of the absolute tail that `percentile` keeps, in percent.
    samples, batch_size : calibration samples, and how many at a time.
    layers, keep : globs of the layers to quantize and of those to leave in float.
    undo : put back to float every layer whose quantization makes the artifact slower or breaks parity.
    """

    kind = "quantization"
    step: Literal["StaticQuantization"] = "StaticQuantization"
    weights: Literal["int8"] = "int8"
    activations: Literal["uint8", "int8"] | None = None
    observer: Literal["minmax", "percentile", "mse"] = "mse"
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    samples: Annotated[int, Field(ge=1)] = 512
    batch_size: Annotated[int, Field(ge=1)] = 64
    layers: Globs = ("*",)
    keep: Globs = ()
    undo: bool = True

    @property
    def needs(self) -> tuple[str, ...]:
        return ("calibration",)


AnyStep = Annotated[ChannelPruning | Distillation | StaticQuantization, Field(discriminator="step")]

STEPS: dict[str, type[Step]] = {c.__name__: c for c in (ChannelPruning, Distillation, StaticQuantization)}
