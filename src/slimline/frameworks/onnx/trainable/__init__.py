"""An ONNX graph as a torch module that trains, operator by operator, and its weights back into the ONNX model.

Each ONNX operator has a rule (`call`) that calls torch functions in an fx graph, which torch's adapter trains as it
trains its own. Tensors have names of this module's own there: those of files would stand in generated code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from slimline.basics.errors import first_line
from slimline.frameworks.base import Array
from slimline.frameworks.onnx import sizes
from slimline.frameworks.onnx.native import Native
from slimline.frameworks.onnx.read import arithmetic
from slimline.frameworks.onnx.trainable import (  # noqa: F401  # they fill the table
    rules_elementwise,
    rules_layers,
    rules_moves,
    rules_recurrent,
)
from slimline.frameworks.onnx.trainable.call import Growth
from slimline.frameworks.onnx.trainable.call import Untrainable as Untrainable
from slimline.frameworks.torch.native import Native as Module
from slimline.frameworks.torch.native import to_tensors

TOLERANCE = 1e-4
"""How far torch may be from ONNX Runtime, as a part of the greatest number of an output."""


@dataclass(frozen=True)
class Trainable:
    """A torch module that computes what an ONNX model does.

    Attributes
    ----------
    module : native model of torch's adapter.
    tensors : names in it of weights and of norms' statistics, by their names in the ONNX model.
    values : names of its operators, by the values of the ONNX graph that they compute.
    """

    module: Module
    tensors: Mapping[str, str]
    values: Mapping[str, str]

    def named(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Arrays of the module's tensors, by the names of the ONNX model."""
        return {name: arrays[own] for name, own in self.tensors.items() if own in arrays}


def trainable(native: Native) -> Trainable:
    """The torch module of an ONNX model, once it has been compared with ONNX Runtime.

    Raises
    ------
    Untrainable : an operator, or a use of one, that has no rule; or numbers that differ.
    """
    growth = Growth(native)
    graph = native.model.graph
    numbers = arithmetic(graph)
    for node in graph:
        if node not in numbers:  # these are computed where a size asks for them
            growth.compute(node)
    growth.graph.output(tuple(growth.value(value) for value in graph.outputs))
    module = Module(growth.tensors, growth.graph)
    read = {str(node.target) for node in growth.graph.find_nodes(op="get_attr")}
    module._non_persistent_buffers_set.update(name for name in growth.constants if name in read)
    module.meta["fixed_batch"] = len(native.example[0]) if native.free == "none" and native.example[0].ndim else None
    form = Trainable(
        module.eval(),
        growth.names,
        {str(value.name): result.name for value, result in growth.values.items()},
    )
    compare(native, form.module)
    return form


def compare(native: Native, module: Module) -> None:
    """Refuse a module that computes something else than ONNX Runtime, on the example or where sizes that are free are
    others: rules take sizes from the example."""
    for inputs in _batches(native):
        try:
            with torch.no_grad():  # not by the module's own call, which prints the code of what fails
                answers = [answer.numpy() for answer in module.forward(*to_tensors(inputs))]
        except (RuntimeError, ValueError, IndexError, TypeError) as reason:
            raise Untrainable(f"PyTorch does not compute it ({first_line(reason)})") from reason
        for mine, theirs in zip(answers, native.session(inputs), strict=True):
            if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
                raise Untrainable(
                    f"as a torch module it answers {mine.dtype}{mine.shape} in place of {theirs.dtype}{theirs.shape}"
                )
            if not _alike(mine, theirs):
                raise Untrainable("as a torch module it computes other numbers than in ONNX Runtime")


def _batches(native: Native) -> list[tuple[Array, ...]]:
    """The example, and inputs in which its free sizes are others; few samples of them."""
    if native.free == "none":
        return [native.example]
    symbols, batches = sizes.probes(sizes.symbols_of(native.model.graph), native.example, native.session.takes)
    return [inputs for inputs in batches if sizes.size_of(sizes.BATCH, symbols, inputs) <= sizes.BATCHES[1]]


def _alike(mine: Array, theirs: Array) -> bool:
    if theirs.dtype.kind != "f":
        return bool(np.array_equal(mine, theirs))
    a, b = mine.astype(np.float64), theirs.astype(np.float64)
    largest = float(np.abs(b[np.isfinite(b)]).max(initial=0))
    return bool(np.allclose(a, b, rtol=0, atol=TOLERANCE * largest, equal_nan=True))
