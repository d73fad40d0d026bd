"""Layers that will give way to others, fitted to them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from slimline.basics.arguments import takes
from slimline.graph import cost
from slimline.graph.edits import Edit, PutTensors, Replace
from slimline.graph.ir import Graph
from slimline.graph.matrix import LayerMatrix, matrices
from slimline.graph.operators import Operator
from slimline.model.model import is_model
from slimline.plans.base import StructuralPlan

if TYPE_CHECKING:
    from slimline.model import Model

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Replacement:
    """A layer that gives way to others.

    Attributes
    ----------
    name : under which its parts are called.
    matrix : what it was.
    operators : the parts.
    tensors : what has to be put in, of the old shapes, for the layer to compute the same: its weight, and what takes
        the change of the mean output.
    error : part of the energy of its outputs (or weights) that is lost.
    parameters, macs : of its weights before and after; MACs of the whole batch.
    """

    name: str
    matrix: LayerMatrix
    operators: tuple[Operator, ...]
    tensors: Mapping[str, Array]
    error: float
    parameters: tuple[int, int]
    macs: tuple[int, int]

    @property
    def parts(self) -> tuple[str, ...]:
        """What they are called."""
        return tuple(f"{self.name}.{i}" for i in range(len(self.operators)))

    @property
    def weights(self) -> frozenset[str]:
        """Of the layer, that are gone or have another shape."""
        return frozenset({self.matrix.weight})

    def edit(self, input: str) -> Edit:
        """What puts the parts in its place, where it reads the value `input`."""
        return Replace(self.name, input, self.matrix.output, self.operators)

    def record(self, batch: int) -> dict[str, Any]:
        """Ready for JSON; MACs of one sample of `batch`."""
        return {
            "parts": list(self.parts),
            "error": float(f"{self.error:.4g}"),
            "parameters": dict(zip(("before", "after"), self.parameters, strict=True)),
            "macs": {"before": self.macs[0] // batch, "after": self.macs[1] // batch},
        }


def inputs_after(model: Model, edits: Sequence[Edit]) -> dict[str, str]:
    """By node of a layer what it reads after edits that keep all shapes: what these compute anew has another name."""
    if not edits:
        return {}
    edited = replace(model, native=model.edit(*edits))
    return {matrix.node: matrix.input for matrix in matrices(edited.graph)}


class ReplacementPlan(StructuralPlan):
    """Layers that give way to others. `mask` and `apply` carry it out.

    Parameters
    ----------
    graph : of the model it is for.
    replacements : in graph order.
    dense : of the chosen layers that stay as they are, why.
    verb : what it does, in the history of a model.
    before : edits that keep all names and shapes and come first, in `mask` and in `apply`.
    """

    def __init__(
        self,
        graph: Graph,
        replacements: Sequence[Replacement],
        dense: Mapping[str, str],
        verb: str,
        before: Sequence[Edit] = (),
    ) -> None:
        self.graph = graph
        self.replacements = tuple(replacements)
        self.dense = dict(dense)
        self._verb = verb
        self._before = tuple(before)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the layers that change, in the order of the graph."""
        return tuple(each.name for each in self.replacements)

    @property
    def shapes(self) -> tuple[object, ...]:
        """All on which the time of what it makes of a model depends."""
        return tuple((r.name, *((type(o).__name__, o.shape) for o in r.operators)) for r in self.replacements)

    @abstractmethod
    def without(self, names: Collection[str]) -> ReplacementPlan:
        """The plan in which these layers stay."""

    @property
    def parameters(self) -> int:
        """Trained numbers that will be left."""
        return self.graph.size - sum(before - after for before, after in (r.parameters for r in self.replacements))

    @property
    def macs(self) -> int:
        """Multiply-accumulates per sample that will be left."""
        gone = sum(before - after for before, after in (r.macs for r in self.replacements))
        return cost.macs(self.graph) - gone // self.graph.batch

    @takes(model=is_model)
    def mask(self, model: Model) -> Model:
        """A new model of the same shapes that computes what `apply`'s will."""
        tensors = {name: array for each in self.replacements for name, array in each.tensors.items()}
        edits = (PutTensors(tensors), *self._before)
        return model.edited(edits, {"step": "mask", "plan": self.summary()}, self._masks(model))

    @takes(model=is_model)
    def apply(self, model: Model) -> Model:
        """A new model with the parts in the place of the layers."""
        gone = self._weights | {each.matrix.bias for each in self.replacements}
        tensors = {name: array for each in self.replacements for name, array in each.tensors.items()}
        others = {name: array for name, array in tensors.items() if name not in gone}
        # From the last to the first: what a layer reads still has its name.
        read = inputs_after(model, self._before)
        changes = [r.edit(read.get(r.matrix.node, r.matrix.input)) for r in reversed(self.replacements)]
        step = {"step": self._verb, "plan": self.summary()}
        return model.edited((PutTensors(others), *self._before, *changes), step, self._masks(model))

    @property
    def _weights(self) -> frozenset[str]:
        return frozenset().union(*(each.weights for each in self.replacements))

    def _masks(self, model: Model) -> dict[str, Array]:
        """Those of the weights that stay: what is fitted anew has no zeros where its weight had."""
        return {name: mask for name, mask in model.masks.items() if name not in self._weights}
