"""From a native model to the neutral graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from slimline.frameworks.base import Array
from slimline.frameworks.onnx import rules, rules_shape  # noqa: F401  # they fill the registry
from slimline.frameworks.onnx.call import Call
from slimline.frameworks.onnx.native import Native, is_standard
from slimline.frameworks.onnx.operators import biased, captured, counts, float_array, is_number
from slimline.frameworks.onnx.registry import rule_for, unknown
from slimline.frameworks.onnx.run import outline
from slimline.graph.ir import Graph, Node, Value

_STATISTICS = {("BatchNormalization", 3), ("BatchNormalization", 4)}


def read(native: Native, example: tuple[Array, ...]) -> Graph:
    """The neutral graph of a native model.

    Shapes are those of one run on `example`. Values are called as in the file, an operator like the first value that it
    makes; one of several steps gives nodes ``NAME/0``, ``NAME/1``, … before. A product and the Add of its bias are one
    linear layer. Arithmetic on sizes is left out. All stored real numbers count as trained but statistics of norms,
    single numbers, and masks with infinity.
    """
    model = native.model
    tensors = native.tensors
    values = {name: Value(name, array.shape, array.dtype.name) for name, array in tensors.items()}
    for value, array in zip(model.graph.inputs, example, strict=True):
        values[str(value.name)] = Value(str(value.name), array.shape, array.dtype.name)
    values |= outline(model, example)
    sizes = arithmetic(model.graph)
    fused = {product for node in model.graph if (product := biased(node)) is not None}
    nodes: list[Node] = []
    for node in model.graph:
        if node in fused or (node in sizes and not _measures(node)):
            for output in node.outputs:
                values.pop(str(output.name), None)
            continue
        call = Call(node, values, native.opset)
        if all(name in values for name in call.outputs):
            rule_for(node)(call)
        else:
            unknown(call, "it makes no tensors")
            for name in call.outputs:
                values.setdefault(name, Value(name, ()))
        nodes += call.emitted
    return Graph(
        nodes=tuple(nodes),
        values=values,
        parameters=tuple(tensors),
        trainable=frozenset(
            name for name, array in tensors.items() if is_trained(model.graph.initializers[name], array)
        ),
        inputs=tuple(str(v.name) for v in model.graph.inputs),
        outputs=tuple(str(v.name) for v in model.graph.outputs),
        batch=len(example[0]) if example[0].ndim else 1,
    )


def arithmetic(graph: ir.Graph) -> set[ir.Node]:
    """Operators whose results are nothing but numbers of others."""
    arithmetic: set[ir.Node] = set()
    held = {value for node in graph for value in captured(node)}
    for node in reversed(list(graph)):
        ends = [output.is_graph_output() or output in held for output in node.outputs]
        used = [
            (user in arithmetic or is_number(user, index)) for output in node.outputs for user, index in output.uses()
        ]
        if used and all(used) and not any(ends):
            arithmetic.add(node)
    return arithmetic


def _measures(node: ir.Node) -> bool:
    """Whether it takes sizes of what may be pruned, and not the batch alone."""
    return is_standard(node, "Shape", "Size") and not any(
        counts(o) for u, _ in node.outputs[0].uses() for o in u.outputs
    )


def is_trained(value: ir.Value, array: Array) -> bool:
    """Whether a stored tensor counts as trained, see `read`."""
    return float_array(array) and array.size > 1 and not is_statistic(value) and not bool(np.isneginf(array).any())


def is_statistic(value: ir.Value) -> bool:
    """Whether a stored tensor is the mean or the variance of norms, and nothing else."""
    readers = {(user.op_type, index) for user, index in value.uses()}
    return bool(readers) and readers <= _STATISTICS
