"""What became of every layer: its sizes before and after, and what the runtime computes it in."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from slimline.graph import cost
from slimline.measure.integers import Integers, layer_name, stored_weights
from slimline.measure.results import LayerRow, LayerState
from slimline.model import Model


@dataclasses.dataclass
class Layer:
    kind: str
    shape: tuple[int, ...]
    parameters: int
    macs: int
    width: int
    sparsity: float


def layer_rows(before: Model, after: Model, notes: Mapping[str, str], share: Integers | None) -> list[LayerRow]:
    """Every layer with weights, before and after; `share` is what the runtime executes, if it was asked."""
    old, new = weights(before), weights(after)
    floating = {} if share is None else {each.layer: each.reason for each in share.floating}
    precisions = _precisions(after, floating)
    if after.quantization is not None:
        notes = {**{layer: floating[layer] for layer in after.quantization.layers if layer in floating}, **notes}
    rows = []
    for name, layer in old.items():
        parts = () if name in new else tuple(other for other in new if other not in old and _part(other) == name)
        own = [new[each] for each in parts or (name,) if each in new]
        kinds = dict.fromkeys(precisions.get(each, "float") for each in parts or (name,))
        reasons = dict.fromkeys(notes[each] for each in (name, *parts) if each in notes)
        rows.append(
            LayerRow(
                layer=name,
                kind=layer.kind,
                before=_state(layer),
                after=_state(_together(own)) if own else None,
                parts=parts,
                precision=", ".join(kinds),
                note="; ".join([f"became {' and '.join(parts)}"] * bool(parts) + list(reasons)),
            )
        )
    return rows


def _part(name: str) -> str:
    """Of what a layer is a part, by its name: ``fc.1`` of ``fc``."""
    whole, _, number = name.rpartition(".")
    return whole if number.isdigit() else ""


def _together(parts: Sequence[Layer]) -> Layer:
    count = sum(part.parameters for part in parts)
    return dataclasses.replace(
        parts[-1],
        parameters=count,
        macs=sum(part.macs for part in parts),
        sparsity=sum(part.parameters * part.sparsity for part in parts) / max(count, 1),
    )


def _precisions(model: Model, floating: Collection[str]) -> dict[str, str]:
    """By layer what it computes in, or how its weights are stored; layers that are float altogether are left out, and
    so are those on integer grids that the runtime executes in float all the same (`floating`)."""
    quantization, graph = model.quantization, model.graph
    if quantization is None:
        return {}
    layers = [layer for layer in quantization.layers if layer not in floating]
    precisions = dict.fromkeys(layers, "int8")
    for node in graph.nodes if quantization.stored else ():
        for name in stored_weights(node, graph):
            if name in quantization.weights:
                each, layer = quantization.weights[name].describe().partition(",")[0], layer_name(node, graph)
                precisions[layer] = each if layer in layers else precisions.get(layer, f"{each} weights")
    return precisions


def _state(layer: Layer) -> LayerState:
    fields = {k: v for k, v in dataclasses.asdict(layer).items() if k != "kind"}
    return LayerState(**fields)


def weights(model: Model) -> dict[str, Layer]:
    graph, arrays = model.graph, model.parameters()
    layers: dict[str, Layer] = {}
    for node in graph.nodes:
        held = stored_weights(node, graph)
        macs = cost.node_macs(node, lambda name: graph.values[name].shape) // graph.batch
        if not held or not macs:
            continue
        name = layer_name(node, graph)
        shape = graph.values[held[0]].shape
        out = graph.values[node.outputs[0]].shape
        parameters = sum(int(np.prod(graph.values[h].shape)) for h in held)
        axis = 1 if node.kind == "conv" and node.attributes["equation"].outputs[0][1] != (".",) else -1
        layers[name] = Layer(node.kind, shape, parameters, macs, out[axis], float(np.mean(arrays[held[0]] == 0)))
    return layers
