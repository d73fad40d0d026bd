"""What all passes over an exported ONNX graph need: the operator that stands for rounding, and small changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from slimline.methods.formats import FloatFormat, Format, IntegerGrid

DOMAIN = "slimline"
FAKE_QUANTIZE = "FakeQuantize"
FLOAT_ENDS = {"float8_e4m3fn": (-448, 448)}
"""Ends by which that operator rounds to numbers of a float type, not to whole ones; no integer grid has these."""
LAYER = "slimline.layer"
"""The note on an operator that says to which layer of the user's it belongs."""
MARK = "slimline.weight"
"""The note on a stored tensor: the name by which the model knows it, where that is another."""


def rounding_ends(each: Format) -> tuple[int, int] | None:
    """The ends by which that operator rounds to a format; None where it cannot."""
    if isinstance(each, IntegerGrid):
        return each.low, each.high
    return FLOAT_ENDS.get(each.dtype) if type(each) is FloatFormat else None


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """The value of an operator's attribute."""
    held = node.attributes.get(name)
    return default if held is None else held.value


def replace(graph: ir.Graph, node: ir.Node, replacement: Sequence[ir.Node], result: ir.Value | None = None) -> None:
    """Put `replacement` in place of `node`; its one result becomes `result`, or that of the last one made."""
    graph.insert_before(node, replacement)
    new = result if result is not None else replacement[-1].outputs[0]
    old = node.outputs[0]
    if new.shape is None:
        new.shape, new.type = old.shape, old.type
    for user, index in list(old.uses()):
        user.replace_input_with(index, new)
    for index, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[index] = new
            old.name, new.name = None, old.name
    graph.remove(node, safe=True)
