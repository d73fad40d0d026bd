"""Forward passes, and the backward passes to them, that torch.compile made one program of."""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from slimline.basics.errors import SlimlineError, first_line
from slimline.frameworks.torch.device import kind

Store = Callable[[str, Tensor], None]
"""Told a value of a graph when it is computed."""


def uncompilable(device: str) -> str | None:
    """Why nothing can be compiled for a device, as a clause that goes on behind "as"; None where it can."""
    if kind(device) == "mps":
        return "PyTorch compiles for the CPU and for CUDA"
    if kind(device) == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton, by which PyTorch compiles for CUDA, is not installed"
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler {compiler!r}, by which PyTorch compiles"
    return None


class Program:
    """A graph module as it is now, as one program for the shapes of its first call. Tensors are shared.

    Random numbers are those that the module itself would draw.

    Parameters
    ----------
    stores : operators of the graph that are told values, and give nothing; they are told them behind the program.
    """

    def __init__(self, module: fx.GraphModule, stores: Collection[Store]) -> None:
        graph = copy.deepcopy(module.graph)
        graph.set_codegen(fx.graph.CodeGen())
        self._told: list[tuple[Any, Any]] = []
        values = []
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target in stores:
                name, value = node.args
                self._told.append((node.target, name))
                values.append(value)
                graph.erase_node(node)
        (output,) = graph.find_nodes(op="output")
        leaves = pytree.tree_leaves(output.args[0])
        output.args = ((*leaves, *values),)
        self._count = len(leaves)
        self._run = torch.compile(fx.GraphModule(module, graph), dynamic=False, options={"fallback_random": True})
        self._shapes: list[torch.Size] | None = None

    def fits(self, tensors: Collection[Tensor]) -> bool:
        """Whether these inputs are of the shapes that it is for; before its first call all are."""
        return self._shapes is None or self._shapes == [x.shape for x in tensors]

    def __call__(self, *tensors: Tensor) -> list[Any]:
        """The leaves of what the module gives."""
        first, self._shapes = self._shapes is None, [x.shape for x in tensors]
        try:
            results = self._run(*tensors)
        except RuntimeError as reason:
            if not first:
                raise
            raise SlimlineError(
                f"PyTorch cannot compile the network ({first_line(reason)}): leave compiled out."
            ) from reason
        for (store, name), value in zip(self._told, results[self._count :], strict=True):
            store(name, value)
        return list(results[: self._count])
