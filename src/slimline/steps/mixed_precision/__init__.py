"""A format for each layer, by what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from slimline.basics.errors import SlimlineError
from slimline.steps.base import Context, Handler, StepResult, handler_of
from slimline.steps.mixed_precision.step import MixedPrecision

if TYPE_CHECKING:
    from slimline.model import Model
    from slimline.steps.mixed_precision.choose import Option

__all__ = ["MixedPrecision", "handler"]


class _Handler(Handler[MixedPrecision]):
    config = MixedPrecision
    summary = "chooses a format for each layer under a limit, and gives float back where accuracy needs it"
    reads = (("calibration", ""), ("selection", "max_drop"))

    def check_target(self, step: MixedPrecision, target: str, model: Model) -> None:
        from slimline.steps.mixed_precision.latency import check_profile
        from slimline.steps.quantization.calibration import check_short, placed

        if step.max_latency is not None:
            check_profile(target)
        _, placement = placed(model, step.quantization, target)
        if "int4" in step.formats:
            check_short(target, placement.layers[0])

    def perform(self, step: MixedPrecision, model: Model, context: Context) -> StepResult:
        from slimline.data.splits import first
        from slimline.steps.mixed_precision.choose import Accuracy, Control, chosen, options, with_formats
        from slimline.steps.mixed_precision.latency import within_latency
        from slimline.steps.quantization.preparation import prepared
        from slimline.steps.quantization.undo import StaticArtifacts

        base, data = step.quantization, context.data
        if data is None:
            raise SlimlineError("MixedPrecision needs data: pass slimline.Data with calibration or training samples.")
        if step.max_drop is not None and not data.has("selection"):
            raise SlimlineError("max_drop needs selection samples: pass slimline.Data(selection=...) or a test set.")
        batches = first(data.split("calibration"), base.samples, base.batch_size)
        even = prepared(model, base, batches)
        every = options(even, step, context.target, batches)
        record: dict[str, Any] = step.model_dump(mode="json")
        if step.max_latency is not None and not context.rehearsal:
            integer = with_formats(base, dict.fromkeys(every, "int8"), model)
            artifacts = StaticArtifacts(model, integer, context)
            formats, timed = within_latency(artifacts, every, step.max_latency, context)
            record["latency"] = timed.model_dump(mode="json", include={"latency", "timed"})
        else:
            formats = chosen(every, step)
        resolved = with_formats(base, {layer: option.format for layer, option in formats.items()}, model)
        if step.max_drop is not None and not context.rehearsal:
            accuracy = Accuracy(even, data, base.batch_size)
            back, before, after = Control(even, resolved, context.target, batches, accuracy, step.max_drop).run()
            record["accuracy"] = {"back": back, "drop_before": before, "drop": after}
            resolved = with_formats(resolved, dict.fromkeys(back, "float32"), model)
        result = handler_of(resolved).perform(resolved, model, context)
        settings = {*type(step).model_fields, *type(resolved).model_fields}
        record |= {key: value for key, value in result.record.items() if key not in settings}
        record["quantization"] = resolved.model_dump(mode="json")
        formats = _outcome(formats, result.model)
        record["layers"] = {
            layer: {"format": option.format, "bytes": option.bytes, "error": float(f"{option.error:.4g}")}
            for layer, option in formats.items()
        }
        size = sum(option.bytes for option in formats.values()) / sum(4 * option.values for option in formats.values())
        if step.max_size is not None and size > step.max_size:
            record["notes"] = [
                *record.get("notes", ()),
                f"the weights take {size:.3g} of their float bytes, more than max_size={step.max_size:.3g}, since "
                "layers went back to float: see what was refused",
            ]
        return StepResult(result.model, record)

    def rehearsal(self, step: MixedPrecision) -> MixedPrecision:
        quick = handler_of(step.quantization).rehearsal(step.quantization)
        return step.model_copy(update={"quantization": quick})


def _outcome(formats: Mapping[str, Option], model: Model) -> dict[str, Option]:
    """The formats that layers were given, of those that are in float again the plain one."""
    from slimline.steps.mixed_precision.choose import Option

    layers = () if model.quantization is None else model.quantization.layers
    return {
        layer: option if layer in layers else Option("float32", option.values, 4.0 * option.values, 0.0)
        for layer, option in formats.items()
    }


handler = _Handler()
