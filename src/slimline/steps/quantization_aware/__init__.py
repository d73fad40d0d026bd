"""Networks are trained while they compute in few bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slimline.recipe.step import Step
from slimline.steps.base import Context, Forecast, Handler, Prepared, StepResult
from slimline.steps.quantization_aware.step import QuantizationAwareTraining

if TYPE_CHECKING:
    from slimline.model import Model

__all__ = ["QuantizationAwareTraining", "handler"]


class _Handler(Handler[QuantizationAwareTraining]):
    config = QuantizationAwareTraining
    summary = "trains with weights and activations rounded, whose scales learn too"
    reads = (
        ("train", "but for reconstruct"),
        ("selection", "but for reconstruct"),
        ("calibration", "integer activations, reconstruct"),
    )

    def check(self, step: QuantizationAwareTraining, model: Model, earlier: Sequence[Step]) -> None:
        from slimline.steps.quantization_aware.formats import check
        from slimline.training.loop import paces

        check(step, model, masked=any(before.kind == "sparse" for before in earlier))
        paces(model, step)

    def check_target(self, step: QuantizationAwareTraining, target: str, model: Model) -> None:
        from slimline.steps.quantization_aware.formats import check_target

        check_target(step, target, model)

    def perform(self, step: QuantizationAwareTraining, model: Model, context: Context) -> StepResult:
        from slimline.steps.quantization_aware.train import quantize

        return quantize(step, model, context)

    def prepare(self, step: QuantizationAwareTraining, model: Model, context: Context) -> Prepared:
        from slimline.steps.quantization_aware.train import prepare

        return prepare(step, model, context)

    def forecast_needs(self, step: QuantizationAwareTraining) -> tuple[str, ...]:
        """As of `rehearsal`."""
        return self.rehearsal(step).needs

    def forecast(self, step: QuantizationAwareTraining, model: Model, context: Context) -> Forecast:
        return super().forecast(step, model, context)

    def rehearsal(self, step: QuantizationAwareTraining) -> QuantizationAwareTraining:
        return step.model_copy(update={"epochs": 0, "delay": 0, "fold_norms": None, "samples": min(step.samples, 64)})


handler = _Handler()
