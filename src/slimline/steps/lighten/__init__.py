"""Layers become lighter ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from slimline.recipe.step import Step
from slimline.steps.base import Context, Handler, StepResult
from slimline.steps.lighten.step import Lighten

if TYPE_CHECKING:
    from slimline.data import Data
    from slimline.model import Model
    from slimline.steps.lighten.plan import LightPlan
    from slimline.steps.lighten.resolution import ResolutionPlan

__all__ = ["Lighten", "handler"]


class _Handler(Handler[Lighten]):
    config = Lighten
    summary = "makes convolutions separable or grouped, activations cheaper, or the image smaller"
    plans = True
    reads = (("calibration", "criterion output"),)

    def check(self, step: Lighten, model: Model, earlier: Sequence[Step]) -> None:
        from slimline.steps.lighten.plan import candidates
        from slimline.steps.lighten.resolution import plan_resolution

        if step.resolution is not None:
            plan_resolution(model, step)
            return
        # Groups may divide what pruning leaves, though not what there is yet.
        resized = step.groups is not None and any(before.kind == "structural" for before in earlier)
        candidates(model, step.model_copy(update={"groups": 1}) if resized else step)

    def plan(
        self, step: Lighten, model: Model, data: Data | None = None, seed: int = 0, target: str | None = None
    ) -> LightPlan | ResolutionPlan:
        from slimline.steps.lighten.plan import plan_lighten
        from slimline.steps.lighten.resolution import plan_resolution

        return plan_lighten(model, step, data) if step.resolution is None else plan_resolution(model, step)

    def perform(self, step: Lighten, model: Model, context: Context) -> StepResult:
        from slimline.steps.lighten.plan import LightPlan, plan_lighten
        from slimline.steps.replacing import replace_what_pays

        plan = self.plan(step, model, context.data)

        def again(back: Mapping[str, str]) -> LightPlan | ResolutionPlan:
            if isinstance(plan, LightPlan):
                return plan_lighten(model, step, context.data, plan, back)
            return plan.staying(back)

        return replace_what_pays(plan, model, step, context, again)

    def with_strength(self, step: Lighten, strength: float) -> Lighten | None:
        return None if step.convolution is None else step.model_copy(update={"ratio": strength})


handler = _Handler()
