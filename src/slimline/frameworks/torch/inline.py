"""What a forward computes without gradients or autocasting is a graph within the graph: it is put in its place."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, ops

_GRAD = ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = ops.higher_order.wrap_with_autocast


def inline(source: fx.GraphModule) -> None:
    """Replace, in place, every block with or without gradients, or without autocasting, by its operators.

    What comes out of one without gradients is detached, and so is what it writes into. A block that casts stays.
    """
    for node in list(source.graph.nodes):
        if node.target is _GRAD or (node.target is _AUTOCAST and not node.args[2]):
            _replace(source, node)
    source.graph.lint()


def _replace(source: fx.GraphModule, node: fx.Node) -> None:
    enabled, held, *inputs = node.args if node.target is _GRAD else (True, *node.args[4:])
    assert isinstance(held, fx.Node)
    path = str(held.target)
    block = source.get_submodule(path)
    assert isinstance(block, fx.GraphModule)
    inline(block)
    written = {_written(n) for n in block.graph.nodes}
    bound: dict[fx.Node, Any] = dict(zip(block.graph.find_nodes(op="placeholder"), inputs, strict=True))
    env: dict[fx.Node, Any] = {}

    def free(value: Any, like: fx.Node) -> Any:
        tensor = isinstance(like.meta.get("val"), torch.Tensor)
        return source.graph.call_function(ops.aten.detach.default, (value,)) if tensor and not enabled else value

    with source.graph.inserting_before(node):
        for inner in block.graph.nodes:
            if inner.op == "placeholder":
                env[inner] = free(bound[inner], inner) if inner in written else bound[inner]
            elif inner.op == "get_attr":
                env[inner] = source.graph.get_attr(f"{path}.{inner.target}")
            elif inner.op == "call_function":
                env[inner] = source.graph.node_copy(inner, env.__getitem__)
        outputs: Any = block.graph.output_node().args[0]
        owners = [_written(n) or n for n in outputs]
        answers = [bound[o] if o in bound else free(env[n], n) for n, o in zip(outputs, owners, strict=True)]
    for user in list(node.users):
        index: Any = user.args[1]
        user.replace_all_uses_with(answers[index])
        source.graph.erase_node(user)
    source.graph.erase_node(node)
    if not held.users:
        source.graph.erase_node(held)


def _written(node: fx.Node) -> fx.Node | None:
    """The tensor that an operator in place writes into and answers with."""
    origin: Any = node
    while isinstance(origin.target, torch._ops.OpOverload) and origin.target._schema.name.endswith("_"):
        origin = origin.args[0]
    return None if origin is node else origin
