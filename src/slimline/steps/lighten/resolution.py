"""A network that reads a smaller image, which it makes itself of the one that it is given."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from slimline.basics.arguments import takes
from slimline.basics.errors import SlimlineError
from slimline.graph import cost
from slimline.graph.edits import PoolInput
from slimline.graph.ir import Graph
from slimline.model.model import is_model
from slimline.plans import ReplacementPlan
from slimline.steps.lighten.step import Lighten

if TYPE_CHECKING:
    from slimline.model import Model


class ResolutionPlan(ReplacementPlan):
    """An input that becomes smaller. Printable and JSON-serialisable; `mask` and `apply` carry it out, and are the
    same: no weight changes.

    Parameters
    ----------
    graph : of the model it is for.
    pool : what is done; None where the input stays as it is.
    macs : multiply-accumulates per sample that will be left.
    dense : why the input stays as it is, if it does.
    """

    def __init__(self, graph: Graph, pool: PoolInput | None, macs: int, dense: Mapping[str, str]) -> None:
        super().__init__(graph, (), dense, "lighten")
        self.pool = pool
        self._macs = macs

    @property
    def names(self) -> tuple[str, ...]:
        """Of the input, if it changes."""
        return () if self.pool is None else (self.pool.input,)

    @property
    def shapes(self) -> tuple[object, ...]:
        return () if self.pool is None else ((self.pool.input, self.pool.factor),)

    def without(self, names: Collection[str]) -> ResolutionPlan:
        return self.staying({}) if set(names) & set(self.names) else self

    def staying(self, reasons: Mapping[str, str]) -> ResolutionPlan:
        """The plan in which the input stays as it is, and why."""
        return ResolutionPlan(self.graph, None, cost.macs(self.graph), reasons)

    @property
    def macs(self) -> int:
        return self._macs

    @takes(model=is_model)
    def mask(self, model: Model) -> Model:
        """What `apply` gives."""
        return self.apply(model)

    @takes(model=is_model)
    def apply(self, model: Model) -> Model:
        """A new model that makes its image smaller before it reads it."""
        edits = () if self.pool is None else (self.pool,)
        return model.edited(edits, {"step": "lighten", "plan": self.summary()})

    def summary(self) -> dict[str, Any]:
        """What becomes what, ready for JSON."""
        inputs = [] if self.pool is None else [{"input": self.pool.input, "divided_by": self.pool.factor}]
        return {
            "inputs": inputs,
            "dense": [{"layer": name, "reason": reason} for name, reason in self.dense.items()],
            "frozen": [],
            "notes": [],
            **self.totals,
        }

    def __str__(self) -> str:
        rows = [] if self.pool is None else [f"  {self.pool.input}: height and width divided by {self.pool.factor}"]
        return "\n".join([self.headline, *rows, *(f"  {name} stays: {reason}" for name, reason in self.dense.items())])


def plan_resolution(model: Model, step: Lighten) -> ResolutionPlan:
    """A smaller image for `model`.

    Raises
    ------
    SlimlineError : the model reads no single image, one that cannot be divided, or does not run on a smaller one.
    """
    graph, factor = model.graph, step.resolution or 1
    images = [name for name in graph.inputs if len(graph.values[name].shape) == 4]
    if len(images) != 1 or not graph.values[images[0]].dtype.startswith("float"):
        raise SlimlineError(
            f"Lighten's resolution is for models that read one image, with four dimensions, and this reads "
            f"{len(images)}: leave resolution out."
        )
    (name,) = images
    shape = graph.values[name].shape
    places = shape[2:] if model.adapter.layout == "channels_first" else shape[1:3]
    if any(size % factor for size in places):
        whole = math.gcd(*places)
        raise SlimlineError(
            f"A resolution of {factor} does not divide images of {places[0]} × {places[1]}: take a divisor of {whole}."
        )
    pool = PoolInput(name, factor)
    small = model.edited((pool,), {"step": "lighten"})
    for output in graph.outputs:
        before = graph.values[output].shape
        after = small.graph.values[small.graph.outputs[graph.outputs.index(output)]].shape
        if before != after:
            raise SlimlineError(
                f"The output {output} depends on the size of the image ({before} would be {after}): resolution is for "
                "networks that average over all places."
            )
    return ResolutionPlan(graph, pool, cost.macs(small.graph), {})
