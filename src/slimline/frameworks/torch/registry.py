"""The table of rules: what slimline knows of each aten operator, by name.

A rule reads a `Call` and emits neutral operators. `rule_for` finds it by overload (``aten.min.other``),
then by name (``aten.min``), then by the name without the underscore of in-place operators, which read as
their functional twins: they keep the shape, so axes pass in the same way. What is not in the table is element-wise
where torch says so of it, and unknown otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from slimline.frameworks.torch.call import Call
from slimline.frameworks.torch.operators import packet
from slimline.graph import ops

Rule = Callable[[Call], None]
RULES: dict[str, Rule] = {}


def rule_for(node: fx.Node) -> Rule:
    """The rule of an operator; `unknown` where there is none."""
    overload, name = str(node.target), packet(node)
    for key in (overload, name, name.rstrip("_")):
        if key in RULES:
            return RULES[key]
    plain = isinstance(node.target, torch._ops.OpOverload) and len(node.target._schema.returns) == 1
    pointwise = plain and torch.Tag.pointwise in node.target.tags  # type: ignore[union-attr]
    return elementwise(name.rpartition(".")[2].rstrip("_")) if pointwise else unknown


def unknown(call: Call, reason: str = "slimline has no rule for it") -> None:
    """Freeze every axis it touches."""
    call.emit("unknown", call.tensors(), ops.unknown(reason))


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule under ``aten.NAME`` for each name."""

    def register(function: Rule) -> Rule:
        RULES.update({f"aten.{name}": function for name in names})
        return function

    return register


def elementwise(function: str, first_only: bool = False) -> Rule:
    def apply(call: Call) -> None:
        names = call.tensors()[:1] if first_only else call.tensors()
        call.emit("elementwise", names, ops.elementwise([call.shape(n) for n in names], function))

    return apply


def whole(function: str, axes: Callable[[Call], Sequence[int]], inputs: int = 1) -> Rule:
    """An operator that takes some dimensions whole and leaves the others alone, in all of `inputs` and outputs."""

    def apply(call: Call) -> None:
        attributes = ops.pool(call.rank, list(axes(call)), function, inputs, len(call.outputs))
        call.emit("pool", call.tensors()[:inputs], attributes)

    return apply


def constant(call: Call) -> None:
    """Integers that neither the inputs nor the weights decide, such as positions or a causal mask."""
    call.emit("unknown", (), ops.unknown("a constant"))


def each(value: Any, spatial: int) -> tuple[int, ...]:
    """A number, or one per spatial dimension, as one per spatial dimension."""
    values = value if isinstance(value, list) else [value]
    return tuple(values if len(values) == spatial else values * spatial)
