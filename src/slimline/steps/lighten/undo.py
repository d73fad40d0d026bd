"""Lighter layers that have to pay: what does not make the artifact faster is put back."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from slimline.data.splits import first
from slimline.steps.lighten.plan import LightPlan, plan_lighten
from slimline.steps.lighten.step import Lighten
from slimline.steps.quantization.undo import LIGHTER, UNPAID, Terms, Timed, clocked

if TYPE_CHECKING:
    from slimline.model import Model
    from slimline.steps.base import Context


class LightArtifacts(Timed):
    """Artifacts with some layers lighter; only their shapes matter."""

    terms: ClassVar[Terms] = LIGHTER

    def __init__(self, model: Model, step: Lighten, context: Context, names: Sequence[str]) -> None:
        data = context.data
        known = data is not None and data.has("calibration")
        batches = first(data.split("calibration"), step.samples, step.batch_size) if data and known else [model.example]
        super().__init__(model, step, context, batches)
        self._names = tuple(names)
        self._quick = step.model_copy(
            update={"criterion": "weight", "compensate": None, "error": None, "ratio": None, "samples": 1}
        )

    @property
    def settings(self) -> tuple[object, ...]:
        step = self._quick
        return step.step, self._names, step.convolution, step.multiplier, step.groups, sorted(step.functions.items())

    def layers(self) -> Sequence[str]:
        return self._names

    def variant(self, back: Sequence[str]) -> Model:
        names = set(self._names) - set(back)
        return plan_lighten(self.model, self._quick, only=names).apply(self.model)


def what_pays(plan: LightPlan, model: Model, step: Lighten, context: Context) -> tuple[LightPlan, dict[str, Any]]:
    """The plan of what makes the artifact faster, with the reasons why the rest stays, and what it cost to find out,
    ready for JSON."""
    artifacts = LightArtifacts(model, step, context, plan.names)
    if not step.undo or artifacts.runtime.elsewhere or not plan.names:  # what pays shows where artifacts run
        return plan, {}
    with tempfile.TemporaryDirectory(prefix="slimline-undo-") as folder:
        artifacts.folder = Path(folder)
        clock = clocked(artifacts, context)
    record = clock.model_dump(mode="json", exclude={"back", "slower"})
    back = dict.fromkeys(plan.names, clock.slower) if clock.slower else dict.fromkeys(clock.back, UNPAID)
    paying = plan_lighten(model, step, context.data, set(plan.names) - set(back)) if back else plan
    dense = {**plan.dense, **back}
    return LightPlan(plan.graph, plan.convolution, paying.replacements, paying.swaps, dense), record
