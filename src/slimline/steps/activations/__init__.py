"""Activations that are not large become zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slimline.recipe.step import Step
from slimline.steps.activations.step import ActivationPruning
from slimline.steps.base import Context, Handler, StepResult, perform_plan

if TYPE_CHECKING:
    from slimline.data import Data
    from slimline.model import Model
    from slimline.steps.activations.plan import ActivationPlan

__all__ = ["ActivationPruning", "handler"]


class _Handler(Handler[ActivationPruning]):
    config = ActivationPruning
    summary = "raises the threshold of every ReLU"
    plans = True
    reads = (("calibration", ""),)

    def check(self, step: ActivationPruning, model: Model, earlier: Sequence[Step]) -> None:
        from slimline.steps.activations.plan import chosen

        chosen(model.graph, step)

    def plan(
        self, step: ActivationPruning, model: Model, data: Data | None = None, seed: int = 0, target: str | None = None
    ) -> ActivationPlan:
        from slimline.steps.activations.plan import plan_activations

        return plan_activations(model, step, data, seed)

    def perform(self, step: ActivationPruning, model: Model, context: Context) -> StepResult:
        return perform_plan(self, step, model, context)


handler = _Handler()
