"""Products that have to pay: layers that make the artifact no faster as products are put back."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from slimline.data.splits import first
from slimline.steps.low_rank.plan import LowRankPlan, plan_low_rank
from slimline.steps.low_rank.step import LowRank
from slimline.steps.quantization.undo import LIGHTER, UNPAID, Terms, Timed, clocked

if TYPE_CHECKING:
    from slimline.model import Model
    from slimline.steps.base import Context


class ProductArtifacts(Timed):
    """Artifacts with some layers as products; only their shapes matter."""

    terms: ClassVar[Terms] = LIGHTER

    def __init__(self, model: Model, step: LowRank, context: Context, plan: LowRankPlan) -> None:
        data = context.data
        known = data is not None and data.has("calibration")
        batches = first(data.split("calibration"), step.samples, step.batch_size) if data and known else [model.example]
        super().__init__(model, step, context, batches)
        self._plan = plan

    @property
    def settings(self) -> tuple[object, ...]:
        return self.step.step, [(p.name, p.method, p.ranks) for p in self._plan.products]

    def layers(self) -> Sequence[str]:
        return [product.name for product in self._plan.products]

    def variant(self, back: Sequence[str]) -> Model:
        products = [product for product in self._plan.products if product.name not in back]
        return LowRankPlan(self._plan.graph, products, {}).apply(self.model)


def what_pays(plan: LowRankPlan, model: Model, step: LowRank, context: Context) -> tuple[LowRankPlan, dict[str, Any]]:
    """The plan of the products that make the artifact faster, with the reasons why the rest stays, and what it cost to
    find out, ready for JSON."""
    artifacts = ProductArtifacts(model, step, context, plan)
    if not step.undo or artifacts.runtime.elsewhere or not plan.products:  # what pays shows where artifacts run
        return plan, {}
    with tempfile.TemporaryDirectory(prefix="slimline-undo-") as folder:
        artifacts.folder = Path(folder)
        clock = clocked(artifacts, context)
    record = clock.model_dump(mode="json", exclude={"back", "slower"})
    names = artifacts.layers()
    back = dict.fromkeys(names, clock.slower) if clock.slower else dict.fromkeys(clock.back, UNPAID)
    if not back:
        return plan, record
    # What stays was fitted to make up for what went back.
    paying = plan_low_rank(model, step, context.data, dense=back)
    return paying, record
