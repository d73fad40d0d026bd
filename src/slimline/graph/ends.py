"""Which layers are the first and the last of a network: those that fewer bits hurt most."""

from __future__ import annotations

from slimline.graph.ir import Graph, Node

_KINDS = ("conv", "linear", "einsum", "recurrent", "embedding")


def first_layers(graph: Graph) -> frozenset[str]:
    """Names of the layers with weights that read nothing which another such layer made."""
    behind: set[str] = set()
    first = set()
    for node in graph.nodes:
        reads = any(name in behind for name in node.inputs if name is not None)
        if _weighted(node, graph) and not reads:
            first.add(node.layer)
        if reads or _weighted(node, graph):
            behind.update(node.outputs)
    return frozenset(first)


def last_layers(graph: Graph) -> frozenset[str]:
    """Names of the layers with weights whose results no other such layer reads."""
    before: set[str] = set()
    last = set()
    for node in reversed(graph.nodes):
        read = any(name in before for name in node.outputs)
        if _weighted(node, graph) and not read:
            last.add(node.layer)
        if read or _weighted(node, graph):
            before.update(name for name in node.inputs if name is not None)
    return frozenset(last)


def _weighted(node: Node, graph: Graph) -> bool:
    return node.kind in _KINDS and bool(node.layer) and any(name in graph.parameters for name in node.inputs[1:])
