"""The step that stores weights in fewer bits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from slimline.basics.errors import SlimlineError
from slimline.methods.levels import levels
from slimline.methods.scales import BLOCK_FLOATS
from slimline.recipe.config import Config
from slimline.recipe.layers import Globs, LayerPattern
from slimline.recipe.step import Step
from slimline.steps.weight_rounding import MEASURED, SECOND_ORDER, RoundingName

LevelsType = Literal["binary", "ternary", "pow2"] | tuple[float, ...]
WeightType = (
    Literal["int8", "int4", "int3", "int2", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2", "mxfp4", "nvfp4"] | LevelsType
)
GroupSize = Annotated[int, Field(ge=1)] | Literal["channel"]

_GROUP = 64


class WeightOverride(Config):
    """What is another for some layers; what is None is the step's.

    Attributes
    ----------
    dtype, group_size : of the weights of these layers.
    """

    dtype: WeightType | None = None
    group_size: GroupSize | None = None


class WeightQuantization(Step):
    """Weights are stored in fewer bits; activations stay in float (weight-only quantization).

    Attributes
    ----------
    dtype : how weights are stored. ``fp16`` and ``bf16`` have no scales. ``mxfp4`` is float4_e2m1fn (0, 0.5, 1, 1.5, 2,
        3, 4 and 6 of either sign) in blocks of 32 with powers of two for scales (OCP Microscaling Formats 1.0),
        ``nvfp4`` the same in blocks of 16 whose scales are float8_e4m3fn, with one float32 for all. ``binary`` (-1, 1),
        ``ternary`` (-1, 0, 1), ``pow2`` (0 and ±1, ±1/2 … ±1/64) and lists of numbers are levels times the scale of
        least squared error.
    group_size : neighbouring weights of one output that share a scale; ``channel`` is all of them. A convolution has as
        many whole kernels in a group as fit, an embedding parts of a row. None is 64 for integers of less than 8 bits,
        else ``channel``.
    symmetric : of integers, whether zero is in the middle of the codes; else each group has a zero point.
    rounding : ``nearest`` is to the nearest code of a scale that holds the largest weight; ``mse`` searches each scale
        for the least squared error, weighted by the inputs' energy where there are calibration samples; ``gptq`` does
        that and lets later weights make up for the error of earlier ones, by calibration samples (Frantar et al. 2022,
        arXiv:2210.17323); ``adaround`` does it by choosing up or down for each weight, of integers (Nagel et al. 2020,
        arXiv:2004.10568); ``hqq`` fits scales that outliers hardly move, without data (Badri and
        Shaji 2023).
    scaling : ``awq`` multiplies the weights of large inputs before they are rounded and divides these inputs where they
        are made, in the norm, layer or product before, which changes no answer: such weights are rounded more finely
        (Lin et al. 2023, arXiv:2306.00978). How much is searched by the calibration samples, for the least error of the
        outputs; where something else reads the input too, nothing is scaled.
    rotation : ``hadamard`` rotates what layers add up, where RMS norms alone read it (language models with their norms
        first), by a Hadamard matrix with random signs, which changes no answer and spreads what a few channels hold
        over all (Ashkboos et al. 2024, arXiv:2404.00456). Norms' scales become part of the layers behind them.
    propagate : with ``mse``, ``gptq`` and ``adaround`` and calibration samples, whether layers are rounded one after
        the other, each for the outputs of the float network from the inputs that the rounded layers before it leave
        (Zhang et al. 2025, arXiv:2505.11695; Arai and Ichikawa 2025, arXiv:2504.09629); else each by itself, from the
        inputs of the float network.
    samples, batch_size : calibration samples, and how many at a time.
    damping : part of the mean diagonal of a Gram matrix that is added to it, with ``mse``, ``gptq`` and ``adaround``;
        with `propagate` also how much a weight is drawn to what it was.
    layers, keep : patterns of the layers whose weights are rounded, and of those that stay as they are.
    overrides : by pattern of layers, their own ``{"dtype": …, "group_size": …}``; the first pattern that fits counts.
    """

    kind = "quantization"
    step: Literal["WeightQuantization"] = "WeightQuantization"
    dtype: WeightType = "int8"
    group_size: GroupSize | None = None
    symmetric: bool = True
    rounding: RoundingName = "mse"
    scaling: Literal["awq"] | None = None
    rotation: Literal["hadamard"] | None = None
    propagate: bool = True
    samples: Annotated[int, Field(ge=1)] = 512
    batch_size: Annotated[int, Field(ge=1)] = 64
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    layers: Globs = ("*",)
    keep: Globs = ()
    overrides: dict[LayerPattern, WeightOverride] = Field(default_factory=dict)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("calibration",) if self.rounding in SECOND_ORDER or self.scaling is not None else ()

    @property
    def reads_together(self) -> int | None:
        return self.batch_size if self.rounding in MEASURED or self.scaling is not None else None

    def storage(self, pattern: str | None = None) -> tuple[WeightType, int | None]:
        """Type and group size (None is a channel) of layers that fit a pattern of `overrides`; of the others for
        None."""
        own = WeightOverride() if pattern is None else self.overrides[pattern]
        dtype = own.dtype or self.dtype
        if dtype in BLOCK_FLOATS:
            return dtype, BLOCK_FLOATS[dtype][2]
        group = own.group_size or self.group_size or (_GROUP if dtype in ("int4", "int3", "int2") else "channel")
        return dtype, None if group == "channel" else group

    @model_validator(mode="after")
    def _fields_fit_together(self) -> WeightQuantization:
        dtypes = {self.dtype, *(own.dtype for own in self.overrides.values() if own.dtype)}
        on_levels = [d for d in dtypes if levels(d) is not None]
        integers_only = self.rounding in ("hqq", "adaround")
        if on_levels and integers_only:
            raise SlimlineError(
                f"rounding {self.rounding} is for integers, and {on_levels[0]} are levels: choose mse or gptq."
            )
        floats = sorted(d for d in dtypes if isinstance(d, str) and not d.startswith("int") and d not in on_levels)
        if floats and (integers_only or not self.symmetric):
            what = f"rounding {self.rounding}" if integers_only else "symmetric false"
            raise SlimlineError(f"{what} is for integers, and {floats[0]} is none: leave it out, or choose int4.")
        sized = [(own.dtype or self.dtype, own.group_size) for own in self.overrides.values()]
        for dtype, group in ((self.dtype, self.group_size), *sized):
            if isinstance(dtype, str) and dtype in BLOCK_FLOATS and group not in (None, BLOCK_FLOATS[dtype][2]):
                raise SlimlineError(f"{dtype} has blocks of {BLOCK_FLOATS[dtype][2]}: leave group_size {group} out.")
        for pattern, own in self.overrides.items():
            if own.dtype is None and own.group_size is None:
                raise SlimlineError(f"The override of {pattern!r} says nothing: give it a dtype or a group_size.")
        return self
