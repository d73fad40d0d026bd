"""Embeddings that are stored as codes: rows are decoded when they are looked up, and not the table."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from slimline.methods.formats import Array, Format, IntegerGrid
from slimline.runtimes.forms.onnx_graph import attribute, replace


def decode_rows(graph: ir.Graph, node: ir.Node, each: Format, codes: Array, store: Callable[[Array], ir.Value]) -> bool:
    """Let all that looks up rows of the table that `node` rounds read its codes, in place; False where something else
    reads the table, its codes have fewer than 5 bits, or rows have no single scale.

    Parameters
    ----------
    each : of the table.
    codes : of it, in the type that the file has.
    store : keeps an array as an initializer.
    """
    lookups = [user for user, index in node.outputs[0].uses() if index == 0 and _is_lookup(user)]
    if not lookups or len(lookups) != len(list(node.outputs[0].uses())) or node.outputs[0].is_graph_output():
        return False
    # ONNX Runtime looks up nothing shorter than a byte.
    if not isinstance(each, IntegerGrid) or each.zero_point is not None or each.bits <= 4:
        return False
    by_row = each.scale.size > 1
    if by_row and each.scale.shape != (len(codes), *[1] * (codes.ndim - 1)):
        return False
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
    graph.remove(node, safe=True)
    return True


def _is_lookup(node: ir.Node) -> bool:
    return node.op_type == "Gather" and node.domain == "" and attribute(node, "axis", 0) == 0
