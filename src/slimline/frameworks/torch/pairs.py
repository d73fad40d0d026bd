"""Complex numbers moved as pairs of real ones, for converters that know their arithmetic but not every move."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from slimline.frameworks.torch.operators import aten, emitted

_MOVES: Mapping[Any, Callable[..., tuple[Any, ...]]] = {
    aten.unsqueeze.default: lambda rank, dim: (dim % (rank + 1),),
    aten.select.int: lambda rank, dim, index: (dim % rank, index),
    aten.expand.default: lambda rank, sizes: ([*sizes, 2],),
}
"""What an operator takes beside its tensor once the pairs are a last dimension, by the rank before and what it took."""


def move_as_pairs(program: torch.export.ExportedProgram) -> None:
    """Let moves of complex tensors, in place, be those of their parts: ``view_as_complex(move(view_as_real(x)))``."""
    for node in list(program.graph.nodes):
        if node.op == "call_function" and node.target in _MOVES and node.meta["val"].is_complex():
            x, *rest = node.args
            with program.graph.inserting_before(node):
                pairs = emitted(node, aten.view_as_real.default, x)
                moved = emitted(node, node.target, pairs, *_MOVES[node.target](x.meta["val"].dim(), *rest))
                result = emitted(node, aten.view_as_complex.default, moved)
            node.replace_all_uses_with(result)
            program.graph.erase_node(node)
    program.graph.lint()
    program.graph_module.recompile()
