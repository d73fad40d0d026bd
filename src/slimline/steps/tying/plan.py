"""Which layers share one weight, that weight, and the plan that puts it in."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from slimline.basics.arguments import takes
from slimline.basics.errors import SlimlineError
from slimline.evidence.grams import collect
from slimline.graph import cost
from slimline.graph.edits import PutTensors, Tie
from slimline.graph.ir import Graph, Node
from slimline.graph.matrix import LayerMatrix, matrices
from slimline.methods.tying import cycle, joined, lost, merged, sequence
from slimline.model.model import is_model
from slimline.plans import StructuralPlan
from slimline.recipe.layers import refuse_unmatched, selected
from slimline.steps.layer_fit import fitting_batches
from slimline.steps.tying.step import LayerTying

if TYPE_CHECKING:
    from slimline.data import Data
    from slimline.model import Model

Array = np.ndarray[Any, np.dtype[Any]]
NUMBER = re.compile(r"_?\d+")


@dataclass(frozen=True)
class Tied:
    """Layers that share one weight.

    Attributes
    ----------
    members : in graph order, two at least; the first one's tensors are those that stay.
    tensors : the shared weight, and the bias where there is one, by the names of the first.
    errors : of each member the part of the energy of its outputs (or weights) that is lost.
    """

    members: tuple[LayerMatrix, ...]
    tensors: Mapping[str, Array]
    errors: tuple[float, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the layers."""
        return tuple(member.layer for member in self.members)

    @property
    def instead(self) -> dict[str, str]:
        """By tensor that goes the one that is read instead."""
        head, *rest = self.members
        pairs = [(member.weight, head.weight) for member in rest]
        return dict(pairs + [(m.bias, head.bias) for m in rest if m.bias is not None and head.bias is not None])


class TyingPlan(StructuralPlan):
    """Layers that share one weight. Printable and JSON-serialisable, without the weights; `mask` gives each layer a
    copy of what `apply` has them share.

    Parameters
    ----------
    graph : of the model it is for.
    tied : groups of layers.
    alone : of the chosen layers that share with none, why.
    """

    def __init__(self, graph: Graph, tied: Sequence[Tied], alone: Mapping[str, str]) -> None:
        self.graph = graph
        self.tied = tuple(tied)
        self.alone = dict(alone)

    @property
    def instead(self) -> dict[str, str]:
        """By tensor that goes the one that is read instead."""
        return {old: new for group in self.tied for old, new in group.instead.items()}

    @property
    def parameters(self) -> int:
        """Trained numbers that will be left."""
        return self.graph.size - sum(math.prod(self.graph.values[name].shape) for name in self.instead)

    @property
    def macs(self) -> int:
        """Multiply-accumulates per sample, as many as before."""
        return cost.macs(self.graph)

    @takes(model=is_model)
    def mask(self, model: Model) -> Model:
        """A new model in which each layer has its own copy of what it will share."""
        copies = {old: group.tensors[new] for group in self.tied for old, new in group.instead.items()}
        return self._edited(model, "mask", PutTensors({**self._shared, **copies}))

    @takes(model=is_model)
    def apply(self, model: Model) -> Model:
        """A new model in which layers share."""
        return self._edited(model, "tie", PutTensors(self._shared), Tie(self.instead))

    def _edited(self, model: Model, verb: str, *edits: PutTensors | Tie) -> Model:
        # What is fitted anew has no zeros where its weight had.
        fitted = {*self._shared, *self.instead}
        masks = {name: mask for name, mask in model.masks.items() if name not in fitted}
        return model.edited(edits, {"step": verb, "plan": self.summary()}, masks)

    @property
    def _shared(self) -> dict[str, Array]:
        return {name: array for group in self.tied for name, array in group.tensors.items()}

    def summary(self) -> dict[str, Any]:
        """Which share, ready for JSON."""
        return {
            "tied": [
                {"layers": list(g.names), "errors": [float(f"{error:.4g}") for error in g.errors]} for g in self.tied
            ],
            "alone": [{"layer": name, "reason": reason} for name, reason in self.alone.items()],
            "frozen": [],
            "notes": [],
            **self.totals,
        }

    def __str__(self) -> str:
        rows = [
            "  " + ", ".join(f"{name} (loses {e:.2%})" for name, e in zip(g.names, g.errors, strict=True))
            for g in self.tied
        ]
        return "\n".join([self.headline, *rows, *(f"  {name} shares not: {why}" for name, why in self.alone.items())])


def plan_tying(model: Model, step: LayerTying, data: Data | None = None) -> TyingPlan:
    """Which layers of `model` share, and what.

    Raises
    ------
    SlimlineError : as `families`, or data missing.
    """
    kin, alone = families(model, step)
    layers = _Layers(model, [member for family in kin for member in family], fitting_batches(step, data))
    tied = []
    for family in kin:
        for group in layers.groups(family, step):
            if len(group) > 1:
                tied.append(layers.tied([family[i] for i in group]))
            else:
                alone[family[group[0]].layer] = "none is similar enough"
    return TyingPlan(model.graph, tied, alone)


