"""What can be known of a model without changing it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from slimline.basics import arguments
from slimline.basics.arguments import takes
from slimline.graph.blocks import blocks
from slimline.graph.cost import macs, node_macs
from slimline.graph.ir import Graph
from slimline.graph.kinds import kind
from slimline.graph.placement import place
from slimline.graph.units import Units
from slimline.model.loading import load
from slimline.model.lowering import road
from slimline.model.model import Model
from slimline.model.outputs import bare_outputs
from slimline.report.printed import Printed, Row
from slimline.report.tables import Table
from slimline.runtimes.base import runtime


class InspectedLayer(Row):
    """A layer that has weights.

    Attributes
    ----------
    layer, operator : the user's name of it, and what the framework calls what it computes.
    weight : shape of its first weight.
    parameters : trained numbers in all its weights.
    macs : multiply-accumulates per sample; 0 where it multiplies nothing.
    integer : whether it can compute in INT8 on the target, or does so where the model is quantized; None where it
        multiplies nothing.
    reason : why not, or ''.
    """

    layer: str
    operator: str
    weight: tuple[int, ...]
    parameters: int
    macs: int
    integer: bool | None
    reason: str = ""


class InspectedOutput(Row):
    """What the model answers: name, shape for the example's batch and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class InspectedUnit(Row):
    """Axes that are pruned together.

    Attributes
    ----------
    name, kind : as steps name them; ``filters``, ``heads``, ``head_width``, ``mlp`` or ``embedding``.
    size : positions that may go.
    frozen : positions that can never go.
    layers : whose outputs shrink with it.
    """

    name: str
    kind: str
    size: int
    frozen: int
    layers: tuple[str, ...]


class InspectedAxis(Row):
    """An axis that cannot be pruned, and why."""

    name: str
    size: int
    reason: str


class InspectedBlock(Row):
    """A residual block that can be left out."""

    name: str
    parameters: int
    layers: tuple[str, ...]


class Inspection(Printed):
    """What a model is, and what can be done to it.

    Attributes
    ----------
    framework, target : of the model; the runtime whose integer kernels are meant.
    quantized : whether the model is on integer grids already; `InspectedLayer.integer` then says what is.
    parameters, macs : trained numbers, and multiply-accumulates per sample.
    outputs : in their order; labels and ``outputs=`` of `Data` go by these names.
    layers : that have weights, in their order.
    units : what channel pruning can make smaller.
    frozen : axes that it cannot.
    blocks : what depth pruning can leave out.
    """

    framework: str
    target: str
    quantized: bool
    parameters: int
    macs: int
    outputs: tuple[InspectedOutput, ...]
    layers: tuple[InspectedLayer, ...]
    units: tuple[InspectedUnit, ...]
    frozen: tuple[InspectedAxis, ...]
    blocks: tuple[InspectedBlock, ...]

    def tables(self) -> list[Table]:
        """Layers, units, axes that cannot be pruned, blocks where there are any."""
        integers = "INT8 as it is quantized" if self.quantized else f"INT8 on {self.target}"
        layers = [
            (
                row.layer,
                row.operator,
                " × ".join(map(str, row.weight)),
                f"{row.parameters:,}",
                f"{row.macs:,}" if row.macs else "",
                "yes" if row.integer else row.reason,
            )
            for row in self.layers
        ]
        units = [(u.name, u.kind, str(u.size), str(u.frozen or ""), ", ".join(u.layers)) for u in self.units]
        frozen = [(axis.name, str(axis.size), axis.reason) for axis in self.frozen]
        tables = [
            Table(
                f"{self.parameters:,} parameters, {self.macs:,} MACs per sample; {integers}",
                ("layer", "operator", "weight", "parameters", "MACs", "INT8"),
                layers,
                ("weight", "parameters", "MACs"),
            ),
            Table(
                "Can be pruned",
                ("unit", "axis", "positions", "frozen", "layers that shrink together"),
                units,
                ("positions", "frozen"),
            ),
            Table("Cannot be pruned", ("axis", "size", "reason"), frozen, ("size",)),
        ]
        if len(self.outputs) > 1:
            rows = [(each.name, " × ".join(map(str, each.shape)), each.dtype) for each in self.outputs]
            tables.append(Table("Outputs", ("output", "shape", "type"), rows))
        if self.blocks:
            rows = [(block.name, f"{block.parameters:,}", ", ".join(block.layers)) for block in self.blocks]
            columns = ("block", "parameters", "layers")
            tables.append(Table("Blocks that can be left out", columns, rows, ("parameters",)))
        return tables


@takes(target=arguments.optional(arguments.text))
def inspect(model: Any, target: str | None = None) -> Inspection:
    """What `model` is and what can be done to it: layers with their cost, and units, axes and blocks.

    Parameters
    ----------
    model : a `Model`, or anything else that `slimline.load` takes without example inputs.
    target : the runtime whose integer kernels count, one of ``slimline targets``; the framework's usual one by default.

    Raises
    ------
    SlimlineError : what is no model, a target that there is not or that does not take such models.
    """
    loaded = load(model)
    name = target or loaded.usual_target
    road(loaded.forms, runtime(name))
    graph = loaded.graph
    solved = Units(graph)
    return Inspection(
        framework=loaded.framework,
        target=name,
        quantized=loaded.quantization is not None,
        parameters=graph.size,
        macs=macs(graph),
        outputs=tuple(
            InspectedOutput(name=each.name, shape=each.shape, dtype=each.dtype) for each in bare_outputs(loaded)
        ),
        layers=_layers(loaded, name),
        units=tuple(
            InspectedUnit(name=u.name, kind=kind(solved, u), size=u.size, frozen=u.frozen, layers=u.layers)
            for u in solved.units
        ),
        frozen=tuple(InspectedAxis(name=axis.name, size=axis.size, reason=axis.reason) for axis in solved.frozen),
        blocks=tuple(
            InspectedBlock(name=b.name, parameters=_numbers(graph, b.parameters & graph.trainable), layers=b.layers)
            for b in blocks(graph)
        ),
    )


def _layers(model: Model, target: str) -> tuple[InspectedLayer, ...]:
    graph = model.graph
    if model.quantization is None:
        placed = place(graph, runtime(target).policy)
        integer, reasons = placed.layers, placed.refused
    else:
        integer, reasons = model.quantization.layers, model.quantization.float_layers
    rows = []
    for node in graph.nodes:
        held = [name for name in node.inputs if name in graph.trainable]
        if not held:
            continue
        cost = node_macs(node, lambda name: graph.values[name].shape) // graph.batch
        computes = node.layer in integer
        rows.append(
            InspectedLayer(
                layer=node.layer or node.name,
                operator=node.target or node.kind,
                weight=graph.values[str(held[0])].shape,
                parameters=_numbers(graph, held),
                macs=cost,
                integer=computes if cost or computes else None,
                reason="" if computes or not cost else reasons.get(node.layer, ""),
            )
        )
    return tuple(rows)


def _numbers(graph: Graph, names: Iterable[str | None]) -> int:
    return sum(math.prod(graph.values[str(name)].shape) for name in names)
