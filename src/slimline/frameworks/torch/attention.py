"""Attention written out as products and a softmax, for converters that take ``scaled_dot_product_attention`` only as
``(batch, heads, length, width)``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from slimline.frameworks.torch.operators import argument, aten, emitted, packet

_ATTENTION = aten.scaled_dot_product_attention.default
_BOUNDED = [
    "index",
    "index_select",
    "view",
    "reshape",
    "flatten",
    "permute",
    "transpose",
    "unsqueeze",
    "squeeze",
    "contiguous",
    "clone",
    "expand",
    "slice",
    "select",
    "cat",
    "stack",
    "add",
    "mul",
    "sub",
    "linear",
    "relu",
    "gelu",
    "sigmoid",
    "tanh",
    "softmax",
    "layer_norm",
    "pad",
    "to",
    "type_as",
    "detach",
    "alias",
]


def write_out(program: torch.export.ExportedProgram) -> None:
    """Replace, in place, the attention of a program that is not plainly one of batches of heads.

    Dropout is left out: what is exported infers.
    """
    held = {**program.state_dict, **program.constants}
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names |= signature.inputs_to_lifted_tensor_constants
    finite = {place for place, name in names.items() if bool(torch.isfinite(held[name]).all())}
    for node in program.graph.find_nodes(op="call_function", target=_ATTENTION):
        if not _plain(node):
            with program.graph.inserting_before(node):
                result = _Written(program.graph, node, finite).result()
            node.replace_all_uses_with(result)
            program.graph.erase_node(node)
    program.graph.lint()
    program.graph_module.recompile()


def _plain(node: fx.Node) -> bool:
    query, key, value = (argument(node, name).meta["val"].shape for name in ("query", "key", "value"))
    lead = {str(tuple(shape[:-2])) for shape in (query, key, value)}
    return len(query) == 4 and len(lead) == 1 and not argument(node, "is_causal") and not argument(node, "attn_mask")


class _Written:
    """One attention on its way to plain operators, as torch defines it; `finite` stored tensors hold no infinity."""

    def __init__(self, graph: fx.Graph, node: fx.Node, finite: set[str]) -> None:
        self.graph, self.node, self.finite = graph, node, finite

    def result(self) -> fx.Node:
        """The node that gives what the attention gave."""
        query, key, value = (argument(self.node, name) for name in ("query", "key", "value"))
        if argument(self.node, "enable_gqa"):
            heads = self.size(query, -3)
            repeat = aten.repeat_interleave.self_int
            key, value = (self.emit(repeat, x, heads // self.size(x, -3), -3) for x in (key, value))
        scale = argument(self.node, "scale")
        scale = 1 / math.sqrt(self.size(query, -1)) if scale is None else scale
        flipped = self.emit(aten.transpose.int, key, -2, -1)
        product = self.emit(aten.matmul.default, self.emit(aten.mul.Tensor, query, scale), flipped)
        mask = argument(self.node, "attn_mask")
        if mask is not None and mask.meta["val"].dtype == torch.bool:
            return self.shown(product, mask, value)
        product, hidden = self.masked(product, query, key, mask)
        weights = self.emit(aten.softmax.int, product, -1)
        if hidden is not None:
            weights = self.emit(aten.masked_fill.Scalar, weights, hidden, 0.0)
        return self.emit(aten.matmul.default, weights, value)

    def shown(self, product: fx.Node, mask: fx.Node, value: fx.Node) -> fx.Node:
        """What queries get that may look where `mask` is true; zeros where they may look at nothing.

        What is hidden is lowered by a number beside which products are lost, and so has weight 0 exactly; finite, as
        there is no softmax where all is minus infinity. Choosing between tensors of products instead, as is said
        otherwise, costs two passes over them, and LiteRT's XNNPACK does not take it.
        """
        dtype = product.meta["val"].dtype
        lowered = self.emit(aten.where.Scalar, mask, 0.0, torch.finfo(dtype).min / 2)
        weights = self.emit(aten.softmax.int, self.emit(aten.add.Tensor, product, self.typed(lowered, dtype)), -1)
        anything = self.emit(aten.amax.default, self.typed(mask, dtype), [-1], True)
        return self.emit(aten.mul.Tensor, self.emit(aten.matmul.default, weights, value), anything)

    def typed(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """As `dtype`."""
        return node if node.meta["val"].dtype == dtype else self.emit(aten.to.dtype, node, dtype)

    def masked(
        self, product: fx.Node, query: fx.Node, key: fx.Node, mask: fx.Node | None
    ) -> tuple[fx.Node, fx.Node | None]:
        """Products with their mask, and what is to be zero: where a query may look at nothing, there is no softmax."""
        if argument(self.node, "is_causal"):
            rows, columns = (self.emit(aten.arange.default, self.length(x)) for x in (query, key))
            later = self.emit(aten.lt.Tensor, self.emit(aten.unsqueeze.default, rows, -1), columns)
            return self.emit(aten.masked_fill.Scalar, product, later, -math.inf), None
        if mask is None:
            return product, None
        product = self.emit(aten.add.Tensor, product, mask)
        return product, None if self.bounded(mask) else self.emit(aten.eq.Scalar, product, -math.inf)

    def bounded(self, node: fx.Node) -> bool:
        """Whether a mask is made of stored finite numbers by operators that keep them finite."""
        if node.op == "placeholder":
            return node.name in self.finite
        return packet(node).removeprefix("aten.") in _BOUNDED and all(map(self.bounded, node.all_input_nodes))

    def size(self, node: fx.Node, dim: int) -> int:
        """A size that is fixed."""
        return int(node.meta["val"].shape[dim])

    def length(self, node: fx.Node) -> Any:
        """How many queries or keys there are, fixed or not."""
        size = node.meta["val"].shape[-2]
        return size if isinstance(size, int) else self.emit(aten.sym_size.int, node, node.meta["val"].dim() - 2)

    def emit(self, target: Any, *args: Any) -> fx.Node:
        """Add an operator."""
        return emitted(self.node, target, *args)
