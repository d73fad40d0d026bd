"""Single weights become zero and stay zero."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from slimline.recipe.step import Step
from slimline.steps.base import Context, Done, Handler, perform
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

    def check(self, step: SparsePruning, model: Model, earlier: Sequence[Step]) -> None:
        from slimline.steps.sparse.prune import chosen

        resized = any(before.kind == "structural" for before in earlier)  # whether a pattern fits is seen by then
        chosen(model, step.model_copy(update={"pattern": "element"}) if resized else step)

    def perform(self, step: SparsePruning, model: Model, context: Context) -> Done:
        from slimline.steps.sparse.prune import sparsify
        from slimline.steps.sparse.zeros import note

        record: dict[str, Any] = step.model_dump(mode="json")
        history = (*model.history, dict(record))
        record["zeros"] = note(step, context.target)
        if step.trains:  # the recovery that follows does it
            return Done(replace(model, history=history), record)
        for number, amount in enumerate(step.amounts, 1):
            current = step.model_copy(update={"amount": amount, "schedule": "oneshot", "rounds": 1})
            sparsified = sparsify(model, current, context.data, context.seed)
            model = sparsified.model
            if number < step.rounds and context.recovery is not None:
                model = perform(context.recovery, model, context.inner(f"round-{number}")).model
        record |= {"refused": sparsified.refused, "sparsity": sparsified.layers}
        return Done(replace(model, history=history), record)

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
