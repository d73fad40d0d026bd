"""The step that chooses a format for each layer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from slimline.basics.errors import SlimlineError
from slimline.recipe.step import Step
from slimline.steps.quantization.step import StaticQuantization, WeightType


class MixedPrecision(Step):
    """Static quantization with a weight format for each layer, by what it costs, and float where accuracy needs it.

    What a format costs a layer is the error of its output on calibration samples, ``tr((W - Q) H (W - Q)ᵀ)`` with the
    rounded weight `Q` and the Gram matrix `H` of its inputs, relative to the output's own ``tr(W H Wᵀ)``.

    Attributes
    ----------
    formats : of weights, among which each layer gets one; ``float32`` leaves a layer in float.
    max_size : part of the float bytes of all these weights that they may take, scales included, in (0, 1]: the choice
        of least total error within it, solved exactly.
    max_error : total of the errors that the layers may have: the choice of least size within it, solved exactly.
    max_drop : of the score on the selection samples: float is given back to the layers that cost the network's outputs
        most, to as few of them as it takes (found by halving, so it is taken for granted that more float is no worse).
        Judged on the simulation.
    quantization : everything else, overrides included: layers for which it names weights have those.
    """

    kind = "quantization"
    step: Literal["MixedPrecision"] = "MixedPrecision"
    formats: tuple[WeightType, ...] = ("int4", "int8")
    max_size: Annotated[float, Field(gt=0, le=1)] | None = None
    max_error: Annotated[float, Field(gt=0)] | None = None
    max_drop: Annotated[float, Field(ge=0, lt=1)] | None = None
    quantization: StaticQuantization = Field(default_factory=lambda: StaticQuantization(rounding="gptq"))

    @property
    def computes_in_integers(self) -> bool:
        return True

    @property
    def needs(self) -> tuple[str, ...]:
        return ("calibration",) if self.max_drop is None else ("calibration", "selection")

    @property
    def reads_together(self) -> int:
        return self.quantization.batch_size

    @model_validator(mode="after")
    def _goals_fit_together(self) -> MixedPrecision:
        if self.max_size is None and self.max_error is None and self.max_drop is None:
            raise SlimlineError("MixedPrecision has no goal: give max_size, max_error or max_drop.")
        if self.max_size is not None and self.max_error is not None:
            raise SlimlineError("max_size and max_error are two ways to choose formats: give one of them.")
        if not self.formats or len(set(self.formats)) != len(self.formats):
            raise SlimlineError("formats are different formats of weights, at least one: give int4 and int8.")
        return self
