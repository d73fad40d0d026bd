"""Unstructured pruning: which weights become zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BeforeValidator, Field, model_validator

from slimline.basics.errors import SlimlineError
from slimline.methods.schedules import ratios
from slimline.methods.sparsity import NEEDS_GRADIENT, NEEDS_GRAM, Pattern
from slimline.recipe.config import Config
from slimline.recipe.criterion import Named, one_of
from slimline.recipe.layers import Globs, LayerPattern
from slimline.recipe.packed import PackedMask
from slimline.recipe.step import Step

CRITERIA = ("random", "l1", "l2", "threshold", "taylor", "movement", "wanda", "obs")


def _packed(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {k: v if isinstance(v, PackedMask | Mapping) else PackedMask.of(v) for k, v in value.items()}


Masks = Annotated[dict[str, PackedMask] | str, BeforeValidator(_packed)]
When = Annotated[float, Field(ge=0, le=1)] | Annotated[int, Field(ge=0)]


class SparseOverride(Config):
    """What is another for some layers.

    Attributes
    ----------
    amount : what goes, as of `SparsePruning`.
    """

    amount: Annotated[float, Field(ge=0, le=1)] | Annotated[int, Field(ge=0)]


class SparsePruning(Step):
    """Set single weights, blocks or N of M neighbours to zero, and keep them there (unstructured pruning).

    Attributes
    ----------
    amount : what goes: a part in [0, 1] as a float, a number of weights as an int (of each row or layer, or of all
        layers together, as `scope` says). N:M patterns bring their own.
    pattern : ``element``, ``N:M`` (at most N of M neighbouring inputs stay, such as ``2:4``), ``AxB`` (blocks of A
        outputs x B inputs, such as ``1x4``), ``row`` (all inputs of an output). Inputs are channels x kernel.
    criterion : ``random``, ``l1``, ``l2`` (any ``ln``), ``threshold``, ``taylor``, ``movement``, ``wanda``, ``obs``, or
        a function ``(weight, gradient, gram) -> score`` of the matrices ``(groups, outputs, inputs)`` (`gradient` is
        None without labels, `gram` a `slimline.methods.gram.Gram` or None without data), in recipes written
        ``package.module:function``. The lowest scores go. See `slimline.methods.sparsity.score`.
    threshold : with that criterion, everything of smaller magnitude goes.
    scope : ``local``, the same from every layer; ``row``, the same from every output; ``global``, the lowest of all
        layers (for ``obs`` relative to the energy of the layer's output); ``erk``, Erdős-Rényi kernel densities;
        ``sensitivity``, so that the sum of the layers' measured relative output errors is least.
    layers, keep : globs of the layers to prune (default all) and of those to leave alone.
    overrides : by pattern of layers, their own ``{"amount": …}``; a layer takes that of the first pattern that it fits,
        and `scope` is about the layers of one amount.
    masks : instead of a criterion, your own: arrays by weight name (zero goes), or the path of a ``.safetensors``.
    compensate : let the weights that stay make up for those that go (least squares on calibration data); only ``obs``.
        Older recipes call it ``update``.
    sequential : with `compensate`, fit each layer to the inputs it gets once the layers before it are pruned.
    damping : with ``obs``, part of the mean of H's diagonal that is added to it.
    exact : with ``obs``, layers of more inputs are pruned block by block from left to right (SparseGPT).
    refresh : recompute batch-norm statistics on calibration data afterwards, where there is any.
    samples, batch_size : of calibration.
    loss : whose gradient ``taylor`` takes: ``cross_entropy`` with labels, or the ``norm`` of the outputs without.
    schedule : ``oneshot``; ``iterative``, `rounds` equal parts with the `Distillation` step that follows run after
        each; or while that step trains: ``constant`` (at `begin`), ``polynomial`` and ``exponential`` (growing from
        `begin` to `end`), ``acdc`` (sparse and dense phases by turns, sparse from `end` on).
    power : of ``polynomial``; 3 is the cubic of Zhu and Gupta.
    begin, end, frequency : of schedules that train: parts of the training as floats, optimiser steps as ints; None
        for `frequency` makes 50 updates (10 phases of ``acdc``).
    regrow : part of the weights that stay which is exchanged at each update for those of the largest gradient, falling
        to zero in a cosine (RigL); None does not.
    rounds : of ``iterative``.
    """

    kind = "sparse"
    step: Literal["SparsePruning"] = "SparsePruning"
    amount: Annotated[float, Field(ge=0, le=1)] | Annotated[int, Field(ge=0)] | None = None
    pattern: str = "element"
    criterion: Annotated[Named, one_of(CRITERIA, r"l[1-9]\d*")] = "l1"
    threshold: Annotated[float, Field(gt=0)] | None = None
    scope: Literal["local", "row", "global", "erk", "sensitivity"] = "local"
    layers: Globs = ("*",)
    keep: Globs = ()
    overrides: dict[LayerPattern, SparseOverride] = Field(default_factory=dict)
    masks: Masks | None = None
    compensate: bool = Field(default=False, validation_alias=AliasChoices("compensate", "update"))
    sequential: bool = True
    damping: Annotated[float, Field(gt=0)] = 1e-2
    exact: Annotated[int, Field(ge=0)] = 1280
    refresh: bool = True
    samples: Annotated[int, Field(ge=1)] = 512
    batch_size: Annotated[int, Field(ge=1)] = 64
    loss: Literal["cross_entropy", "norm"] = "cross_entropy"
    schedule: Literal["oneshot", "iterative", "constant", "polynomial", "exponential", "acdc"] = "oneshot"
    power: Annotated[float, Field(gt=0)] = 3.0
    begin: When = 0.0
    end: When = 0.75
    frequency: Annotated[int, Field(ge=1)] | None = None
    regrow: Annotated[float, Field(gt=0, lt=1)] | None = None
    rounds: Annotated[int, Field(ge=1)] = 1

    @property
    def trains(self) -> bool:
        """Whether weights go while the recovery that follows trains."""
        return self.schedule not in ("oneshot", "iterative")

    @property
    def amounts(self) -> list[float | int | None]:
        """What is gone after each round."""
        if self.schedule != "iterative" or self.amount is None:
            return [self.amount]
        return list(ratios("iterative", self.rounds, float(self.amount)))

    @property
    def gram(self) -> bool:
        """Whether the step cannot do without the layers' Gram matrices."""
        return self.masks is None and (self.criterion in NEEDS_GRAM or self.scope == "sensitivity")

    @property
    def gradient(self) -> bool:
        """Whether the step cannot do without gradients."""
        return self.masks is None and self.criterion in NEEDS_GRADIENT

    @property
    def needs_gradients(self) -> bool:
        return self.gradient

    @property
    def needs(self) -> tuple[str, ...]:
        return ("calibration",) if not self.trains and (self.gram or self.gradient) else ()

    def misplaced(self, earlier: Sequence[str], following: Step | None) -> str:
        """See `Step`."""
        if self.schedule != "oneshot" and (following is None or following.kind != "recovery"):
            return (
                f"SparsePruning with schedule: {self.schedule} prunes while the network trains: let a Distillation "
                "step follow, or use schedule: oneshot."
            )
        return ""

    @model_validator(mode="after")
    def _consistent(self) -> SparsePruning:
        pattern = Pattern.parse(self.pattern)
        problem = _goal(self, pattern) or _unfit(self, pattern)
        if problem:
            raise SlimlineError(f"SparsePruning {problem}.")
        return self


def _goal(step: SparsePruning, pattern: Pattern) -> str:
    """What is wrong with how much is asked for."""
    if step.masks is not None:
        if step.amount is not None or step.threshold is not None or step.schedule != "oneshot":
            return "with masks takes no amount, threshold or schedule: the masks say what goes"
    elif (step.criterion == "threshold") != (step.threshold is not None):
        return "takes a threshold with criterion='threshold' and only then: set both or none"
    elif step.threshold is not None:
        if step.amount is not None or step.schedule != "oneshot" or step.scope != "local" or pattern.group:
            return "by threshold takes no amount, scope, schedule or N:M: the value decides how many weights go"
    elif pattern.group is not None:
        n, m = pattern.group
        if step.schedule == "iterative":
            return f"with the pattern {step.pattern} has no rounds: use another schedule"
        if step.amount is not None and step.amount != 1 - n / m:
            return f"with the pattern {step.pattern} prunes {1 - n / m:g} of the weights, not {step.amount}: drop it"
    elif step.amount is None:
        return "needs an amount: give a part such as 0.5, or a number of weights"
    return ""


def _unfit(step: SparsePruning, pattern: Pattern) -> str:
    """Which settings do not go together."""
    if step.overrides and (step.amount is None or step.schedule != "oneshot" or pattern.group is not None):
        return "takes overrides only of an amount that goes at once: let steps of their own prune these layers"
    if step.compensate and step.criterion != "obs":
        return "compensates only with criterion='obs': set it or drop compensate"
    if pattern.group is not None and step.scope != "local":
        return f"with the pattern {step.pattern} prunes every layer alike: drop the scope"
    if step.scope == "row" and pattern.block != (1, 1) and (pattern.block is None or pattern.block[0] > 1):
        return f"cannot take the same from every output with the pattern {step.pattern}: use another scope"
    if isinstance(step.amount, int) and step.schedule != "oneshot":
        return "in several rounds needs the amount as a part, such as 0.5"
    if step.schedule == "oneshot" and (step.rounds != 1 or step.regrow is not None):
        return "at once has no rounds and no regrow: choose a schedule"
    if step.trains and (step.gram or step.compensate):
        return "while training takes no wanda, obs or scope='sensitivity', whose calibration the training outdates"
    if step.regrow is not None and (not step.trains or step.schedule == "acdc" or pattern.group is not None):
        return "regrows weights only with the schedules constant, polynomial or exponential and without N:M"
    if step.trains and type(step.begin) is type(step.end) and step.begin > step.end:
        return f"ends at {step.end}, before it begins at {step.begin}: swap them"
    return ""
