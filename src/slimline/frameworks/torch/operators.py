"""Operators of an fx graph: their names, their arguments, and the layers that they came from."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


def packet(node: fx.Node) -> str:
    """Name of an operator without its overload, such as ``aten.conv2d``."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target.overloadpacket)
    return getattr(node.target, "__name__", str(node.target))


def argument(node: fx.Node, name: str) -> Any:
    """An argument of an aten operator by the name in its schema, its default where it is not given."""
    for index, arg in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if arg.name == name:
            if index < len(node.args):
                return node.args[index]
            return node.kwargs.get(name, arg.default_value if arg.has_default_value() else None)
    raise KeyError(name)


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Set an argument of an aten operator by the name in its schema."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    index = names.index(name)
    if index < len(node.args):
        node.update_arg(index, value)
    else:
        node.update_kwarg(name, value)


def layer(node: fx.Node) -> str:
    """The user's name of the innermost module that called an operator."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(path) for path, *_ in stack.values()]
    return re.sub(r"@\d+", "", paths[-1]) if paths and not paths[-1].startswith("_empty") else ""


def add_constant(native: fx.GraphModule, name: str, value: Tensor) -> str:
    """Register a constant as a buffer outside the state dict; the name it got."""
    base = name.replace("/", "_").replace(".", "_")
    while hasattr(native, base):
        base += "_"
    native.register_buffer(base, value, persistent=False)
    return base


def writes(node: fx.Node) -> bool:
    """Whether an operator writes into one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def emitted(origin: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A further operator of an exported program, where its graph inserts, in the layer of `origin`."""
    node = origin.graph.call_function(target, args)
    node.meta = {k: v for k, v in origin.meta.items() if k in ("nn_module_stack", "stack_trace")}
    with origin.meta["val"].fake_mode, torch.no_grad():
        node.meta["val"] = target(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in args))
    return node
