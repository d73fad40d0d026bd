"""A network as parts that run one behind the other: what is learned part by part needs no more than one at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from slimline.graph.blocks import WEIGHTED, Block
from slimline.graph.ir import Graph


@dataclass(frozen=True)
class Segment:
    """A run of operators.

    Attributes
    ----------
    inputs : activations that it reads of segments before it, or of the model's inputs.
    outputs : those that it makes and segments behind it, or the model's outputs, read.
    layers : the user's layers in it that read one of the weights by which the network was divided.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: tuple[str, ...]


def innermost(blocks: Iterable[Block]) -> tuple[Block, ...]:
    """The blocks that hold no other one."""
    every = tuple(blocks)
    return tuple(b for b in every if not any(other.nodes < b.nodes for other in every))


def segments(graph: Graph, weights: Collection[str], blocks: Iterable[Block] = ()) -> tuple[Segment, ...]:
    """The network in as many parts as can be, each with one of `weights` at least.

    A part begins where a block does, or an operator outside of them reads one of the weights, unless one side reads a
    parameter of the other, or what both share does not have the batch as its first dimension.
    """
    nodes = [node for node in graph.nodes if node.name not in graph.idle]
    order = {node.name: i for i, node in enumerate(nodes)}
    stored, makers, readers = set(graph.parameters), graph.producers(), graph.consumers()
    moving = set(graph.inputs)  # what follows from the inputs; the rest each part computes for itself
    for node in nodes:
        if not moving.isdisjoint(name for name in node.inputs if name is not None):
            moving.update(node.outputs)
    reads = {name: [order[r.name] for r in readers[name] if r.name in order] for name in graph.values}
    for name in graph.outputs:
        reads[name] = [*reads.get(name, ()), len(nodes)]
    made = {name: -1 if name in graph.inputs else order[makers[name].name] for name in moving}
    spans = [sorted(order[name] for name in block.nodes if name in order) for block in blocks]
    layered = {i for i, n in enumerate(nodes) if n.kind in WEIGHTED and any(name in weights for name in n.inputs)}

    def crossing(cut: int) -> list[str]:
        return [name for name, at in made.items() if at < cut and any(read >= cut for read in reads[name])]

    def possible(cut: int) -> bool:
        if any(span and span[0] < cut <= span[-1] for span in spans):
            return False
        if any(reads[name] and min(reads[name]) < cut <= max(reads[name]) for name in stored):
            return False
        shared = [name for name in crossing(cut) if any(cut <= read < len(nodes) for read in reads[name])]
        single = all(name in graph.inputs or len(makers[name].outputs) == 1 for name in shared)
        return single and all(graph.values[name].shape[:1] == (graph.batch,) for name in shared)

    cuts: list[int] = []
    for cut in sorted(layered | {span[0] for span in spans if span}):
        last = cuts[-1] if cuts else 0
        if any(last <= i < cut for i in layered) and any(i >= cut for i in layered) and possible(cut):
            cuts.append(cut)
    parts = []
    for start, end in zip([0, *cuts], [*cuts, len(nodes)], strict=True):
        inside = range(start, end)
        inputs = [n for n, at in made.items() if at < start and any(read in inside for read in reads[n])]
        inputs += [n for n in graph.inputs if start == 0 and n not in inputs and any(r in inside for r in reads[n])]
        outputs = [n for n, at in made.items() if at in inside and any(read >= end for read in reads[n])]
        layers = dict.fromkeys(nodes[i].layer for i in inside if i in layered)
        parts.append(Segment(tuple(inputs), tuple(outputs), tuple(layers)))
    return tuple(parts)
