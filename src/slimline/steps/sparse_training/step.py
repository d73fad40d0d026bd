"""Training that makes a model prunable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from slimline.basics.errors import SlimlineError
from slimline.recipe.layers import Globs
from slimline.recipe.step import Step
from slimline.recipe.training import Training
from slimline.steps.channels.step import AxisKind, ChannelPruning

STRENGTHS = {
    ("weights", "l1"): 0.3,
    ("weights", "l2"): 1.0,
    ("weights", "group_lasso"): 1.0,
    ("weights", "batch_norm"): 1.0,
    ("weights", "growing"): 1000.0,
    ("weights", "l0"): 3.0,
    ("activations", "l1"): 3.0,
    ("activations", "l0"): 3.0,
}
"""By what is penalised and how, the strength that is meant by None."""


class SparseTraining(Training):
    """Train the model so that it can be pruned: a penalty makes weights, whole units or activations small or zero.

    Comes before the step that prunes. It learns from the original's outputs and, where there are any, from the labels
    (``alpha=0``: from them alone). The model is kept as it is after the last epoch, whatever its score.

    Attributes
    ----------
    penalty : of weights:
        ``l1``, ``l2`` of single weights;
        ``group_lasso``, the norm of all that goes with a position of a unit, as ``ChannelPruning(criterion="l2")``
        sees it, times the root of its size (Yuan and Lin 2006);
        ``batch_norm``, the magnitude of batch-norm scales (network slimming, Liu et al. 2017, arXiv:1708.06519);
        ``growing``, the square norm of the positions that the `ChannelPruning` that follows would remove, with a
        strength that grows (Wang et al. 2021, arXiv:2012.09243);
        ``l0``, the expected part of the weights whose positions have an open hard-concrete gate (Louizos et al. 2018,
        arXiv:1712.01312).
        Of activations, with ``of="activations"``: ``l1``, their mean magnitude (Georgiadis 2019, arXiv:1812.01529), or
        ``l0``, the Hoyer square, a surrogate of the part that is not zero (Kurtz et al. 2020, PMLR 119).
    of : ``weights``, or ``activations``: the outputs of ReLUs.
    strength : how strong; None takes a usual one (`STRENGTHS`).
        For ``l1``, ``group_lasso`` and ``batch_norm`` each optimiser step moves a weight (of a group: in the root mean
        square) towards zero by this part of the learning rate; 1 is about as far as a step of ``adamw`` goes.
        For ``l2`` and ``growing`` it divides the weights by ``1 + learning rate x strength``. With ``sgd`` these are
        the weight of the penalty in the loss, and have to be given.
        For ``l0`` it is what closing all gates is worth in units of the loss, and for activations the weight in the
        loss of the mean over the ReLUs.
    growth : part of all optimiser steps over which the strength rises linearly from zero; None takes 0.75 for
        ``growing`` and 0 for the others.
    gate_rate : learning rate of the gates of ``l0`` (Adam), under the same warm-up and cosine.
    layers, keep : globs of the layers to penalise (default all) and of those to leave alone; for activations, of the
        ReLUs or of the layers they belong to.
    axes, factors : kinds of axes whose units are penalised, and which factors of products, see `ChannelPruning`.
    loss, temperature, alpha, epochs, batch_size, optimizer, learning_rate, weight_decay, momentum, warmup,
    refresh_batches, precision : see `Training`. Batch-norm statistics are recomputed before training and after every
        epoch.
    """

    kind = "training"
    step: Literal["SparseTraining"] = "SparseTraining"
    penalty: Literal["l1", "l2", "group_lasso", "batch_norm", "growing", "l0"] = "group_lasso"
    of: Literal["weights", "activations"] = "weights"
    strength: Annotated[float, Field(gt=0)] | None = None
    growth: Annotated[float, Field(ge=0, le=1)] | None = None
    gate_rate: Annotated[float, Field(gt=0)] = 0.2
    layers: Globs = ("*",)
    keep: Globs = ()
    axes: tuple[AxisKind, ...] | None = None
    factors: Literal["largest", "all"] = "largest"
    epochs: Annotated[int, Field(ge=1)] = 5

    def strength_at(self, progress: float) -> float:
        """The strength when the part `progress` in [0, 1] of the training is done."""
        usual = 0.75 if self.penalty == "growing" else 0.0
        growth = usual if self.growth is None else self.growth
        full = STRENGTHS[self.of, self.penalty] if self.strength is None else self.strength
        return full if progress >= growth else full * progress / growth

    def joins(self, following: Step) -> bool:
        """See `Step`."""
        return isinstance(following, ChannelPruning) or super().joins(following)

    def misplaced(self, earlier: Sequence[str], following: Step | None) -> str:
        """See `Step`."""
        if self.penalty == "growing" and not isinstance(following, ChannelPruning):
            return (
                "SparseTraining with penalty: growing penalises what the next step removes: let ChannelPruning follow, "
                "or use penalty: group_lasso."
            )
        return ""

    @model_validator(mode="after")
    def _consistent(self) -> SparseTraining:
        problem = self._unfit()
        if problem:
            raise SlimlineError(f"SparseTraining {problem}.")
        return self

    def _unfit(self) -> str:
        """Which settings do not go together."""
        units = self.of == "weights" and self.penalty not in ("l1", "l2")
        if (self.of, self.penalty) not in STRENGTHS:
            return f"of activations takes penalty='l1' or 'l0', not {self.penalty!r}"
        if self.of == "activations" and self.growth is not None:
            return "of activations has a constant strength: drop growth"
        if self.axes is not None and not units:
            return f"of {'activations' if self.of == 'activations' else 'single weights'} has no axes: drop them"
        if self.penalty == "growing" and (tuple(self.layers) != ("*",) or self.keep or self.axes is not None):
            return "with penalty='growing' takes no layers, keep or axes: give them to the ChannelPruning that follows"
        if self.optimizer == "sgd" and self.strength is None and self.of == "weights" and self.penalty != "l0":
            return "with optimizer='sgd' needs a strength, the weight of the penalty in the loss, such as 0.01"
        return ""
