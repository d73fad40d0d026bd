"""Layers that read less: channels selected in front of them, smaller kernels."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import fx

from slimline.frameworks.base import Array
from slimline.frameworks.torch.native import Native, set_tensors, tensors, to_tensors
from slimline.frameworks.torch.operators import add_constant, argument, aten, packet, set_argument
from slimline.frameworks.torch.rewrite import take
from slimline.graph.cuts import Cut


def cut(native: Native, cuts: Sequence[Cut], example: tuple[Array, ...]) -> Native:
    """A copy in which each layer reads only what its cut leaves; it is run once on `example` to prove that it runs."""
    result = copy.deepcopy(native)
    stored = tensors(result)
    nodes = {node.name: node for node in result.graph.nodes}
    for layer_cut in cuts:
        node, source = nodes[layer_cut.reader.node.name], nodes[layer_cut.reader.layer.input]
        weight = take(stored[layer_cut.reader.layer.weight].detach(), layer_cut.retained)
        assert weight is not None  # a cut leaves something out
        set_tensors(result, [(layer_cut.reader.layer.weight, weight)])
        if layer_cut.window is not None:
            source = _shrink(result, node, source, layer_cut)
        if layer_cut.selection is not None:
            dim, index = layer_cut.selection
            name = add_constant(result, f"{node.name}_inputs", torch.from_numpy(index.astype(np.int64)))
            with result.graph.inserting_before(node):
                places = result.graph.get_attr(name)
                selected = result.graph.call_function(aten.index_select.default, (source, dim, places))
            _put_before(node, source, selected)
    result.graph.lint()
    result.recompile()
    with torch.no_grad():
        result(*to_tensors(example))
    return result


def _shrink(native: Native, node: fx.Node, source: fx.Node, layer_cut: Cut) -> fx.Node:
    """Give a convolution its smaller kernel's dilation and padding; what it reads then."""
    if isinstance(argument(node, "padding"), str):
        node.target = getattr(aten, packet(node).removeprefix("aten.")).default
    zeros = layer_cut.zeros
    set_argument(node, "dilation", list(layer_cut.dilation))
    if all(before == after >= 0 for before, after in zeros):
        set_argument(node, "padding", [before for before, _ in zeros])
        return source
    set_argument(node, "padding", [0] * len(zeros))
    flat = [n for pair in reversed(zeros) for n in pair]
    with native.graph.inserting_before(node):
        padded = native.graph.call_function(aten.constant_pad_nd.default, (source, flat, 0.0))
    _put_before(node, source, padded)
    return padded


def _put_before(node: fx.Node, source: fx.Node, replacement: fx.Node) -> None:
    """Let a layer read `replacement` instead of its input, as part of the same module."""
    node.replace_input_with(source, replacement)
    replacement.meta = {key: node.meta[key] for key in ("nn_module_stack",) if key in node.meta}
