"""Hands named activations of a GraphModule to an observer, one batch at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from slimline.basics.errors import SlimlineError
from slimline.frameworks.torch.device import CPU, computing, move, place, place_graph

Array = np.ndarray[Any, np.dtype[Any]]


def observe(
    native: fx.GraphModule,
    batches: Iterable[tuple[Array, ...]],
    values: Sequence[str],
    see: Callable[[str, Array], None],
    sources: Sequence[str] | None = None,
    device: str = CPU,
) -> None:
    """Run `native` on every batch and call ``see(name, array)`` for each value as soon as it is computed.

    `values` are fx node names. An activation is freed after its last reader, so memory stays that of one
    forward pass. The array is only valid during the call. With `sources`, the batches hold these values instead of
    the model's inputs, and only what lies between them and `values` is run. Of the weights, `device` is sent those
    that this part of the model reads.
    """
    known = {node.name for node in native.graph.nodes}
    missing = [name for name in (*values, *(sources or ())) if name not in known]
    if missing:
        raise SlimlineError(f"The model computes no value called {missing[0]!r}: read its graph again.")
    part = _between(native.graph, values, sources)
    place_graph(part, device)
    watch = _Watch(native, part, frozenset(values), see, device)
    with torch.no_grad():
        for inputs in batches:
            tensors = [move(torch.from_numpy(np.ascontiguousarray(x)), device) for x in inputs]
            with computing(device):
                watch.run(*tensors)


def _between(graph: fx.Graph, values: Sequence[str], sources: Sequence[str] | None) -> fx.Graph:
    """The part of the graph that computes `values` from `sources`, or from the model's inputs."""
    nodes = {node.name: node for node in graph.nodes}
    starts = [n.name for n in graph.nodes if n.op == "placeholder"] if sources is None else list(sources)
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
    """An interpreter, on a device, that shows the values on its list."""

    def __init__(
        self,
        native: fx.GraphModule,
        graph: fx.Graph,
        values: frozenset[str],
        see: Callable[[str, Array], None],
        device: str,
    ) -> None:
        super().__init__(native, graph=graph)
        self.values, self.see, self.device = values, see, device
        self._sent: dict[str, Any] = {}

    def fetch_attr(self, target: str) -> Any:
        """What is stored under a name, on the device; sent there once."""
        if self.device == CPU:
            return super().fetch_attr(target)
        if target not in self._sent:
            stored = super().fetch_attr(target)
            if isinstance(stored, fx.GraphModule):
                stored = copy.deepcopy(stored)
                place(stored, self.device)
            self._sent[target] = move(stored.detach(), self.device) if isinstance(stored, Tensor) else stored
        return self._sent[target]

    def run_node(self, n: fx.Node) -> Any:
        """Compute one node and show its result."""
        result = super().run_node(n)
        if n.name in self.values and isinstance(result, Tensor):
            self.see(n.name, result.detach().cpu().numpy())
        return result
