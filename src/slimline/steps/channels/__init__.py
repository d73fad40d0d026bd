"""Positions of axes go: channels, heads, widths; and what single layers lose by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slimline.recipe.step import Step
from slimline.steps.base import Context, Handler, StepResult
from slimline.steps.channels.step import ChannelPruning

if TYPE_CHECKING:
    from slimline.data import Data
    from slimline.model import Model
    from slimline.plans import CutPlan, Plan

__all__ = ["ChannelPruning", "handler"]


class _Handler(Handler[ChannelPruning]):
    config = ChannelPruning
    summary = "removes channels, heads and widths wherever they are carried"
    plans = True
    reads = (("calibration", "criteria of inputs or gradients, compensation"),)

    def check(self, step: ChannelPruning, model: Model, earlier: Sequence[Step]) -> None:
        plain: dict[str, Any] = {"criterion": "l2", "compensate": False, "schedule": "oneshot", "rounds": 1}
        if step.round_to == "auto":
            plain["round_to"] = 1
        if any(before.kind == "structural" for before in earlier):  # the sizes are others by then
            plain |= {"ratio": 0.5, "target_macs": None, "target_parameters": None}
        self.plan(step.model_copy(update=plain), model)

    def plan(
        self, step: ChannelPruning, model: Model, data: Data | None = None, seed: int = 0, target: str | None = None
    ) -> Plan | CutPlan:
        from slimline.steps.channels.cutting import plan_cuts
        from slimline.steps.channels.selection import plan

        return plan(model, step, data, seed, target) if step.cut is None else plan_cuts(model, step, data, seed)

    def perform(self, step: ChannelPruning, model: Model, context: Context) -> StepResult:
        from slimline.steps.channels.rounds import prune

        return prune(self, step, model, context)

    def with_strength(self, step: ChannelPruning, strength: float) -> ChannelPruning:
        return step.model_copy(update={"ratio": strength, "target_macs": None, "target_parameters": None})

    def rehearsal(self, step: ChannelPruning) -> ChannelPruning:
        return step.model_copy(update={"schedule": "oneshot", "rounds": 1})


handler = _Handler()
