"""What is known of ONNX operators without their rules: which inputs are numbers, attributes, constants."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from slimline.frameworks.base import Array

NUMBERS: dict[str, frozenset[int]] = {
    **{name: frozenset({1}) for name in (
        "Reshape", "Expand", "Split", "Tile", "Squeeze", "Unsqueeze", "TopK", "Trilu", "CumSum")},
    **{f"Reduce{name}": frozenset({1}) for name in (
        "Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")},
    "Slice": frozenset({1, 2, 3, 4}),
    "Pad": frozenset({1, 2, 3}),
    "Clip": frozenset({1, 2}),
    "Resize": frozenset({1, 2, 3}),
    "ConstantOfShape": frozenset({0}),
    "Dropout": frozenset({1, 2}),
    "QuantizeLinear": frozenset({1, 2}),
    "DequantizeLinear": frozenset({1, 2}),
}  # fmt: skip
"""Inputs that hold sizes, positions or limits: by operator their indices. They are no values of the neutral graph."""

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators whose second input is a weight where it is stored."""

QUANTIZED = frozenset({
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger",
    "MatMulInteger", "QGemm", "QAttention", "MatMulNBits", "DynamicQuantizeMatMul", "MatMulIntegerToFloat",
    "DynamicQuantizeLSTM", "QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearGlobalAveragePool", "QLinearSigmoid",
    "QLinearAveragePool", "QLinearLeakyRelu", "QLinearSoftmax", "FakeQuantize", "GatherBlockQuantized", "QMoE",
})  # fmt: skip
"""Operators that only a quantized model has."""

SIZES, BATCH = "slimline_sizes", "slimline_batch"
"""Values that the canonical form adds where numbers count the batch: the sizes of an input, and the first of them."""

OWN = "slimline.low_high"
"""The note on an operator with which slimline rounds: the least and the largest integer."""
_SCOPES = "pkg.torch.onnx.name_scopes"


def standard(node: ir.Node) -> bool:
    """Whether an operator is of ONNX' own domain."""
    return node.domain in ("", "ai.onnx")


def label(node: ir.Node) -> str:
    """An operator's name, with its domain where that is not ONNX' own."""
    return node.op_type if standard(node) else f"{node.domain}::{node.op_type}"


def named(node: ir.Node) -> str:
    """What the neutral graph calls an operator: the first value that it makes."""
    return next((str(output.name) for output in node.outputs if output.name), "")


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The value of an attribute; text as text."""
    held = node.attributes.get(name)
    return default if held is None else held.value


def stored(value: ir.Value | None) -> Array | None:
    """The content of an initializer; None for anything else."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    content: Array = value.const_value.numpy()
    return content


