"""The step that puts lighter layers in the place of heavy ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AliasChoices, Field, model_validator

from slimline.basics.errors import SlimlineError
from slimline.recipe.step import Ratio
from slimline.steps.fitted import FittedStep

Convolution = Literal["separable", "grouped"]
Function = Literal["relu", "relu6", "hardswish", "hardsigmoid"]

ALIASES: Mapping[str, str] = {
    "swish": "silu",
    "hard_silu": "hardswish",
    "hard_swish": "hardswish",
    "hard_sigmoid": "hardsigmoid",
}
"""Other names of functions, as users and frameworks have them."""


class Lighten(FittedStep):
    """Replace convolutions by separable or grouped ones, activations by cheaper functions, or let the network read a
    smaller image.

    What takes the place of a convolution starts from the least-squares fit to it and is called ``layer.0`` and
    ``layer.1``; `Distillation` behind it trains it further. A convolution that would not have fewer parameters and
    fewer multiply-accumulates stays as it is.

    Attributes
    ----------
    convolution : ``separable``, a k × k filter of every channel (depthwise), then 1 × 1 (pointwise; Howard et al. 2017,
        arXiv:1704.04861); ``grouped``, the same kernel within `groups` of channels; None leaves convolutions as they
        are. Recipes may say ``kind``, too.
    multiplier : depthwise filters of every input channel.
    groups : into which a convolution is split (each group of one that is grouped already); they divide its channels.
    activations : by name of a function the one that takes its place: ``{"silu": "hardswish"}``.
    resolution : by which height and width of the image are divided: the network itself takes the means of squares of so
        many places on a side, and all behind has fewer places. For networks that average over all places in the end; it
        stands alone in its step.
    ratio : part of the parameters of the chosen convolutions that goes at least, in [0, 1), by those that lose least;
        None takes all.
    error : part of the energy of its outputs that a layer may lose, in (0, 1); one that would lose more stays.
    criterion : ``output`` makes the error of the layer's outputs on calibration samples least, ``weight`` that of its
        weights, without data.
    compensate : each convolution also makes up for what the layers before it lost, from the inputs it has then; by
        default with ``output``, which it needs.
    damping : part of the mean of the Gram matrix's diagonal that is added to it.
    samples, batch_size : calibration samples that are read, and how many at a time.
    layers, keep : globs of the layers to change and of those to leave alone.
    undo : put back what does not make the artifact measurably faster on the target. Say false where size is the goal,
        or where a later step decides the time.
    """

    step: Literal["Lighten"] = "Lighten"
    convolution: Convolution | None = Field(default=None, validation_alias=AliasChoices("convolution", "kind"))
    multiplier: Annotated[int, Field(ge=1)] = 1
    groups: Annotated[int, Field(ge=2)] | None = None
    activations: dict[str, Function] = Field(default_factory=dict)
    resolution: Annotated[int, Field(ge=2)] | None = None
    ratio: Ratio | None = None
    error: Annotated[float, Field(gt=0, lt=1)] | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        fits = self.convolution is not None or self.error is not None
        return super().needs if fits else ()

    @property
    def functions(self) -> Mapping[str, str]:
        """`activations`, the functions in their plain names."""
        return {ALIASES.get(name, name): function for name, function in self.activations.items()}

    @model_validator(mode="after")
    def _means_something(self) -> Lighten:
        others = self.convolution is not None or bool(self.activations)
        if not others and self.resolution is None:
            raise SlimlineError(
                "Lighten changes nothing: give convolution: separable or grouped, activations such as "
                "{silu: hardswish}, or a resolution such as 2."
            )
        if self.resolution is not None and (others or self.layers != ("*",) or self.keep or self.error is not None):
            raise SlimlineError(
                "Lighten's resolution is of the whole network: give it in a step of its own, without layers and error."
            )
        if (self.groups is not None) != (self.convolution == "grouped"):
            raise SlimlineError("Lighten takes groups with convolution: grouped, and only there: give both or none.")
        if self.multiplier > 1 and self.convolution != "separable":
            raise SlimlineError("Lighten takes a multiplier with convolution: separable only: leave it out.")
        if self.ratio is not None and self.convolution is None:
            raise SlimlineError("Lighten's ratio is of convolutions: give convolution: separable or grouped.")
        same = [name for name, function in self.functions.items() if name == function]
        if same:
            raise SlimlineError(f"Lighten would replace {same[0]} by itself: name another function.")
        return self
