"""Values are put on grids that a runtime computes with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slimline.basics.errors import SlimlineError
from slimline.methods.formats import IntegerGrid
from slimline.runtimes.base import runtime
from slimline.steps.base import Context, Forecast, Handler, StepResult
from slimline.steps.quantization.step import StaticQuantization

if TYPE_CHECKING:
    from slimline.model import Model

__all__ = ["StaticQuantization", "handler"]


class _Handler(Handler[StaticQuantization]):
    config = StaticQuantization
    summary = "puts weights and activations on integer grids or in FP8, calibrated on data"
    reads = (("calibration", ""),)

    def check_target(self, step: StaticQuantization, target: str, model: Model) -> None:
        from slimline.steps.quantization.calibration import grid_makers, rules_of
        from slimline.steps.quantization.choices import refuse_short_tables

        refuse_short_tables(step, model.graph)
        rules_of(step, target, model)
        grid_makers(step, target)

    def perform(self, step: StaticQuantization, model: Model, context: Context) -> StepResult:
        from slimline.steps.quantization.undo import quantize_what_pays

        if context.data is None:
            raise SlimlineError(
                "StaticQuantization needs data: pass slimline.Data with calibration or training samples."
            )
        undone = quantize_what_pays(model, step, context, gate=not context.rehearsal)
        record: dict[str, Any] = {**step.model_dump(mode="json"), "refused": undone.refused}
        if undone.record:
            record["undoing"] = undone.record
        if (quantization := undone.model.quantization) is not None:
            record["float_layers"] = dict(quantization.float_layers)
            record["integer_layers"] = list(quantization.layers)
            record["weight_bits"] = undone.bits
            record["formats"] = quantization.summary()
            notes = []
            bits = {each.bits for each in quantization.weights.values() if isinstance(each, IntegerGrid)}
            if min(bits, default=8) < 7:
                notes.append(runtime(context.target).short_weights)
            if undone.bits < 8 and undone.bits in bits:
                notes.append(
                    f"int8 weights have {undone.bits} bits, since integer kernels of {context.target} overflow with 8 "
                    "on this processor, which has no VNNI; compress on one that has for the last bit"
                )
            if undone.unclipped:
                notes.append(
                    f"{undone.unclipped} ReLU6 that hardly clipped are ReLU, so that channels could be divided"
                )
            if notes:
                record["notes"] = notes
        return StepResult(undone.model, record)

    def forecast_needs(self, step: StaticQuantization) -> tuple[str, ...]:
        """None: where grids go is a matter of the network and the target, and only how wide they are one of samples."""
        return ()

    def forecast(self, step: StaticQuantization, model: Model, context: Context) -> Forecast:
        from slimline.steps.quantization.forecast import forecast

        return forecast(step, model, context.target)

    def rehearsal(self, step: StaticQuantization) -> StaticQuantization:
        return step.model_copy(update={"samples": min(step.samples, 64), "batch_size": min(step.batch_size, 32)})


handler = _Handler()
