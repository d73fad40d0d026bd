"""Activations of a network that can become another function, and what that loses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from slimline.graph.ir import Graph, Node
from slimline.methods.activations import FUNCTIONS
from slimline.steps.lighten.step import ALIASES

if TYPE_CHECKING:
    from slimline.model import Model


@dataclass(frozen=True)
class Activation:
    """A value that is a function of one other.

    Attributes
    ----------
    name : the layer's; where that is of other things too, the value's.
    value, input : names of the values.
    function : its plain name.
    """

    name: str
    value: str
    input: str
    function: str
    layer: str


def activations(graph: Graph) -> list[Activation]:
    """In graph order. ``x · sigmoid(x)`` is one, its sigmoid none if nothing else reads it."""
    producers, readers = graph.producers(), graph.consumers()
    nonlinear: list[tuple[Node, str, str]] = []
    inside: set[str] = set()
    for node in graph.nodes:
        if node.kind != "elementwise" or len(node.outputs) != 1:
            continue
        inputs = list(dict.fromkeys(i for i in node.inputs if i is not None and i not in graph.parameters))
        function = ALIASES.get(node.attributes["function"], node.attributes["function"])
        if function == "mul" and len(inputs) == 2:
            for x, gate in (inputs, inputs[::-1]):
                if _sigmoid_of(producers.get(gate), x):
                    nonlinear.append((node, x, "silu"))
                    inside |= {gate} if len(readers[gate]) == 1 and gate not in graph.outputs else set()
        elif len(inputs) == 1:
            nonlinear.append((node, inputs[0], function))
    named = [node.layer for node in graph.nodes]
    return [
        Activation(
            node.layer if node.layer and named.count(node.layer) == 1 else node.outputs[0],
            node.outputs[0],
            x,
            function,
            node.layer,
        )
        for node, x, function in nonlinear
        if node.outputs[0] not in inside and graph.values[x].shape == graph.values[node.outputs[0]].shape
    ]


def _sigmoid_of(node: Node | None, x: str) -> bool:
    return (
        node is not None
        and node.kind == "elementwise"
        and node.attributes["function"] == "sigmoid"
        and node.inputs[0] == x
    )


def errors(
    model: Model, chosen: Mapping[str, tuple[Activation, str]], batches: Sequence[tuple[np.ndarray, ...]]
) -> dict[str, float]:
    """By value the part of its energy that another function of its input loses on the samples."""
    if not chosen or not batches:
        return {}
    lost, total = dict.fromkeys(chosen, 0.0), dict.fromkeys(chosen, 0.0)
    seen: dict[str, np.ndarray] = {}

    def see(name: str, array: np.ndarray[Any, Any]) -> None:
        seen[name] = np.array(array, np.float32)

    values = list(dict.fromkeys(name for a, _ in chosen.values() for name in (a.input, a.value)))
    for batch in batches:
        seen.clear()
        model.adapter.observe(model.native, [batch], values, see)
        for name, (activation, function) in chosen.items():
            before, after = seen[activation.value], FUNCTIONS[function](seen[activation.input])
            lost[name] += float(np.square(before - after, dtype=np.float64).sum())
            total[name] += float(np.square(before, dtype=np.float64).sum())
    return {name: lost[name] / (total[name] or 1.0) for name in chosen}
