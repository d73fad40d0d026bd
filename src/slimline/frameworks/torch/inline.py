"""What a forward computes without gradients or autocasting is a graph within the graph: it is put in its place."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn, ops

_GRAD = ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = ops.higher_order.wrap_with_autocast
_DETACH = ops.aten.detach.default


def inline(source: fx.GraphModule) -> None:
    """Replace, in place, every block with or without gradients, or without autocasting, by its operators.

    One without gradients reads its inputs detached, so that none comes back and it may write into a weight. A parameter
    that nothing else reads is not trained: it becomes a buffer of the same name. A block that casts stays.
    """
    blocks = [n for n in source.graph.nodes if n.target is _GRAD or (n.target is _AUTOCAST and not n.args[2])]
    for node in blocks:
        _replace(source, node)
    if blocks:
        _settle(source)
        source.graph.lint()


def _replace(source: fx.GraphModule, node: fx.Node) -> None:
    graded, held, *inputs = node.args if node.target is _GRAD else (True, *node.args[4:])
    assert isinstance(held, fx.Node)
    path = str(held.target)
    block = source.get_submodule(path)
    assert isinstance(block, fx.GraphModule)
    inline(block)
    given: dict[fx.Node, Any] = dict(zip((n for n in block.graph.nodes if n.op == "placeholder"), inputs, strict=True))
    env: dict[fx.Node, Any] = {}
    with source.graph.inserting_before(node):
        for inner in block.graph.nodes:
            if inner.op == "placeholder":
                value, tensor = given[inner], isinstance(inner.meta.get("val"), torch.Tensor)
                env[inner] = value if graded or not tensor else source.graph.call_function(_DETACH, (value,))
            elif inner.op == "get_attr":
                env[inner] = source.graph.get_attr(f"{path}.{inner.target}")
            elif inner.op == "call_function":
                env[inner] = source.graph.node_copy(inner, env.__getitem__)
    made: Any = block.graph.output_node().args[0]
    answers = [given.get(_owner(n), env[n]) for n in made]
    for user in list(node.users):
        index: Any = user.args[1]
        user.replace_all_uses_with(answers[index])
        source.graph.erase_node(user)
    source.graph.erase_node(node)
    if not held.users:
        source.graph.erase_node(held)


def _owner(node: fx.Node) -> fx.Node:
    """The tensor that an operator in place writes into and answers with."""
    while isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name.endswith("_"):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _settle(source: fx.GraphModule) -> None:
    """Read what has no gradient anyway as it is; make parameters that are only read so buffers."""
    readers: dict[int, list[fx.Node]] = {}
    stored: dict[int, list[fx.Node]] = {}
    for node in source.graph.nodes:
        if node.op == "get_attr":
            owner, _, leaf = str(node.target).rpartition(".")
            value = getattr(source.get_submodule(owner), leaf)
            readers.setdefault(id(value), []).extend(node.users)
            stored.setdefault(id(value), []).append(node)
    for key, users in readers.items():
        if users and all(user.target is _DETACH for user in users):
            for node in stored[key]:
                owner, _, leaf = str(node.target).rpartition(".")
                module = source.get_submodule(owner)
                value = getattr(module, leaf)
                if isinstance(value, nn.Parameter):
                    delattr(module, leaf)
                    module.register_buffer(leaf, value.detach())
            for user in users:
                user.replace_all_uses_with(user.args[0])  # type: ignore[arg-type]
                source.graph.erase_node(user)
