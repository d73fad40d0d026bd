"""Many weights share few values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from slimline.recipe.step import Step
from slimline.runtimes.base import runtime
from slimline.steps.base import Context, Forecast, Handler, StepResult
from slimline.steps.weight_sharing.step import WeightSharing

if TYPE_CHECKING:
    from slimline.model import Model
    from slimline.training.companions import Company

__all__ = ["WeightSharing", "handler"]


class _Handler(Handler[WeightSharing]):
    config = WeightSharing
    summary = "gives the weights of a layer a few values that they share (clustering)"
    reads = (("calibration", "importance by inputs"),)

    def check(self, step: WeightSharing, model: Model, earlier: Sequence[Step]) -> None:
        from slimline.steps.weight_sharing.share import chosen

        if not any(before.kind == "structural" for before in earlier):  # sizes are others by then
            chosen(model, step)

    def perform(self, step: WeightSharing, model: Model, context: Context) -> StepResult:
        from slimline.steps.weight_sharing.share import share

        shared = share(model, step, context.data, context.seed)
        record = {**step.model_dump(mode="json"), "refused": shared.refused, "sharing": shared.layers}
        if step.needs and (context.data is None or not context.data.has("calibration")):
            record["notes"] = [
                "all weights count the same, since there are no calibration samples to tell their inputs"
            ]
        return StepResult(shared.model, record)

    def forecast_needs(self, step: WeightSharing) -> tuple[str, ...]:
        """None: how many values there will be needs no sample."""
        return ()

    def forecast(self, step: WeightSharing, model: Model, context: Context) -> Forecast:
        forecast = super().forecast(step, model, context)
        what = {1: "values", 2: "pairs", 4: "fours"}[step.vector]
        lines = [
            f"{layer}: {at['values']:g} {what}, {at['bits']:.2f} bits a weight once it is packed"
            for layer, at in forecast.details["sharing"].items()
        ]
        return replace(forecast, lines=(*lines, *forecast.lines))

    def remarks(self, step: WeightSharing, target: str) -> tuple[str, ...]:
        if "shared values" in runtime(target).shrinks:
            return (f"The file for {target} holds places in palettes where they are smaller than the weights.",)
        return (f"Shared weights make no file for {target} smaller by themselves: slimline pack does.",)

    def company(self, step: WeightSharing, student: Model, context: Context) -> Company:
        from slimline.steps.weight_sharing.centroids import learned_centroids

        return learned_centroids(step, student)

    def with_strength(self, step: WeightSharing, strength: float) -> WeightSharing:
        """Codebooks of 8 to 2 bits."""
        return step.model_copy(update={"clusters": round(2 ** (8 - 6 * strength)), "overrides": {}})


handler = _Handler()
