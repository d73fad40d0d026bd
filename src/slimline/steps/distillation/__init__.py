"""The compressed network learns from the original."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slimline.steps.base import Context, Handler, Prepared, StepResult, handler_of
from slimline.steps.distillation.step import Distillation

if TYPE_CHECKING:
    from slimline.model import Model
    from slimline.recipe.step import Step

__all__ = ["Distillation", "handler"]


class _Handler(Handler[Distillation]):
    config = Distillation
    summary = "trains the network towards the original's outputs"
    reads = (("train", ""), ("selection", ""))

    def check(self, step: Distillation, model: Model, earlier: Sequence[Step]) -> None:
        from slimline.training.loop import paces

        paces(model, step)

    def perform(self, step: Distillation, model: Model, context: Context) -> StepResult:
        from slimline.steps.distillation.train import train

        beside = None if context.before is None else handler_of(context.before).company(context.before, model, context)
        return train(step, model, context, beside)

    def prepare(self, step: Distillation, model: Model, context: Context) -> Prepared:
        from slimline.steps.distillation.train import prepare

        return prepare(step, model, context)

    def rehearsal(self, step: Distillation) -> None:
        return None


handler = _Handler()
