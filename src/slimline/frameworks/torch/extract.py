"""A part of a network by itself: what computes some activations from others."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from slimline.frameworks.base import Array
from slimline.frameworks.torch.native import Native, drop_unread, shapes_of, sharing, tensors
from slimline.frameworks.torch.operators import add_constant, argument, aten, packet, set_argument
from slimline.frameworks.torch.rewire import named

_DROPOUTS = ("aten.dropout", "aten.dropout_", "aten.feature_dropout", "aten.feature_dropout_", "aten.alpha_dropout")


def extract(native: Native, inputs: Sequence[str], outputs: Sequence[str], example: tuple[Array, ...]) -> Native:
    """The part of a model that computes `outputs` from `inputs`, see `slimline.graph.edits.Extract`; `example` is of
    what the whole model takes."""
    part = sharing(native)
    nodes = named(part, (*inputs, *outputs))
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for name in inputs:
        copies[nodes[name]] = graph.placeholder(name)
        copies[nodes[name]].name = name
        copies[nodes[name]].meta = dict(nodes[name].meta)
    batch = copies[nodes[inputs[0]]]
    needed, pending = set(copies), [nodes[name] for name in outputs]
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending += [] if _counts_samples(node) else node.all_input_nodes
    norms = {node.name for node in needed if _has_statistics(node)}
    ranks = {name: len(shape) for name, shape in shapes_of(native, norms, example).items()}
    for node in part.graph.nodes:
        if node not in needed or node in copies:
            continue
        if _counts_samples(node):
            copies[node] = graph.call_function(aten.sym_size.int, (batch, 0))
        elif node.name in norms:
            copies[node] = _normalised(part, graph, node, copies, ranks[node.name])
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].name, copies[node].meta = node.name, dict(node.meta)
        if packet(node) in _DROPOUTS:
            set_argument(copies[node], "p", 0.0)
    graph.output(tuple(copies[nodes[name]] for name in outputs))
    codegen: Any = copy.copy(native.graph._codegen)
    codegen.pytree_info = codegen.pytree_info._replace(
        orig_args=[f"input_{i}" for i in range(len(inputs))],
        in_spec=pytree.tree_structure((tuple(range(len(inputs))), {})),
        out_spec=pytree.tree_structure(dict.fromkeys(outputs, 0)),
    )
    graph.set_codegen(codegen)
    part.graph = graph
    drop_unread(part)
    part.meta = {**native.meta, "free": "batch" if native.free == "sizes" else native.free}
    graph.lint()
    part.recompile()
    return part


def _counts_samples(node: fx.Node) -> bool:
    """Whether it is the size of the batch."""
    return bool(node.op == "call_function" and packet(node) == "aten.sym_size" and argument(node, "dim") == 0)


def _has_statistics(node: fx.Node) -> bool:
    """Whether it is a batch norm with statistics of its own."""
    norm = node.op == "call_function" and packet(node) == "aten.batch_norm"
    return norm and argument(node, "running_mean") is not None


def _normalised(part: Native, graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, fx.Node], rank: int) -> fx.Node:
    """A batch norm by the statistics that it has, as a product and a sum of constants."""
    stored = tensors(part)

    def tensor(name: str, default: float) -> Tensor:
        source = argument(node, name)
        return torch.tensor(default) if source is None else stored[str(source.target)].detach()

    factor = tensor("weight", 1.0) * torch.rsqrt(tensor("running_var", 1.0) + float(argument(node, "eps")))
    shift = tensor("bias", 0.0) - tensor("running_mean", 0.0) * factor
    read = []
    for end, numbers in (("factor", factor), ("shift", shift)):
        name = add_constant(part, f"{node.name}_{end}", numbers.reshape(-1, *[1] * (rank - 2)))
        read.append(graph.get_attr(name))
    x = copies[argument(node, "input")]
    return graph.call_function(aten.add.Tensor, (graph.call_function(aten.mul.Tensor, (x, read[0])), read[1]))
