"""Layers that compute together what one computes become one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slimline.recipe.step import Step
from slimline.steps.base import Context, Handler, StepResult, perform_plan
from slimline.steps.merging.step import MergeLayers

if TYPE_CHECKING:
    from slimline.data import Data
    from slimline.model import Model
    from slimline.steps.merging.plan import MergePlan

__all__ = ["MergeLayers", "handler"]


class _Handler(Handler[MergeLayers]):
    config = MergeLayers
    summary = "makes parallel and consecutive linear layers one, exactly"
    plans = True

    def check(self, step: MergeLayers, model: Model, earlier: Sequence[Step]) -> None:
        from slimline.steps.merging.plan import check

        check(model, step)

    def plan(
        self, step: MergeLayers, model: Model, data: Data | None = None, seed: int = 0, target: str | None = None
    ) -> MergePlan:
        from slimline.steps.merging.plan import plan_merging

        return plan_merging(model, step)

    def perform(self, step: MergeLayers, model: Model, context: Context) -> StepResult:
        return perform_plan(self, step, model, context)


handler = _Handler()
