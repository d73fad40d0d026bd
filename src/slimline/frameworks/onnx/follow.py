"""Which numbers follow a size, of those that sizes and stored tensors decide.

That numbers are the same at all sizes tried does not make them constants: one may follow a size up to a limit beyond
them. So only what moves numbers, adds and multiplies them is believed there; what any other operator makes of a number
that follows a size follows it, too.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from slimline.frameworks.onnx.operators import attribute, stored

Bools = np.ndarray[Any, np.dtype[np.bool_]]
LIMITS = frozenset({"Min", "Max", "Clip", "Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual"})
"""Operators that end the growth of a number, or compare it, place by place."""
PLACES = LIMITS | {"Div", "Mod", "And", "Or", "Not", "Where", "Floor", "Ceil", "Round", "Abs", "Sign", "Sqrt"}
"""Operators that make something else of numbers than sums and products, place by place."""
_LINEAR = frozenset({"Add", "Sub", "Mul", "Neg", "Sum", "Cast", "Identity"})
_MOVES = frozenset({"Gather", "Slice", "Concat", "Unsqueeze", "Squeeze", "Reshape", "Flatten"})
_AS_THEY_ARE = _MOVES | {"Shape", "Size", "Cast", "Identity"}
_SIMPLE = PLACES | _LINEAR | _MOVES | {"Shape", "Size"}


class Following(NamedTuple):
    """How the numbers of a value follow sizes; a single element where it changes its shape.

    Attributes
    ----------
    fixed : those that no size changes.
    doubted : those of which what is the same at all sizes tried says nothing.
    """

    fixed: Bools
    doubted: Bools


def follow(
    decided: Iterable[ir.Node], results: Sequence[Mapping[str, Any]], doubtful: Container[str]
) -> dict[ir.Value, Following]:
    """Of every decided value how its numbers follow sizes.

    Parameters
    ----------
    decided : operators on sizes and stored tensors, in their order.
    results : by name what they give, at every size tried.
    doubtful : operators of which what they make of a number that follows a size is in doubt; where all of `PLACES` are,
        any that is not known is, too.
    """
    held: dict[ir.Value, Following] = {}
    strict = "Div" in doubtful
    lengths: set[ir.Value] = set()  # sizes as they are, which are never negative
    for node in decided:
        if node.op_type in _AS_THEY_ARE and all(v is None or v in lengths or v not in held for v in node.inputs):
            lengths.update(node.outputs)
        moving = [held[v] for v in node.inputs if v is not None and v in held]
        for output in node.outputs:
            if not output.name:
                continue
            same = _same([result[str(output.name)] for result in results])
            if node.op_type in _MOVES:
                doubt = _moved(node, held, same.shape, strict)
            elif node.op_type in doubtful and not _never(node, lengths):
                doubt = _spread([f.doubted | ~f.fixed for f in moving], same.shape)
            elif node.op_type in _SIMPLE or not strict:
                doubt = _spread([f.doubted for f in moving], same.shape)
            else:
                doubt = np.full(same.shape, any(not f.fixed.all() for f in moving))
            held[output] = Following(same & ~doubt, doubt)
    return held


def _never(node: ir.Node, lengths: Container[ir.Value]) -> bool:
    """Whether an operator asks whether a size is some negative number."""
    asked = [content for v in node.inputs if (content := stored(v)) is not None]
    sizes = any(v in lengths for v in node.inputs)
    return node.op_type == "Equal" and sizes and bool(asked) and bool((asked[0] < 0).all())


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


def _moved(node: ir.Node, held: Mapping[ir.Value, Following], shape: tuple[int, ...], strict: bool) -> Bools:
    """The doubts of the input, moved as its numbers are; all where how they are moved is in doubt."""

    def of(value: ir.Value) -> Bools:
        content = stored(value)
        return held[value].doubted if content is None else np.zeros(content.shape, bool)

    everything = np.ones(shape, bool)
    inputs = [v for v in node.inputs if v is not None]
    numbers = [] if node.op_type == "Concat" else inputs[1:]
    if any(v in held and (held[v].doubted.any() or (strict and not held[v].fixed.all())) for v in numbers):
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
