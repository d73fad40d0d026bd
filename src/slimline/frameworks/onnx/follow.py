"""Which numbers follow a size, of those that sizes and stored tensors decide.

That numbers are the same at all sizes tried does not make them constants: one may follow a size up to a limit beyond
them. So only what moves numbers, adds and multiplies them is believed there; what any other operator makes of a number
that follows a size follows it, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from slimline.frameworks.onnx.operators import attribute, stored

_LINEAR = frozenset({"Add", "Sub", "Mul", "Neg", "Sum", "Cast", "Identity"})
_PLACES = frozenset({
    "Div", "Mod", "Min", "Max", "Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "And", "Or", "Not",
    "Where", "Floor", "Ceil", "Round", "Abs", "Sign", "Sqrt", "Clip",
})  # fmt: skip
_MOVES = frozenset({"Gather", "Slice", "Concat", "Unsqueeze", "Squeeze", "Reshape", "Flatten"})
Bools = np.ndarray[Any, np.dtype[np.bool_]]


def fixed(decided: Iterable[ir.Node], results: Sequence[Mapping[str, Any]]) -> dict[ir.Value, Bools]:
    """Of every decided value, which of its numbers no size changes; of one that changes its shape, a single False.

    Parameters
    ----------
    decided : operators on sizes and stored tensors, in their order.
    results : by name what they give, at every size tried.
    """
    held: dict[ir.Value, Bools] = {}
    doubted: dict[ir.Value, Bools] = {}
    for node in decided:
        moving = [v for v in node.inputs if v is not None and v in held]
        for output in node.outputs:
            if not output.name:
                continue
            same = _same([result[str(output.name)] for result in results])
            doubt = np.zeros(same.shape, bool)
            if node.op_type in _MOVES:
                doubt = _moved(node, held, doubted, same.shape)
            elif node.op_type in _LINEAR:
                doubt = _spread([doubted[v] for v in moving], same.shape)
            elif node.op_type in _PLACES:
                doubt = _spread([doubted[v] | ~held[v] for v in moving], same.shape)
            elif any((doubted[v] | ~held[v]).any() for v in moving):
                doubt = ~doubt
            held[output], doubted[output] = same & ~doubt, doubt
    return held


def _same(results: Sequence[Any]) -> Bools:
    first = results[0]
    if not isinstance(first, np.ndarray) or any(r.shape != first.shape for r in results):
        return np.zeros((), bool)
    same = np.ones(first.shape, bool)
    for result in results[1:]:
        equal = result == first
        if first.dtype.kind == "f":
            equal |= np.isnan(result) & np.isnan(first)
        same &= equal
    return same


def _spread(doubts: Sequence[Bools], shape: tuple[int, ...]) -> Bools:
    """Those of operands, broadcast."""
    total = np.zeros(shape, bool)
    for doubt in doubts:
        try:
            total |= np.broadcast_to(doubt, shape)
        except ValueError:
            total |= doubt.any()
    return total


def _moved(
    node: ir.Node, held: Mapping[ir.Value, Bools], doubted: Mapping[ir.Value, Bools], shape: tuple[int, ...]
) -> Bools:
    """Those of the input, moved as its numbers are; all where how they are moved follows a size."""

    def of(value: ir.Value) -> Bools:
        content = stored(value)
        return doubted[value] if content is None else np.zeros(content.shape, bool)

    everything = np.ones(shape, bool)
    inputs = [v for v in node.inputs if v is not None]
    numbers = [] if node.op_type == "Concat" else inputs[1:]
    if any(v in held and not held[v].all() for v in numbers):
        return everything
    doubts = [of(v) for v in inputs[: len(inputs) - len(numbers)]]
    if not any(doubt.any() for doubt in doubts):
        return ~everything
    axis = int(attribute(node, "axis", 0))
    moved = doubts[0]
    try:
        if node.op_type == "Concat":
            moved = np.concatenate(doubts, axis)
        elif node.op_type == "Gather" and (index := stored(numbers[0])) is not None:
            moved = moved.take(index, axis)
        elif node.op_type in ("Gather", "Slice"):
            return everything
        return moved.reshape(shape)
    except (ValueError, IndexError):
        return everything
