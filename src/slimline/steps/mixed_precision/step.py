"""The step that chooses a format for each layer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from slimline.basics.errors import SlimlineError
from slimline.recipe.step import Step
from slimline.steps.quantization.step import StaticQuantization


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
    max_latency : part of the float artifact's latency on the target that the mixed one may take, in (0, 1), at the
        batch size and with the threads of the run. What a layer costs is the runtime's profile of it; the choice of
        least total error is solved exactly, and the clock judges its artifact: where it takes longer, the next choice
        gets less. Needs ``float32`` among `formats`.
    max_drop : of the score on the selection samples: float is given back to the layers that cost the network's outputs
        most, to as few of them as it takes (found by halving, so it is taken for granted that more float is no worse).
        Judged on the simulation.
    quantization : everything else, overrides included: layers for which it names weights have those.
    """

    kind = "quantization"
    step: Literal["MixedPrecision"] = "MixedPrecision"
    formats: tuple[Literal["int4", "int8", "float32"], ...] = ("int4", "int8")
    max_size: Annotated[float, Field(gt=0, le=1)] | None = None
    max_error: Annotated[float, Field(gt=0)] | None = None
    max_latency: Annotated[float, Field(gt=0, lt=1)] | None = None
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
        goals = {"max_size": self.max_size, "max_error": self.max_error, "max_latency": self.max_latency}
        named = [name for name, limit in goals.items() if limit is not None]
        if not named and self.max_drop is None:
            raise SlimlineError("MixedPrecision has no goal: give max_size, max_error, max_latency or max_drop.")
        if len(named) > 1:
            raise SlimlineError(f"{' and '.join(named)} are different ways to choose formats: give one of them.")
        if self.max_latency is not None and "float32" not in self.formats:
            raise SlimlineError(
                "max_latency chooses which layers stay in float, and float32 is not among formats: add it."
            )
        if self.quantization.other_activations is not None:
            raise SlimlineError(
                f"MixedPrecision chooses among integers beside activations of 8 bits, and quantization has "
                f"{self.quantization.other_activations}: use StaticQuantization, whose overrides leave layers in float."
            )
        if not self.formats or len(set(self.formats)) != len(self.formats):
            raise SlimlineError("formats are different formats of weights, at least one: give int4 and int8.")
        return self
