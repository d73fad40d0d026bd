"""A training step: the loop's result, and its record."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slimline.basics.errors import SlimlineError
from slimline.recipe.training import Training
from slimline.steps.base import Context, StepResult
from slimline.training.loop import recover

if TYPE_CHECKING:
    from slimline.model import Model
    from slimline.training.companions import Company


def train(step: Training, model: Model, context: Context, company: Company | None = None) -> StepResult:
    """Train `model` towards its teacher, with `company` beside."""
    if context.data is None:
        raise SlimlineError(f"{step.step} needs data: pass slimline.Data with train=(x, y) or train=(x,).")
    trained = recover(
        model, context.teacher, step, context.data, context.seed, context.checkpoint, context.tell, company
    )
    history = [{k: v for k, v in r.items() if k != "seconds"} for r in trained.records]
    record = {**step.model_dump(mode="json"), "best_epoch": trained.best_epoch, "history": history}
    return StepResult(trained.model, record)
