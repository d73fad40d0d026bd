"""Steps that put values on grids."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from slimline.basics.errors import SlimlineError
from slimline.recipe.config import Config
from slimline.recipe.layers import Globs, LayerPattern
from slimline.recipe.step import Step

ObserverName = Literal["minmax", "moving_average", "percentile", "mse", "entropy"]
WeightType = Literal["int8", "int4", "fp8_e4m3", "float32"]
Granularity = Literal["tensor", "channel"]
Percentage = Annotated[float, Field(gt=50, le=100)]


class QuantizationOverride(Config):
    """What is another for some layers; what is None is the step's.

    Attributes
    ----------
    observer, percentile : of the values that these layers make.
    weights : ``int8``, ``int4``, or ``float32`` for layers that stay in float; of a step in fp8_e4m3 that alone.
    granularity : whether a weight has one scale in all (``tensor``) or one per output channel (``channel``); else what
        the target takes best.
    """

    observer: ObserverName | None = None
    percentile: Percentage | None = None
    weights: WeightType | None = None
    granularity: Granularity | None = None


class StaticQuantization(Step):
    """Post-training quantization to integers or FP8 with calibrated activation ranges.

    Attributes
    ----------
    weights : ``int8`` or ``int4``, symmetric, per output channel. What a target does with int4 is in its report; one
        that takes none refuses it. Or ``fp8_e4m3``, floating-point numbers of 8 bits (Micikevicius et al. 2022,
        arXiv:2209.05433) with one scale per output channel, the largest number 448: for all layers but those that stay
        in float, activations are such numbers too, and biases stay as they are. Not with ``adaround``.
    rounding : of weights. ``nearest`` is to the nearest code of a scale that holds the largest weight; ``mse`` searches
        each scale for the least error of the outputs; ``gptq`` does that and lets later weights make up for the error
        of earlier ones (Frantar et al. 2022, arXiv:2210.17323); ``adaround`` chooses up or down for each weight, for
        the least error of the outputs (Nagel et al. 2020, arXiv:2004.10568). All by the calibration samples.
    propagate : with ``mse``, ``gptq`` and ``adaround``, whether layers are rounded one after the other, each for the
        outputs of the float network from the inputs that the rounded layers before it leave (Zhang et al. 2025,
        arXiv:2505.11695); else each by itself, from the inputs of the float network.
    equalize : bring the channels between two layers to like ranges first, which changes no answer (cross-layer
        equalisation, Nagel et al. 2019, arXiv:1906.04721); where nothing but ReLU, its leaky forms, pools,
        products and attention lie between.
    unclip : with `equalize`, ReLU6 between two layers, which stands in its way, becomes ReLU where it hardly clips: as
        many as change the outputs on calibration samples, squared, by at most this part of their energy; 0 leaves all.
    absorb_bias : what a channel has at least behind a ReLU, on all calibration samples, is taken from the bias before
        it and given to the bias of the layer that reads it, so that the rest takes less of its grid (Nagel et al. 2019,
        who take it from batch norms); not where that layer pads with zeros.
    smooth : let weights take over what is uneven in the channels that they read, which changes no answer: a channel is
        divided in the norm, layer or product that makes it by ``max|x|^smooth / max|w|^(1 - smooth)``, or where that
        cannot be, as something else reads the value too or a GELU makes it, in a product of its own before the linear
        layers that read it. For transformers, where a few channels are a hundred times the others (SmoothQuant, Xiao et
        al. 2022, arXiv:2211.10438, which takes 0.5). None does nothing.
    bias_correction : let the bias of each layer make up for what the rounding of its weights does to the mean of its
        output; the mean of its input is that of the calibration samples (``empirical``), or what the batch norm before
        it says (``analytic``; layers without one are left as they are).
    granularity : whether weights have one scale in all (``tensor``) or one per output channel (``channel``); None takes
        what the target runs best.
    first_layers, last_layers : another of `weights` for layers that read no other layer with weights, and for those
        that none reads; None leaves them like the rest. An override goes before.
    activations : ``uint8`` or ``int8``, per tensor, ``int16`` without zero points beside weights in int8, or
        ``fp8_e4m3`` beside such weights; None takes what the target runs fastest (``uint8`` on ONNX Runtime, ``int8``
        on LiteRT), beside weights in fp8_e4m3 these.
    symmetric : of activations, whether zero is the middle of the codes (of ``uint8`` the first code, where a value is
        never negative); else each has a zero point of its own. Some targets take symmetric ones only.
    observer : the range of an activation: ``minmax`` is all that calibration saw, ``moving_average`` that of the latest
        batches, ``percentile`` all but a tail, ``mse`` the range of least squared rounding error, ``entropy`` the one
        of least Kullback-Leibler divergence.
    percentile : of the absolute tail that `percentile` keeps, in percent.
    samples, batch_size : calibration samples, and how many at a time.
    layers, keep : globs of the layers to quantize and of those to leave in float.
    overrides : by pattern of layers, their own ``{"observer": …, "percentile": …, "weights": …, "granularity": …}``; a
        value takes those of the first pattern that fits a layer which makes it (an input: the layer that reads it
        first), a weight those of the first that fits a layer which reads it.
    undo : put back to float every layer whose quantization makes the artifact slower or breaks parity.
    """

    kind = "quantization"
    step: Literal["StaticQuantization"] = "StaticQuantization"
    weights: Literal["int8", "int4", "fp8_e4m3"] = "int8"
    rounding: Literal["nearest", "mse", "gptq", "adaround"] = "nearest"
    propagate: bool = True
    equalize: bool = False
    unclip: Annotated[float, Field(ge=0, lt=1)] = 1e-4
    absorb_bias: bool = False
    smooth: Annotated[float, Field(gt=0, lt=1)] | None = None
    bias_correction: Literal["empirical", "analytic"] | None = None
    granularity: Granularity | None = None
    first_layers: WeightType | None = None
    last_layers: WeightType | None = None
    activations: Literal["uint8", "int8", "int16", "fp8_e4m3"] | None = None
    symmetric: bool = False
    observer: ObserverName = "mse"
    percentile: Percentage = 99.99
    samples: Annotated[int, Field(ge=1)] = 512
    batch_size: Annotated[int, Field(ge=1)] = 64
    layers: Globs = ("*",)
    keep: Globs = ()
    overrides: dict[LayerPattern, QuantizationOverride] = Field(default_factory=dict)
    undo: bool = True

    @property
    def computes_in_integers(self) -> bool:
        return True

    @property
    def needs(self) -> tuple[str, ...]:
        return ("calibration",)

    @property
    def reads_together(self) -> int:
        return self.batch_size

    @property
    def numbers(self) -> str:
        """What is multiplied, in a word."""
        return "fp8_e4m3" if self.weights == "fp8_e4m3" else "integers"

    @property
    def other_activations(self) -> str | None:
        """The type of activations, where it is none of integers of 8 bits."""
        if self.weights == "fp8_e4m3":
            return "fp8_e4m3"
        return self.activations if self.activations == "int16" else None

    def observation(self, pattern: str | None) -> tuple[ObserverName, float]:
        """Observer and percentile of layers that fit a pattern of `overrides`; of the others for None."""
        if pattern is None:
            return self.observer, self.percentile
        own = self.overrides[pattern]
        return own.observer or self.observer, self.percentile if own.percentile is None else own.percentile

    @model_validator(mode="after")
    def _types_fit_together(self) -> StaticQuantization:
        own = [each.weights for each in self.overrides.values()]
        weights = {each for each in (self.weights, self.first_layers, self.last_layers, *own) if each is not None}
        if "fp8_e4m3" in (*weights, self.activations) and (
            not weights <= {"fp8_e4m3", "float32"} or self.activations not in (None, "fp8_e4m3")
        ):
            raise SlimlineError(
                "Numbers in fp8_e4m3 are multiplied by such numbers alone: give weights: fp8_e4m3 and leave "
                "activations and other types out, but for layers in float32."
            )
        if self.weights == "fp8_e4m3" and self.rounding == "adaround":
            raise SlimlineError(
                "adaround rounds to integers, and fp8_e4m3 has none: choose the rounding gptq, mse or nearest."
            )
        return self

    @model_validator(mode="after")
    def _overrides_mean_something(self) -> StaticQuantization:
        for pattern, own in self.overrides.items():
            if own == QuantizationOverride():
                raise SlimlineError(
                    f"The override of {pattern!r} says nothing: give it an observer, a percentile, weights or a "
                    "granularity."
                )
            if own.weights == "float32" and own != QuantizationOverride(weights="float32"):
                raise SlimlineError(
                    f"The override of {pattern!r} leaves layers in float, which have no grid: give it nothing beside "
                    "weights: float32."
                )
            if own.percentile is not None and self.observation(pattern)[0] != "percentile":
                raise SlimlineError(
                    f"The override of {pattern!r} has a percentile for the observer {self.observation(pattern)[0]}: "
                    "give it observer: percentile too."
                )
        return self
