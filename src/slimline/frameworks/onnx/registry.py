"""The table of rules: what slimline knows of each ONNX operator, by name. What is not in it is unknown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from slimline.frameworks.onnx.call import Call
from slimline.frameworks.onnx.operators import captured, scalar, standard
from slimline.graph import ops

Rule = Callable[[Call], None]
RULES: dict[str, Rule] = {}


def rule_for(node: ir.Node) -> Rule:
    """The rule of an operator; `unknown` where there is none."""
    if not standard(node):
        return lambda call: unknown(call, f"slimline knows no operators of {node.domain}")
    return RULES.get(node.op_type, unknown)


def unknown(call: Call, reason: str = "slimline has no rule for it") -> None:
    """Freeze every axis it touches, in the graphs inside of it too."""
    inside = [str(value.name) for value in captured(call.node)]
    read = dict.fromkeys(name for name in (*call.tensors(), *inside) if call.knows(name))
    call.emit("unknown", list(read), ops.unknown(reason))


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule under each name."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def elementwise(function: str, first_only: bool = False) -> Rule:
    """Element by element with broadcasting; a single stored number is part of the function, not a tensor."""

    def apply(call: Call) -> None:
        names = call.tensors()[:1] if first_only else [n for n, plain in operands(call) if not plain]
        call.emit("elementwise", names, ops.elementwise([call.shape(n) for n in names], function))

    return apply


def operands(call: Call) -> list[tuple[str, bool]]:
    """The inputs, and whether each is a mere number beside the others."""
    rank = len(call.output)
    operands = []
    for index, held in enumerate(call.node.inputs):
        if held is not None:
            content = call.constant(index)
            operands.append(
                (str(held.name), scalar(content) is not None and content is not None and content.ndim <= rank)
            )
    if all(plain for _, plain in operands):
        return [(name, False) for name, _ in operands]
    others = [len(call.shape(name)) for name, plain in operands if not plain]
    return operands if max(others) == rank else [(name, False) for name, _ in operands]


def whole(function: str, axes: Callable[[Call], Sequence[int]], inputs: int = 1) -> Rule:
    """An operator that takes some dimensions whole and leaves the others alone, in all of `inputs` and outputs."""

    def apply(call: Call) -> None:
        attributes = ops.pool(call.rank, list(axes(call)), function, inputs, len(call.outputs))
        call.emit("pool", call.tensors()[:inputs], attributes)

    return apply
