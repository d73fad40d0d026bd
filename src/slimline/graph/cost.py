"""What a graph costs: multiply-accumulates, counted from shapes."""

from __future__ import annotations

import math
from collections.abc import Callable

from slimline.graph.ir import Graph, Node

Shape = Callable[[str], tuple[int, ...]]


def macs(graph: Graph, shape: Shape | None = None) -> int:
    """Multiply-accumulates per sample of all convolutions, linear, bilinear and recurrent layers and matrix products.

    Parameters
    ----------
    shape : shape of each value; the graph's own by default (a plan gives those that will be left).
    """
    look = shape or (lambda name: graph.values[name].shape)
    return sum(node_macs(node, look) for node in graph.nodes) // graph.batch


def node_macs(node: Node, shape: Shape) -> int:
    """Multiply-accumulates of one operator for the whole batch; 0 for all that has none."""
    names = [n for n in node.inputs if n is not None]
    if node.kind == "conv":
        weight = math.prod(shape(names[1]))
        moved = shape(names[0]) if node.attributes["transposed"] else shape(node.outputs[0])
        equation = node.attributes["equation"]
        dims = equation.inputs[0] if node.attributes["transposed"] else equation.outputs[0]
        channel = next(d for d, group in enumerate(dims) if group not in ((".",), ("b",)))
        return math.prod(moved) * weight // moved[channel]
    if node.kind in ("linear", "experts"):
        return math.prod(shape(node.outputs[0])) * shape(names[0])[-1]
    if node.kind in ("matmul", "einsum", "bilinear"):
        equation = node.attributes["equation"]
        sizes: dict[str, int] = {}
        for name, dims in zip(names, equation.inputs, strict=False):
            for size, group in zip(shape(name), dims, strict=True):
                sizes[group[0]] = max(size, sizes.get(group[0], 1))
        sizes.pop("1", None)
        return math.prod(sizes.values())
    if node.kind == "recurrent":  # at every step of time, and every place of an image
        weights = sum(math.prod(shape(node.inputs[i] or "")) for i in node.attributes["kernels"])
        x, y = shape(names[0]), shape(node.outputs[0])
        steps = x[:2] if len(x) > 2 else x[:1]
        return math.prod(steps) * math.prod(y[len(y) - len(x) + 2 : -1]) * weights
    if node.kind == "attention":
        query, key, value = (shape(n) for n in names[:3])
        return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    return 0
