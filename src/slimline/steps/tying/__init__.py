"""Layers share one weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slimline.recipe.step import Step
from slimline.steps.base import Context, Handler, StepResult, perform_plan
from slimline.steps.tying.step import LayerTying

if TYPE_CHECKING:
    from slimline.data import Data
    from slimline.model import Model
    from slimline.steps.tying.plan import TyingPlan

__all__ = ["LayerTying", "handler"]


class _Handler(Handler[LayerTying]):
    config = LayerTying
    summary = "lets layers of one shape share one weight"
    plans = True
    reads = (("calibration", "criterion output"),)

    def check(self, step: LayerTying, model: Model, earlier: Sequence[Step]) -> None:
        from slimline.steps.tying.plan import families

        if not any(before.kind == "structural" for before in earlier):  # shapes are others by then
            families(model, step)

    def plan(
        self, step: LayerTying, model: Model, data: Data | None = None, seed: int = 0, target: str | None = None
    ) -> TyingPlan:
        from slimline.steps.tying.plan import plan_tying

        return plan_tying(model, step, data)

    def perform(self, step: LayerTying, model: Model, context: Context) -> StepResult:
        return perform_plan(self, step, model, context)


handler = _Handler()