def nested(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs that an operator holds."""
    for held in node.attributes.values():
        if held.type == ir.AttributeType.GRAPH:
            yield held.value
        elif held.type == ir.AttributeType.GRAPHS:
            yield from held.value


def captured(node: ir.Node) -> list[ir.Value]:
    """What the graphs inside an operator read of the graph around it, each once."""
    outer: dict[ir.Value, None] = {}
    for graph in nested(node):
        inside = {*graph.inputs, *graph.initializers.values()}
        for inner in graph:
            inside.update(inner.outputs)
            read = [*(v for v in inner.inputs if v is not None), *captured(inner)]
            outer.update(dict.fromkeys(v for v in read if v not in inside))
        outer.update(dict.fromkeys(v for v in graph.outputs if v not in inside))
    return list(outer)


def layer(node: ir.Node) -> str:
    """The user's name of the layer that an operator belongs to.

    What its weight is called, without the last part; else the module that torch's exporters note, or the path that
    others write into the operator's name; else that name.
    """
    weight = root(node.inputs[1]) if node.op_type in (*WEIGHTED, "Einsum") and len(node.inputs) > 1 else None
    if weight is not None and (owner := str(weight.name).rpartition(".")[0]):
        return owner
    if node.op_type == "Add" and (product := biased(node)) is not None:
        return layer(product)
    scopes = [part.strip(" '\"") for part in node.metadata_props.get(_SCOPES, "").strip("[]").split(",")]
    if len(scopes) > 1 and scopes[-2]:
        return scopes[-2]
    name = node.name or ""
    parts = name.strip("/").split("/")[:-1]
    if not parts:
        return name
    if not name.startswith("/"):
        return "/".join(parts)
    path = parts[0]
    for part in parts[1:]:  # torch writes /layer1/layer1.0/conv1/Conv
        path = part if part.startswith(f"{path.rpartition('.')[2]}.") and "." not in path else f"{path}.{part}"
    return path


def biased(node: ir.Node) -> ir.Node | None:
    """The product with a stored matrix to which an Add adds a bias, if nothing else reads the product."""
    if node.op_type != "Add" or not standard(node) or len(node.inputs) != 2:
        return None
    for position in (0, 1):
        product, bias = node.inputs[position], node.inputs[1 - position]
        source = None if product is None else product.producer()
        if product is None or source is None or source.op_type != "MatMul" or not standard(source):
            continue
        weight, vector = root(source.inputs[1]), root(bias)
        if weight is None or vector is None or weight.shape is None or vector.shape is None:
            continue
        alone = len(product.uses()) == 1 and not product.is_graph_output()
        fits = len(weight.shape) == 2 and tuple(vector.shape) == (weight.shape[1],)
        if alone and fits and root(source.inputs[0]) is None:
            return source
    return None


def root(value: ir.Value | None) -> ir.Value | None:
    """The initializer that a value is, or is rounded from; None where it is computed."""
    source = None if value is None else value.producer()
    while source is not None and source.op_type in ("QuantizeLinear", "DequantizeLinear"):
        value = source.inputs[0]
        source = None if value is None else value.producer()
    return value if value is not None and value.is_initializer() and value.const_value is not None else None


def is_number(node: ir.Node, index: int) -> bool:
    """Whether an input holds sizes, positions or limits."""
    return standard(node) and index in NUMBERS.get(node.op_type, ())


def float_array(array: Array) -> bool:
    """Whether an array holds real numbers, of any width."""
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"


def scalar(array: Array | None) -> float | None:
    """The number that an array of one element holds."""
    return None if array is None or array.size != 1 else float(np.asarray(array).ravel()[0])


class Affine(NamedTuple):
    """Numbers as ``factor * slope // divisor + start``, where `factor` follows sizes of the inputs alone.

    `factor` is None where the slope is zero, and `divisor` 1 but where a plan made part of a number go.
    """

    slope: Array
    start: Array
    divisor: Array
    factor: ir.Value | None


def affine(value: ir.Value | None) -> Affine | None:
    """How the numbers of a value follow sizes of the inputs; None where that is not told."""
    content = stored(value)
    if content is not None:
        return Affine(np.zeros_like(content), content, np.ones_like(content), None)
    node = None if value is None else value.producer()
    if node is None:
        return None
    if node.op_type == "Cast" or (node.op_type == "Reshape" and str(value and value.name).endswith("_number")):
        return affine(node.inputs[0])
    start = divisor = None
    if node.op_type == "Add":
        start, node = _second(node)
    if node is not None and node.op_type == "Div":
        divisor, node = _second(node)
    if node is None or node.op_type != "Mul" or (slope := stored(node.inputs[1])) is None:
        return None
    own = re.fullmatch(r".*_scaled(_\d+)?", str(node.outputs[0].name)) is not None  # as the canonical form calls them
    factor = node.inputs[0]
    source = None if factor is None else factor.producer()
    follows = own and ((source is not None and measured(source) is not None) or follows_sizes(factor))
    if slope.ndim != 1 or not (counts(factor) or follows):
        return None
    zeros = np.zeros_like(slope)
    return Affine(slope, zeros if start is None else start, zeros + 1 if divisor is None else divisor, node.inputs[0])


def _second(node: ir.Node) -> tuple[Array | None, ir.Node | None]:
    """The stored second input of an operator, and what makes the first."""
    second, first = stored(node.inputs[1]), node.inputs[0]
    return second, None if first is None or second is None else first.producer()


def follows_sizes(value: ir.Value | None) -> bool:
    """Whether a value is computed of nothing but stored numbers, the batch, and sizes as `measured` tells them."""
    node = None if value is None else value.producer()
    if value is None or value.is_initializer() or counts(value):
        return value is not None
    if node is None or not standard(node) or any(True for _ in nested(node)):
        return False
    source = node.inputs[0].producer() if node.op_type == "Mul" and node.inputs[0] is not None else None
    if source is not None and measured(source) is not None:
        return True
    return bool(node.inputs) and all(v is None or follows_sizes(v) for v in node.inputs)


def measured(node: ir.Node) -> list[int] | None:
    """The dimensions whose sizes are computed with, of a Shape all of whose readers leave the others out by a factor of
    0; None for any other operator."""
    if node.op_type != "Shape" or not standard(node) or node.outputs[0].is_graph_output():
        return None
    first = int(attribute(node, "start", 0))
    dims: set[int] = set()
    for user, index in node.outputs[0].uses():
        factor = stored(user.inputs[1]) if user.op_type == "Mul" and index == 0 else None
        if first < 0 or factor is None or factor.ndim != 1 or not np.isin(factor, (0, 1)).all():
            return None
        dims.update((first + np.flatnonzero(factor)).tolist())
    return sorted(dims)


def counts(value: ir.Value | None) -> bool:
    """Whether a value is the batch size, as the canonical form takes it: the first of the sizes of an input."""
    node = None if value is None else value.producer()
    if value is None or value.name != BATCH or node is None or node.op_type != "Gather" or not standard(node):
        return False
    sizes, first = node.inputs[0], stored(node.inputs[1])
    source = None if sizes is None else sizes.producer()
    if sizes is None or sizes.name != SIZES or source is None or source.op_type != "Shape" or len(source.attributes):
        return False
    x = source.inputs[0]
    free = x is not None and x.is_graph_input() and x.shape is not None and len(x.shape) > 0
    same = free and x is not None and x.shape is not None and not isinstance(x.shape[0], int)
    return same and first is not None and first.shape == (1,) and not first.any()
