"""A training step: the loop's result, and its record."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slimline.basics.errors import SlimlineError
from slimline.model.masks import held
from slimline.recipe.training import Training
from slimline.steps.base import Context, Prepared, StepResult
from slimline.training.loop import recover, taught

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


def prepare(step: Training, model: Model, context: Context) -> Prepared:
    """A network that learns from its teacher in a loop of the user's own, and how it becomes a model."""
    if context.data is None:
        raise SlimlineError(f"{step.step} needs data to know what outputs mean: pass slimline.Data with train=(x, y).")
    if step.cache is not None:
        raise SlimlineError("cache is of slimline's own loop: leave it out.")
    trainer, native = taught(model, context.teacher, step, context.data, context.seed)

    def finish() -> Model:
        return held(model.then(trainer.native(), step.model_dump(mode="json")))

    return Prepared(native, finish, masks=model.masks)
