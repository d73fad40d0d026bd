"""Numbers that a network computes anew from nothing each time, such as sinusoidal positions, become constants.

A table that is computed from positions cannot lose one; the same numbers as a stored constant can.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from slimline.frameworks.torch.native import Native
from slimline.frameworks.torch.operators import add_constant, packet

LARGEST = 2**22
"""Most numbers of a table that is stored instead of computed."""

_UNIFORM = ("aten.zeros", "aten.ones", "aten.full", "aten.empty", "aten.scalar_tensor")
_RANDOM = ("aten.rand", "aten.randn", "aten.randint", "aten.randperm", "aten.bernoulli", "aten.normal")


def fold(native: Native) -> None:
    """Store, in place, the tables of real or complex numbers that neither an input nor a stored tensor decides."""
    constant = _constants(native.graph)
    if not constant:
        return
    results: dict[fx.Node, Tensor] = {}
    with torch.no_grad():
        interpreter = fx.Interpreter(native)
        for node in native.graph.nodes:
            if node in constant:
                interpreter.env[node] = results[node] = interpreter.run_node(node)
    changed = False
    for node, result in results.items():
        read = [user for user in node.users if user not in constant]
        if read and _table(node, result):
            name = add_constant(native, node.name, result.clone(memory_format=torch.contiguous_format))
            with native.graph.inserting_after(node):
                stored = native.graph.get_attr(name)
            node.replace_all_uses_with(stored, delete_user_cb=read.__contains__)
            changed = True
    if changed:
        native.graph.eliminate_dead_code(lambda n: n not in constant)
        native.recompile()


def _table(node: fx.Node, result: object) -> bool:
    if not isinstance(result, Tensor) or packet(node) in _UNIFORM:
        return False
    real = result.is_floating_point() or result.is_complex()
    return real and result.dim() > 0 and 1 < result.numel() <= LARGEST and bool(result.isfinite().all())


def _constants(graph: fx.Graph) -> set[fx.Node]:
    """Operators on nothing but numbers, and those on their results."""
    constants: set[fx.Node] = set()
    for node in graph.nodes:
        known = all(n in constants for n in node.all_input_nodes)
        if node.op == "call_function" and known and packet(node).startswith("aten.") and packet(node) not in _RANDOM:
            constants.add(node)
    return constants