def families(model: Model, step: LayerTying) -> tuple[list[list[LayerMatrix]], dict[str, str]]:
    """The chosen layers in families whose members could share, two at least, and why others cannot.

    Raises
    ------
    SlimlineError : a glob that matches no layer, or no two layers that could share.
    """
    graph, types = model.graph, model.graph.types
    every = matrices(graph)
    for field, globs in (("layers", step.layers), ("keep", step.keep)):
        refuse_unmatched(f"layer with a weight matrix for {field}", globs, [m.layer for m in every], types)
    nodes: dict[str, list[Node]] = {}
    for node in graph.nodes:
        nodes.setdefault(node.layer or node.name, []).append(node)
    readers = graph.consumers()
    alike: dict[tuple[Any, ...], list[LayerMatrix]] = {}
    alone = {}
    for matrix in every:
        if not selected((matrix.layer,), step.layers, step.keep, types):
            continue
        own = nodes[matrix.layer]
        reason = _refusal(graph, matrix, own, readers)
        if reason:
            alone[matrix.layer] = reason
            continue
        key: tuple[Any, ...] = (*(_settings(graph, node) for node in own), graph.values[matrix.weight].dtype)
        if step.order != "similarity":
            key = (*key, NUMBER.sub("", matrix.layer))
        alike.setdefault(key, []).append(matrix)
    for family in alike.values():
        if len(family) == 1:
            alone[family[0].layer] = "no other layer is of its type and shape"
    kin = [family for family in alike.values() if len(family) > 1]
    if not kin:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(alone.items())[:3])
        raise SlimlineError(f"No two layers can share a weight ({why or 'none has one'}): choose others.")
    return kin, alone


def _refusal(graph: Graph, matrix: LayerMatrix, own: Sequence[Node], readers: Mapping[str, Sequence[Node]]) -> str:
    """Why a layer cannot share its weight, or ''."""
    tensors = {name for name in (matrix.weight, matrix.bias) if name is not None}
    if any(len(readers[name]) > 1 for name in tensors):
        return "it shares its weights already"
    if not tensors <= graph.learning:
        return "its weights are frozen, or were not trained"
    if {name for node in own for name in node.inputs if name in graph.parameters} != tensors:
        return "it holds more than one weight and its bias"
    if matrix.bias is not None and matrix.vector(np.zeros(graph.values[matrix.bias].shape)) is None:
        return "its bias is not one number for every output"
    return ""


def _settings(graph: Graph, node: Node) -> tuple[str, ...]:
    """All that has to be equal for one operator to stand for another, but the places where it is applied."""
    shapes = [graph.values[name].shape for name in node.inputs if name in graph.parameters]
    return node.kind, node.target, repr(shapes), repr(sorted((k, repr(v)) for k, v in node.attributes.items()))


class _Layers:
    """Weights of layers, each with its bias as one more column, and the Gram matrices of their inputs."""

    def __init__(self, model: Model, layers: Sequence[LayerMatrix], batches: Sequence[tuple[np.ndarray, ...]]) -> None:
        self._stored = stored = model.parameters()
        grams = collect(model, layers, batches) if batches else {}
        self._weights, self._seconds = {}, {}
        for layer in layers:
            weight = layer.matrix(stored[layer.weight]).astype(np.float64)
            groups, _, inputs = weight.shape
            gram = grams.get(layer.node)
            second = np.tile(np.eye(inputs), (groups, 1, 1)) if gram is None else gram.second
            mean = np.zeros((groups, inputs)) if gram is None else gram.mean
            if layer.bias is not None:
                bias = layer.vector(stored[layer.bias])
                assert bias is not None  # families saw to it
                weight = np.concatenate([weight, bias[:, :, None]], axis=2)
                one = np.ones((groups, 1, 1))
                second = np.block([[second, mean[:, :, None]], [mean[:, None, :], one]])
            self._weights[layer.node], self._seconds[layer.node] = weight, second

    def groups(self, family: Sequence[LayerMatrix], step: LayerTying) -> list[tuple[int, ...]]:
        """Who of a family shares with whom."""
        if step.order == "sequence" and step.groups is not None:
            return sequence(len(family), step.groups)
        if step.order == "cycle" and step.groups is not None:
            return cycle(len(family), step.groups)

        def loss(group: tuple[int, ...]) -> float:
            return max(self._fit([family[i] for i in group])[1])

        if step.groups is not None:
            return joined(len(family), loss, step.groups)
        return joined(len(family), loss, most=1 - (step.similarity or 0.0))

    def tied(self, members: Sequence[LayerMatrix]) -> Tied:
        """They share the weight that stands best for all of them."""
        shared, errors = self._fit(members)
        head = members[0]
        tensors = {}
        old = self._stored[head.weight]
        if head.bias is not None:
            bias = self._stored[head.bias]
            tensors[head.bias] = head.as_bias(shared[:, :, -1], bias.shape).astype(bias.dtype)
            shared = shared[:, :, :-1]
        tensors[head.weight] = head.tensor(shared, old.shape).astype(old.dtype)
        return Tied(tuple(members), tensors, tuple(errors))

    def _fit(self, members: Sequence[LayerMatrix]) -> tuple[Array, list[float]]:
        weights = [self._weights[member.node] for member in members]
        seconds = [self._seconds[member.node] for member in members]
        shared = merged(weights, seconds, constant=members[0].bias is not None)
        return shared, lost(weights, seconds, shared)
