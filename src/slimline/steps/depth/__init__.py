"""Whole residual blocks go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slimline.recipe.step import Step
from slimline.steps.base import Context, Handler, StepResult, perform_plan
from slimline.steps.depth.step import DepthPruning

if TYPE_CHECKING:
    from slimline.data import Data
    from slimline.model import Model
    from slimline.steps.depth.plan import DepthPlan

__all__ = ["DepthPruning", "handler"]


class _Handler(Handler[DepthPruning]):
    config = DepthPruning
    summary = "removes whole residual blocks"
    plans = True
    reads = (("calibration", "criteria similarity and error"),)

    def check(self, step: DepthPruning, model: Model, earlier: Sequence[Step]) -> None:
        self.plan(step.model_copy(update={"criterion": "l2"}), model)

    def plan(
        self, step: DepthPruning, model: Model, data: Data | None = None, seed: int = 0, target: str | None = None
    ) -> DepthPlan:
        from slimline.steps.depth.plan import plan_depth

        return plan_depth(model, step, data, seed)

    def perform(self, step: DepthPruning, model: Model, context: Context) -> StepResult:
        return perform_plan(self, step, model, context)


handler = _Handler()
