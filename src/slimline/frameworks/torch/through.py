"""Gradients that an exported program has no use for."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from slimline.frameworks.torch.operators import aten


def drop_straight_through(program: torch.export.ExportedProgram) -> None:
    """Let ``y.detach() + (x - x.detach())``, in place, be `y`: what rounds straight-through has the numbers of `y`."""
    for node in list(program.graph.nodes):
        rounded = _rounded(node)
        if rounded is not None:
            node.replace_all_uses_with(rounded)
    program.graph.eliminate_dead_code()
    program.graph.lint()
    program.graph_module.recompile()


def _rounded(node: fx.Node) -> fx.Node | None:
    if node.target is not aten.add.Tensor or node.kwargs:
        return None
    detached, nothing = node.args
    of: Any = _detached(detached)
    if of is None or not isinstance(nothing, fx.Node) or nothing.target is not aten.sub.Tensor or nothing.kwargs:
        return None
    x, same = nothing.args
    return of if _detached(same) is x else None


def _detached(node: Any) -> Any:
    return node.args[0] if isinstance(node, fx.Node) and node.target is aten.detach.default else None
