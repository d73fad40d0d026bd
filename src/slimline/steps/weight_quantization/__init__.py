"""Weights are stored in fewer bits, activations stay in float."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slimline.recipe.step import Step
from slimline.steps.base import Context, Handler, StepResult
from slimline.steps.weight_quantization.step import WeightQuantization

if TYPE_CHECKING:
    from slimline.model import Model

__all__ = ["WeightQuantization", "handler"]


class _Handler(Handler[WeightQuantization]):
    config = WeightQuantization
    summary = "stores weights in 8 to 2 bits or short floats, activations stay in float"
    reads = (("calibration", "rounding gptq and adaround, scaling, and mse where there are samples"),)

    def check(self, step: WeightQuantization, model: Model, earlier: Sequence[Step]) -> None:
        from slimline.steps.weight_quantization.quantize import chosen

        chosen(model, step)

    def check_target(self, step: WeightQuantization, target: str, model: Model) -> None:
        from slimline.steps.weight_quantization.quantize import check_target

        check_target(step, target, model)

    def perform(self, step: WeightQuantization, model: Model, context: Context) -> StepResult:
        from slimline.steps.weight_quantization.quantize import quantize

        return quantize(model, step, context)

    def rehearsal(self, step: WeightQuantization) -> WeightQuantization:
        return step.model_copy(update={"rounding": "nearest", "scaling": None})


handler = _Handler()
