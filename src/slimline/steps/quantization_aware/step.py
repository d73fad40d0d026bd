"""The step that trains a network while it is rounded."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from slimline.basics.errors import SlimlineError
from slimline.methods.levels import levels
from slimline.recipe.config import Config
from slimline.recipe.layers import Globs, LayerPattern
from slimline.recipe.training import Training
from slimline.steps.quantization.step import (
    Granularity,
    ObserverName,
    Percentage,
    QuantizationOverride,
    StaticQuantization,
)

Integers = Literal["int2", "int3", "int4", "int5", "int6", "int7", "int8"]
Unsigned = Literal["uint2", "uint3", "uint4", "uint5", "uint6", "uint7", "uint8"]
WeightType = Integers | Literal["binary", "ternary", "ttq", "pow2"] | tuple[float, ...]


class QuantizationAwareOverride(Config):
    """What is another for some layers; what is None is the step's.

    Attributes
    ----------
    weights : a type of `QuantizationAwareTraining`, or ``float32`` for layers that stay in float.
    activations : ``binary``, or the type of all that is not, for layers that read such numbers.
    observer, percentile, granularity : as of `slimline.steps.quantization.step.QuantizationOverride`.
    """

    weights: WeightType | Literal["float32"] | None = None
    activations: Integers | Unsigned | Literal["binary"] | None = None
    observer: ObserverName | None = None
    percentile: Percentage | None = None
    granularity: Granularity | None = None

    @property
    def static(self) -> QuantizationOverride | None:
        """Without the types; None where nothing else is said."""
        fields = self.model_dump(exclude={"weights", "activations"}, exclude_none=True)
        if self.weights == "float32":
            fields["weights"] = "float32"
        return QuantizationOverride(**fields) if fields else None


class QuantizationAwareTraining(Training):
    """Train the network while it computes with rounded weights and activations, towards the float original.

    Gradients go straight through the rounding, and scales are learned with the weights (LSQ, Esser et al. 2020,
    arXiv:1902.08153), zero points too where a grid has its zero inside (LSQ+, Bhalgat et al. 2020, arXiv:2004.09576).
    With `reconstruct` nothing but calibration samples is needed, and no label: one part of the network after the other
    is trained until what it makes of what the rounded parts before it gave is what it made in float (BRECQ, Li et al.
    2021, arXiv:2102.05426), while some numbers are left unrounded by chance (QDrop, Wei et al. 2022, arXiv:2203.05740).

    What comes out is as of `StaticQuantization` and written by the same targets; with float activations as of
    `WeightQuantization`. After `StaticQuantization` it goes on from its grids, where they are of the same type.

    Attributes
    ----------
    weights : ``int2`` … ``int8``, symmetric, or levels times a scale: ``binary`` (-1, 1), ``ternary`` (-1, 0, 1),
        ``ttq`` (-a, 0, 1, where each weight learns its ``a``; Zhu et al. 2017, arXiv:1612.01064), ``pow2`` (0 and ±1,
        ±1/2 … ±1/64), or a list of numbers. Scales are per output channel where the target takes that. Levels start
        with the scale of least squared error.
    activations : ``uint2`` … ``uint8`` or ``int2`` … ``int8``, affine, per tensor; None takes the target's own of 8
        bits; ``float32`` leaves them in float. ``binary`` has each layer read the signs of its input, times a scale
        (XNOR-Net, Rastegari et al. 2016, arXiv:1603.05279): of what is above a threshold of each channel, which starts
        at its mean and learns (ReActNet, Liu et al. 2020, arXiv:2003.03488). Gradients go through where the input is
        within the scale of its threshold. What other layers read and make has the type that `overrides` name, or the
        target's own.
    scales : ``learned``, or as they were ``calibrated``; with ``clipping`` those of activations learn where their grid
        ends, from what lies beyond (PACT, Choi et al. 2018, arXiv:1805.06085), and `weight_decay` pulls it in; zero
        points stay then.
    delay : epochs before activations are rounded; they are observed then, on the weights that were trained so far.
    fold_norms : epochs before batch norms are folded, from when on their statistics stay; None is at the end, where the
        scales of the channels take the factors in. They are folded before training where scales or levels could not.
    reconstruct : train parts of the network by themselves: ``block`` residual blocks, and each layer that lies in none;
        ``layer`` each layer. Inputs and outputs of one part, for all `samples`, are in memory at a time. Norms are
        folded first, and those that cannot be stay as they are. None trains the whole network, with `train` samples.
    rounding : of `reconstruct`, how weights on integer grids learn: ``straight_through``, with scales that learn; or by
        ``adaround``, between the codes below and above what they were, each driven to one of both by a penalty that
        becomes steeper, with scales of least error that stay (Nagel et al. 2020, arXiv:2004.10568).
    drop : of `reconstruct`, the part of a layer's inputs that is not rounded, and of a part's that is as it was in
        float; drawn anew at every step. 0 rounds all.
    observer, percentile, samples : of the activations' first ranges, see `StaticQuantization`. Of `reconstruct` these
        are the samples that it trains with.
    layers, keep : globs of the layers to quantize and of those to leave in float.
    overrides : by pattern of layers, their own ``{"weights": …, "activations": …, "observer": …, "percentile": …,
        "granularity": …}``. There is one type of activations beside ``binary``.
    loss, temperature, alpha, epochs, batch_size, optimizer, learning_rate, weight_decay, momentum, warmup,
    refresh_batches, precision : see `Training`. The rate begins anew behind `delay` and `fold_norms`. With
        `reconstruct` epochs are of each part and of calibration samples, 60 in batches of 32 at a rate of 3e-4 unless
        others are named; the loss is the squared error, and what is about outputs and labels has no meaning.
    """

    kind = "quantization"
    refines: ClassVar[tuple[str, ...]] = ("StaticQuantization",)
    step: Literal["QuantizationAwareTraining"] = "QuantizationAwareTraining"
    weights: WeightType = "int8"
    activations: Integers | Unsigned | Literal["float32", "binary"] | None = None
    scales: Literal["learned", "clipping", "calibrated"] = "learned"
    delay: Annotated[int, Field(ge=0)] = 0
    fold_norms: Annotated[int, Field(ge=0)] | None = None
    reconstruct: Literal["block", "layer"] | None = None
    rounding: Literal["straight_through", "adaround"] = "straight_through"
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.5
    observer: ObserverName = "mse"
    percentile: Percentage = 99.99
    samples: Annotated[int, Field(ge=1)] = 512
    layers: Globs = ("*",)
    keep: Globs = ()
    overrides: dict[LayerPattern, QuantizationAwareOverride] = Field(default_factory=dict)

    @property
    def computes_in_integers(self) -> bool:
        return self.activations != "float32"

    @property
    def needs(self) -> tuple[str, ...]:
        if self.reconstruct is not None:
            return ("calibration",)
        calibration = () if self.activations == "float32" else ("calibration",)
        return (*super().needs, *calibration)

    @property
    def learns_from_teacher(self) -> bool:
        return self.reconstruct is None and super().learns_from_teacher

    @property
    def static(self) -> StaticQuantization:
        """The step that says of the same layers where activations are rounded, and how they are observed."""
        return StaticQuantization(
            observer=self.observer,
            percentile=self.percentile,
            samples=self.samples,
            batch_size=self.batch_size,
            layers=self.layers,
            keep=self.keep,
            overrides={name: own.static for name, own in self.overrides.items() if own.static is not None},
            undo=False,
        )

    def weights_of(self, pattern: str | None) -> WeightType:
        """Of layers that fit a pattern of `overrides`; of the others for None."""
        own = None if pattern is None else self.overrides[pattern].weights
        return self.weights if own is None or own == "float32" else own

    def reads_signs(self, pattern: str | None) -> bool:
        """Whether layers that fit a pattern of `overrides` read signs; others for None."""
        own = None if pattern is None else self.overrides[pattern].activations
        return (self.activations if own is None else own) == "binary"

    @property
    def has_signs(self) -> bool:
        """Whether any layer may read signs."""
        return any(map(self.reads_signs, (None, *self.overrides)))

    @property
    def grid_type(self) -> str | None:
        """The type of activations that are not signs; None for the target's own."""
        return next(iter(self._types()), None)

    def _types(self) -> set[Any]:
        every = (self.activations, *(own.activations for own in self.overrides.values()))
        return {each for each in every if each not in (None, "binary")}

    def phases(self) -> list[tuple[int, int]]:
        """Epochs between which nothing changes but what is trained: first and behind the last of each."""
        ends = sorted({0, min(self.delay, self.epochs), min(self.fold_norms or 0, self.epochs), self.epochs})
        return list(pairwise(ends))

    @model_validator(mode="before")
    @classmethod
    def _of_parts(cls, data: Any) -> Any:
        """A part is small and learns from few samples, so it sees them more often."""
        parts = isinstance(data, dict) and data.get("reconstruct") is not None
        return {"epochs": 60, "batch_size": 32, "learning_rate": 3e-4, **data} if parts else data

    @model_validator(mode="after")
    def _meaningful(self) -> QuantizationAwareTraining:
        for pattern, own in self.overrides.items():
            if own == QuantizationAwareOverride():
                raise SlimlineError(f"The override of {pattern!r} says nothing: give it weights, such as int8.")
        for dtype in (self.weights, *(own.weights for own in self.overrides.values())):
            if isinstance(dtype, tuple):
                levels(dtype)
        types = self._types() | ({"binary"} if self.activations == "float32" and self.has_signs else set())
        if len(types) > 1:
            raise SlimlineError(
                f"Activations of {' and '.join(sorted(types))} do not go together: give one type of 2 bits or more "
                "beside binary."
            )
        if self.delay > self.epochs or (self.fold_norms or 0) > self.epochs:
            raise SlimlineError(f"delay and fold_norms lie within the {self.epochs} epochs: make them smaller.")
        if self.compiled:
            raise SlimlineError("compiled is of networks that train in float: leave it out while their numbers round.")
        if self.reconstruct is not None and (self.delay or self.fold_norms or self.features or self.view or self.ema):
            raise SlimlineError(
                "delay, fold_norms, features, view and ema are of training the whole network: leave them out with "
                "reconstruct."
            )
        if self.reconstruct is None and self.rounding != "straight_through":
            raise SlimlineError(f"rounding={self.rounding!r} is of reconstruct: name block or layer there.")
        if (self.delay or self.scales == "clipping") and self.activations == "float32":
            what = "delay" if self.delay else "scales='clipping'"
            raise SlimlineError(f"{what} is of activations, which stay in float here: leave it out.")
        return self
