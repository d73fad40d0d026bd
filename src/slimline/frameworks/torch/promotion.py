"""Types of operands that torch's exporter to ONNX leaves to the operator, which then knows no such pair."""

from __future__ import annotations

import torch

from slimline.frameworks.torch.operators import aten, emitted, packet


def promote(program: torch.export.ExportedProgram) -> None:
    """Bring what is subtracted from a number, in place, to the type of the result: ``1.0 - mask`` of whole numbers."""
    for node in list(program.graph.nodes):
        if packet(node) == "aten.rsub" and node.args[0].meta["val"].dtype != node.meta["val"].dtype:
            with program.graph.inserting_before(node):
                dtype = node.meta["val"].dtype
                node.update_arg(0, emitted(node, aten.to.dtype, node.args[0], dtype))
    program.graph.lint()
    program.graph_module.recompile()
