"""Layers that give way to others have to pay: what does not make the artifact faster is put back."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from slimline.data.splits import first
from slimline.plans import ReplacementPlan
from slimline.steps.base import Context, StepResult, applied
from slimline.steps.clock import Terms, Timed, clocked
from slimline.steps.fitted import FittedStep

if TYPE_CHECKING:
    from slimline.model import Model

FASTER = Terms(
    lambda gain: gain.high >= 1,
    lambda gain: gain.low <= 1,
    "the artifact with lighter layers is not measurably faster on {target}: it takes {factor:.2f} times as long",
    "unchanged_layers",
)
"""What is lighter has lost accuracy, so it stays only where the clock is for it."""
UNPAID = "putting it back did not make the artifact measurably slower"


class _Artifacts(Timed):
    """Artifacts with some layers replaced; only their shapes matter."""

    terms: ClassVar[Terms] = FASTER

    def __init__(self, plan: ReplacementPlan, model: Model, step: FittedStep, context: Context) -> None:
        data = context.data
        known = data is not None and data.has("calibration")
        batches = first(data.split("calibration"), step.samples, step.batch_size) if data and known else [model.example]
        super().__init__(model, step, context, batches)
        self._plan = plan

    @property
    def settings(self) -> tuple[object, ...]:
        return self.step.step, self._plan.shapes

    def layers(self) -> Sequence[str]:
        return self._plan.names

    def variant(self, back: Sequence[str]) -> Model:
        return self._plan.without(back).apply(self.model)


def replace_what_pays(
    plan: ReplacementPlan,
    model: Model,
    step: FittedStep,
    context: Context,
    again: Callable[[Mapping[str, str]], ReplacementPlan],
) -> StepResult:
    """The model with the replacements of a plan that make the artifact faster; the record has the reasons why the rest
    stays, and what it cost to find out.

    Parameters
    ----------
    again : the plan with some layers as they are, and why: those that stay replaced made up for what went back.
    """
    artifacts = _Artifacts(plan, model, step, context)
    undoing = None
    if step.undo and plan.names and not artifacts.runtime.elsewhere:  # what pays shows where artifacts run
        with tempfile.TemporaryDirectory(prefix="slimline-undo-") as folder:
            artifacts.folder = Path(folder)
            clock = clocked(artifacts, context)
        undoing = clock.model_dump(mode="json", exclude={"back", "slower"})
        back = dict.fromkeys(plan.names, clock.slower) if clock.slower else dict.fromkeys(clock.back, UNPAID)
        plan = again(back) if back else plan
    refused = [{"what": layer, "reason": reason} for layer, reason in plan.dense.items()]
    return applied(step, plan, model, refused, undoing)
