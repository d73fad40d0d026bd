"""Training that makes weights, units or activations small or zero, before a step that prunes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slimline.basics.errors import SlimlineError
from slimline.steps.base import Context, Handler, StepResult
from slimline.steps.channels.step import ChannelPruning
from slimline.steps.sparse_training.step import SparseTraining

if TYPE_CHECKING:
    from slimline.model import Model
    from slimline.recipe.step import Step
    from slimline.training.companions import Company

__all__ = ["SparseTraining", "handler"]


class _Handler(Handler[SparseTraining]):
    config = SparseTraining
    summary = "trains with a penalty that makes weights, units or activations prunable"
    reads = (("train", ""), ("selection", ""))

    def check(self, step: SparseTraining, model: Model, earlier: Sequence[Step]) -> None:
        from slimline.training.loop import paces

        paces(model, step)

    def perform(self, step: SparseTraining, model: Model, context: Context) -> StepResult:
        from slimline.steps.activations.plan import zeros_among_activations
        from slimline.steps.distillation.train import train

        trained = train(step, model, context, self.company(step, model, context))
        if step.of != "activations" or context.data is None:
            return trained
        return StepResult(
            trained.model, {**trained.record, "plan": zeros_among_activations(step, model, trained.model, context.data)}
        )

    def company(self, step: SparseTraining, student: Model, context: Context) -> Company:
        from slimline.steps.sparse_training.penalties import penalised

        if context.data is None:
            raise SlimlineError(f"{step.step} needs data: pass slimline.Data with train=(x, y) or train=(x,).")
        removal = context.following if isinstance(context.following, ChannelPruning) else None
        return penalised(step, student, context.data, context.seed, removal)

    def rehearsal(self, step: SparseTraining) -> None:
        return None


handler = _Handler()
