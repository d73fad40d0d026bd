"""Layers become products of smaller ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slimline.recipe.step import Step
from slimline.steps.base import Context, Handler, StepResult
from slimline.steps.low_rank.step import GOALS, LowRank

if TYPE_CHECKING:
    from slimline.data import Data
    from slimline.model import Model
    from slimline.steps.low_rank.plan import LowRankPlan

__all__ = ["LowRank", "handler"]


class _Handler(Handler[LowRank]):
    config = LowRank
    summary = "replaces layers by products of smaller ones"
    plans = True
    reads = (("calibration", "criterion output"),)

    def check(self, step: LowRank, model: Model, earlier: Sequence[Step]) -> None:
        from slimline.steps.low_rank.plan import candidates, check

        resized = any(before.kind == "structural" for before in earlier)
        (candidates if resized else check)(model, step)

    def plan(
        self, step: LowRank, model: Model, data: Data | None = None, seed: int = 0, target: str | None = None
    ) -> LowRankPlan:
        from slimline.steps.low_rank.plan import plan_low_rank

        return plan_low_rank(model, step, data)

    def perform(self, step: LowRank, model: Model, context: Context) -> StepResult:
        from slimline.steps.low_rank.plan import plan_low_rank
        from slimline.steps.replacing import replace_what_pays

        plan = self.plan(step, model, context.data)
        return replace_what_pays(
            plan, model, step, context, lambda back: plan_low_rank(model, step, context.data, back)
        )

    def with_strength(self, step: LowRank, strength: float) -> LowRank:
        return step.model_copy(update={**dict.fromkeys(GOALS), "ratio": strength})


handler = _Handler()
