"""What quantization would put on integer grids, told without a sample and without a clock."""

from __future__ import annotations

import math
from dataclasses import replace

from slimline.graph.cost import macs, node_macs
from slimline.graph.ir import Graph
from slimline.graph.placement import Placement
from slimline.model import Model
from slimline.recipe.layers import selected
from slimline.steps.base import Forecast
from slimline.steps.quantization.calibration import placed
from slimline.steps.quantization.choices import Choices
from slimline.steps.quantization.step import StaticQuantization

_BITS = {"int8": 8, "int4": 4, "fp8_e4m3": 8}
_SCALE_BYTES = 4 + 1  # of a float scale and a zero point


def forecast(step: StaticQuantization, model: Model, target: str) -> Forecast:
    """Which layers would be integer by the placement of `target`, which not and why, and what their weights would take.

    Of the model only the norms are folded: how wide the grids are is known only of samples.
    """
    folded, placement = placed(model, step, target)
    graph = folded.graph
    costs = {n.name: (n.layer or n.name, node_macs(n, lambda v: graph.values[v].shape)) for n in graph.nodes}
    integer = sum(cost for layer, cost in costs.values() if layer in placement.layers)
    part = integer / (macs(graph) * graph.batch) if integer else 0.0
    floating = _floating(graph, placement, step, target)
    lines = [f"in {step.numbers}: {', '.join(placement.layers)}", f"these are {part:.1%} of the multiply-accumulates"]
    lines += [f"{layer} stays in float: {reason}" for layer, reason in floating.items()]
    if placement.tables:
        layers = dict.fromkeys(node.layer for name in placement.tables for node in graph.consumers()[name])
        lines.append(f"looked up in tables of int8: {', '.join(layers)}")
    if step.undo:
        lines.append(
            f"note: what turns out slower or wrong in {step.numbers} on {target} goes back to float; only a run tells"
        )
    choices, readers = Choices.of(step, graph), graph.consumers()
    types = {name: choices.of_layers([node.layer for node in readers[name]]).type for name in placement.weights}
    bits = {name: _BITS[kind] for name, kind in types.items()} | dict.fromkeys(placement.tables, _BITS["int8"])
    axes = {**placement.weights, **dict.fromkeys(placement.tables, 0)}
    return Forecast(
        replace(model, native=folded.native),
        f"puts {len(placement.layers)} layers and {len(placement.activations)} activations on grids of {target}",
        lines=tuple(lines),
        details={
            "integer_layers": list(placement.layers),
            "float_layers": floating,
            "activations": list(placement.activations),
            "integer_macs": part,
        },
        stored_bytes={
            name: math.prod(shape := graph.values[name].shape) * bits[name] // 8
            + _SCALE_BYTES * (1 if axis is None else shape[axis])
            for name, axis in axes.items()
        },
    )


def _floating(graph: Graph, placement: Placement, step: StaticQuantization, target: str) -> dict[str, str]:
    """The layers that multiply and would stay in float, with the reason."""
    reasons: dict[str, str] = {}
    choices = Choices.of(step, graph)
    for node in graph.nodes:
        layer = node.layer or node.name
        if layer in placement.layers or not node_macs(node, lambda name: graph.values[name].shape):
            continue
        if not selected((layer,), step.layers, step.keep, graph.types):
            reason = "layers and keep leave it out"
        elif (choice := choices.of_layers((layer,))).type == "float32":
            rule = (
                "the rule of first and last layers" if choice.pattern is None else f"the override of {choice.pattern!r}"
            )
            reason = f"{rule} leaves it out"
        else:
            reason = placement.refused.get(layer, f"{target} is given no {step.numbers} for {node.target or node.kind}")
        reasons.setdefault(layer, reason)
    return reasons
