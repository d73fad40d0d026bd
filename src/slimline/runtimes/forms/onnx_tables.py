"""Embeddings that are stored as codes: rows are decoded when they are looked up, and not the table."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from slimline.methods.formats import Array, Format, IntegerGrid
from slimline.runtimes.forms.onnx_graph import attribute, replace


def decode_rows(
    graph: ir.Graph,
    node: ir.Node,
    each: Format,
    codes: Array,
    store: Callable[[Array], ir.Value],
    alone: bool = True,
) -> ir.Value | None:
    """Let all that looks up rows of the table that `node` rounds read its codes, in place, and give these as they are
    stored; None where nothing does, its codes have fewer than 5 bits, or rows have no single scale.

    Parameters
    ----------
    each : of the table.
    codes : of it, in the type that the file has.
    store : keeps an array as an initializer.
    alone : whether nothing else may read the table.
    """
    uses = list(node.outputs[0].uses())
    lookups = [user for user, index in uses if index == 0 and is_lookup(user)]
    if not lookups or (alone and len(lookups) != len(uses)) or node.outputs[0].is_graph_output():
        return None
    # ONNX Runtime looks up nothing shorter than a byte.
    if not isinstance(each, IntegerGrid) or each.zero_point is not None or each.bits <= 4:
        return None
    by_row = each.scale.size > 1
    if by_row and each.scale.shape != (len(codes), *[1] * (codes.ndim - 1)):
        return None
    table = store(codes)
    scale = store(each.scale if by_row else each.scale.reshape(()))
    for lookup in lookups:
        indices = lookup.inputs[1]
        nodes = [ir.node("Gather", [table, indices], name=str(lookup.name))]
        nodes.append(ir.node("Cast", nodes[0].outputs, {"to": ir.DataType.FLOAT}, name=""))
        own = scale
        if by_row:
            nodes.append(ir.node("Gather", [scale, indices], name=""))
            own = nodes[-1].outputs[0]
        nodes.append(ir.node("Mul", [nodes[1].outputs[0], own], name=""))
        replace(graph, lookup, nodes)
    if len(lookups) == len(uses):
        graph.remove(node, safe=True)
    return table


def is_lookup(node: ir.Node) -> bool:
    """Whether it reads rows of its first input."""
    return node.op_type == "Gather" and node.domain == "" and attribute(node, "axis", 0) == 0
