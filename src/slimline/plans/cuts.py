"""Cuts that will be made: what single layers lose by themselves."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from slimline.basics.arguments import takes
from slimline.basics.errors import SlimlineError
from slimline.graph import cost
from slimline.graph.cuts import Cut, readers
from slimline.graph.edits import Narrow, PutTensors
from slimline.graph.ir import Graph
from slimline.graph.removal import take
from slimline.model.model import is_model
from slimline.plans.base import StructuralPlan

if TYPE_CHECKING:
    from slimline.model import Model


class CutPlan(StructuralPlan):
    """Cuts of a model's layers. Printable, JSON-serialisable; `mask` and `apply` carry them out.

    Parameters
    ----------
    graph : of the model they are for.
    cuts : one for each layer that changes.
    notes : what was left alone, and why.
    """

    def __init__(self, graph: Graph, cuts: Sequence[Cut], notes: Sequence[str] = ()) -> None:
        self.graph = graph
        self.cuts = tuple(cuts)
        self.notes = tuple(notes)

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates per sample that will be left."""
        gone = sum(self._macs(cut) - round(self._macs(cut) * cut.remaining) for cut in self.cuts)
        return cost.macs(self.graph) - gone // self.graph.batch

    def _macs(self, cut: Cut) -> int:
        return cost.node_macs(cut.reader.node, lambda name: self.graph.values[name].shape)

    @cached_property
    def parameters(self) -> int:
        """Trained numbers that will be left."""
        sizes = [(math.prod(self.graph.values[cut.reader.layer.weight].shape), cut.remaining) for cut in self.cuts]
        return self.graph.size - sum(size - round(size * remaining) for size, remaining in sizes)

    def axis_retained(self, node: str, letter: str) -> None:
        """No axis of a value loses positions."""

    def statistics(self, node: str) -> list[Any]:
        """Nothing is averaged over fewer positions."""
        return []

    @takes(model=is_model)
    def mask(self, model: Model) -> Model:
        """A new model of the same shapes, with zeros for the weights that go."""
        stored = model.parameters()
        zeroed = {}
        for cut in self.cuts:
            weight = stored[cut.reader.layer.weight]
            stay = np.zeros(weight.shape, bool)
            stay[
                np.ix_(*(np.arange(n) if k is None else k for n, k in zip(weight.shape, cut.retained, strict=True)))
            ] = True
            zeroed[cut.reader.layer.weight] = np.where(stay, weight, weight.dtype.type(0))
        return model.edited((PutTensors(zeroed),), {"step": "mask", "plan": self.summary()})

    @takes(model=is_model)
    def apply(self, model: Model) -> Model:
        """A new model whose layers read less."""
        retained = {cut.reader.layer.weight: cut.retained for cut in self.cuts}
        masks = {name: take(mask, retained.get(name, ())) for name, mask in model.masks.items()}
        return model.edited((Narrow(self.cuts),), {"step": "prune", "plan": self.summary()}, masks)

    def summary(self) -> dict[str, Any]:
        """What goes and what is left, ready for JSON."""
        return {
            "cuts": [cut.summary() for cut in self.cuts],
            "frozen": [],
            "notes": list(self.notes),
            **self.totals,
        }

    @classmethod
    def from_json(cls, text: str, model: Model) -> CutPlan:
        """The plan that `to_json` wrote, for `model`."""
        data = json.loads(text)
        return cls(model.graph, [_cut(model.graph, record) for record in data["cuts"]], data["notes"])

    def __str__(self) -> str:
        return "\n".join([self.headline, *(f"  {cut}" for cut in self.cuts), *(f"  note: {n}" for n in self.notes)])


def _cut(graph: Graph, record: Mapping[str, Any]) -> Cut:
    reader = next((r for r in readers(graph) if r.node.name == record["node"]), None)
    same = reader is not None and record.get("kernel", list(reader.layer.kernel)) == list(reader.layer.kernel)
    if reader is None or not same or record.get("channels", reader.channels) != reader.channels:
        raise SlimlineError(f"The plan cuts {record['layer']}, which the model does not have like this: plan again.")
    window = tuple((int(a), int(n), int(s)) for a, n, s in record["window"]) if "window" in record else None
    gone = set(record.get("removed", ()))
    channels = tuple(i for i in range(reader.channels) if i not in gone) if "channels" in record else None
    return Cut(reader, window, channels, record.get("error"))
