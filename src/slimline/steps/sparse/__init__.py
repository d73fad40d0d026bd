"""Single weights become zero and stay zero."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from slimline.recipe.step import Step
from slimline.steps.base import Context, Forecast, Handler, StepResult, perform
from slimline.steps.sparse.step import SparsePruning

if TYPE_CHECKING:
    from slimline.frameworks.base import Masking
    from slimline.methods.sparsity import Axes
    from slimline.model import Model
    from slimline.training.companions import Company

log = logging.getLogger(__name__)

__all__ = ["SparsePruning", "handler"]


class _Handler(Handler[SparsePruning]):
    config = SparsePruning
    summary = "sets single weights, blocks or N of M neighbours to zero"
    reads = (("calibration", "criteria of inputs or gradients, unless it prunes while a later step trains"),)

    def check(self, step: SparsePruning, model: Model, earlier: Sequence[Step]) -> None:
        from slimline.steps.sparse.prune import chosen

        resized = any(before.kind == "structural" for before in earlier)  # whether a pattern fits is seen by then
        chosen(model, step.model_copy(update={"pattern": "element"}) if resized else step)

    def perform(self, step: SparsePruning, model: Model, context: Context) -> StepResult:
        from slimline.steps.sparse.prune import sparsify
        from slimline.steps.sparse.zeros import note

        record: dict[str, Any] = step.model_dump(mode="json")
        history = (*model.history, dict(record))
        record["zeros"] = note(step, context.target)
        if step.trains:  # the recovery that follows does it
            return StepResult(model.then(model.native, history[-1]), record)
        for number, amount in enumerate(step.amounts, 1):
            current = step.model_copy(update={"amount": amount, "schedule": "oneshot", "rounds": 1})
            sparsified = sparsify(model, current, context.data, context.seed)
            model = sparsified.model
            if number < step.rounds and context.recovery is not None:
                model = perform(context.recovery, model, context.inner(f"round-{number}")).model
        record |= {"refused": sparsified.refused, "sparsity": sparsified.layers}
        return StepResult(replace(model, history=history), record)

    def forecast(self, step: SparsePruning, model: Model, context: Context) -> Forecast:
        from slimline.steps.sparse.prune import chosen
        from slimline.steps.sparse.zeros import note

        if not step.trains:
            forecast = super().forecast(step, model, context)
            zeros = [f"{layer}: {at['sparsity']:.1%} zero" for layer, at in forecast.details["sparsity"].items()]
            return replace(forecast, lines=(*zeros, *forecast.lines, f"note: {forecast.details['zeros']}"))
        layers, refused = chosen(model, step)
        names = [matrix.layer for matrix in layers.values()]
        return Forecast(
            model,
            f"{self.summary} while the step behind it trains, which is skipped here",
            skipped=True,
            lines=(
                f"in {', '.join(names)}",
                *(f"{entry['what']}: {entry['reason']}" for entry in refused),
                f"note: {note(step, context.target)}",
            ),
            details={"layers": names, "refused": refused},
        )

    def remarks(self, step: SparsePruning, target: str) -> tuple[str, ...]:
        from slimline.steps.sparse.zeros import note

        return (note(step, target),)

    def company(self, step: SparsePruning, student: Model, context: Context) -> Company | None:
        from slimline.steps.sparse.gradual import gradual

        return gradual(step, student, context.seed) if step.trains else None

    def masking(
        self,
        step: SparsePruning,
        weights: Mapping[str, tuple[str, Axes]],
        shapes: Mapping[str, tuple[int, ...]],
        total: int | None,
        seed: int,
    ) -> Masking:
        from slimline.steps.sparse.masker import Masker
        from slimline.steps.sparse.prune import fitting

        layouts, refused = fitting(weights, step)
        for entry in refused:
            log.warning("%(what)s is not pruned: %(reason)s.", entry)
        return Masker(step, layouts, {name: shapes[name] for name in layouts}, total, seed)


handler = _Handler()
