"""Tensors cut into portions along a size that is free, which torch's exporter to ONNX cannot write."""

from __future__ import annotations

import operator

import torch
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from slimline.frameworks.torch.operators import argument, aten, emitted


def slice_portions(program: torch.export.ExportedProgram) -> None:
    """Take the portions of a chunk along a free size, in place, by their first and last positions."""
    for node in program.graph.find_nodes(op="call_function", target=aten.chunk.default):
        x, dim, count = node.args[0], argument(node, "dim"), argument(node, "chunks")
        if is_concrete_int(x.meta["val"].shape[dim]):
            continue
        for part in list(node.users):
            with program.graph.inserting_before(part):
                whole = emitted(part, aten.sym_size.int, x, dim)
                size = emitted(part, operator.floordiv, emitted(part, operator.add, whole, count - 1), count)
                first, last = (emitted(part, operator.mul, size, part.args[1] + i) for i in (0, 1))
                part.replace_all_uses_with(emitted(part, aten.slice.Tensor, x, dim, first, last))
            program.graph.erase_node(part)
        program.graph.erase_node(node)
    program.graph.lint()
    program.graph_module.recompile()
