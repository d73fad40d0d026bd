"""Weights are integers, and activations become such when the model runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from slimline.recipe.step import Step
from slimline.steps.base import Context, Forecast, Handler, StepResult
from slimline.steps.dynamic_quantization.step import DynamicQuantization

if TYPE_CHECKING:
    from slimline.model import Model

__all__ = ["DynamicQuantization", "handler"]


class _Handler(Handler[DynamicQuantization]):
    config = DynamicQuantization
    summary = "computes linear layers and LSTMs in integers whose ranges are found at run time"
    reads = (("calibration", "where there are samples, to time and compare with"),)

    def check(self, step: DynamicQuantization, model: Model, earlier: Sequence[Step]) -> None:
        from slimline.steps.dynamic_quantization.quantize import check

        check(step, model)

    def check_target(self, step: DynamicQuantization, target: str, model: Model) -> None:
        from slimline.steps.dynamic_quantization.quantize import check_target

        check_target(step, target, model)

    def perform(self, step: DynamicQuantization, model: Model, context: Context) -> StepResult:
        from slimline.steps.dynamic_quantization.quantize import DynamicArtifacts, selection
        from slimline.steps.quantization.undo import what_pays

        self.check_target(step, context.target, model)
        undone = what_pays(DynamicArtifacts(model, step, context), step.undo, context, gate=not context.rehearsal)
        left = [
            {"what": layer, "reason": reason} for layer, reason in selection(model, step, context.target).left.items()
        ]
        record: dict[str, Any] = {**step.model_dump(mode="json"), "refused": [*undone.refused, *left]}
        if undone.record:
            record["undoing"] = undone.record
        if (quantization := undone.model.quantization) is not None:
            record["integer_layers"] = list(quantization.layers)
            record["weight_bits"] = undone.bits
            record["formats"] = quantization.summary()
            record["notes"] = _notes(undone.model, undone.bits, context.target)
        return StepResult(undone.model, record)

    def forecast(self, step: DynamicQuantization, model: Model, context: Context) -> Forecast:
        """Without a clock: what is slower only a run tells."""
        told = super().forecast(step.model_copy(update={"undo": False}), model, context)
        note = f"note: what turns out slower in integers on {context.target} goes back to float; only a run tells"
        return replace(told, lines=(*told.lines, note)) if step.undo else told


def _notes(model: Model, bits: int, target: str) -> list[str]:
    """What the user should know of the artifact."""
    notes = []
    if bits < 8:
        notes.append(
            f"int8 weights have {bits} bits, since integer kernels of {target} overflow with 8 on this processor, "
            "which has no VNNI; compress on one that has for the last bit"
        )
    if any(node.kind == "recurrent" for node in model.graph.nodes):
        notes.append(
            "what recurrent layers read and remember is rounded by the runtime alone; the model here has their rounded "
            "weights"
        )
    return notes


handler = _Handler()
