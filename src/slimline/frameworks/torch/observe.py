"""Hands named activations of a GraphModule to an observer, one batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from slimline.basics.errors import SlimlineError

Array = np.ndarray[Any, np.dtype[Any]]


def observe(
    native: fx.GraphModule,
    batches: Iterable[tuple[Array, ...]],
    values: Sequence[str],
    see: Callable[[str, Array], None],
    given: Sequence[str] | None = None,
) -> None:
    """Run `native` on every batch and call ``see(name, array)`` for each value as soon as it is computed.

    `values` are fx node names. An activation is freed after its last reader, so memory stays that of one
    forward pass. The array is only valid during the call. With `given`, the batches hold these values instead of
    the model's inputs, and only what lies between them and `values` is run.
    """
    known = {node.name for node in native.graph.nodes}
    missing = [name for name in (*values, *(given or ())) if name not in known]
    if missing:
        raise SlimlineError(f"The model computes no value called {missing[0]!r}: read its graph again.")
    watch = _Watch(native, _between(native.graph, values, given), frozenset(values), see)
    with torch.no_grad():
        for inputs in batches:
            watch.run(*(torch.from_numpy(np.ascontiguousarray(x)) for x in inputs))


def _between(graph: fx.Graph, values: Sequence[str], given: Sequence[str] | None) -> fx.Graph:
    """The part of the graph that computes `values` from `given`, or from the model's inputs."""
    nodes = {node.name: node for node in graph.nodes}
    starts = [n.name for n in graph.nodes if n.op == "placeholder"] if given is None else list(given)
    needed = set(starts)
    pending = [name for name in values if name not in needed]
    while pending:
        name = pending.pop()
        if name not in needed:
            needed.add(name)
            pending += [n.name for n in nodes[name].all_input_nodes]
    part = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for name in starts:
        copies[nodes[name]] = part.placeholder(name)
        copies[nodes[name]].name = name
    for node in graph.nodes:
        if node.name in needed and node not in copies:
            copies[node] = part.node_copy(node, copies.__getitem__)
            copies[node].name = node.name
    part.output(None)
    return part


class _Watch(fx.Interpreter):
    """An interpreter that shows the values on its list."""

    def __init__(
        self, native: fx.GraphModule, graph: fx.Graph, values: frozenset[str], see: Callable[[str, Array], None]
    ) -> None:
        super().__init__(native, graph=graph)
        self.values, self.see = values, see

    def run_node(self, n: fx.Node) -> Any:
        """Compute one node and show its result."""
        result = super().run_node(n)
        if n.name in self.values and isinstance(result, Tensor):
            self.see(n.name, result.detach().numpy())
        return result
