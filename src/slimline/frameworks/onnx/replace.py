"""Layers that give way to others."""

from __future__ import annotations

import onnx_ir as ir

from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import Array
from slimline.frameworks.onnx.native import Editor, Native
from slimline.frameworks.onnx.rewrite import place_of
from slimline.frameworks.onnx.run import outline
from slimline.graph.edits import Project, Replace
from slimline.graph.operators import Convolution, Einsum, Mean, Operator, Rectifier, Table


def replace(native: Native, change: Replace, example: tuple[Array, ...]) -> Native:
    """A copy in which operators compute what a layer did, of the same shape on `example`.

    Tensors that only the layer read are gone.
    """
    editor = Editor(native)
    ends = editor.named([change.input, change.output])
    value, output = ends[change.input], ends[change.output]
    old = output.producer()
    if old is None:
        raise SlimlineError(f"{change.layer} is no layer that computes: only layers that have weights can be replaced.")
    before = outline(native.model, example)[change.output]
    for position, operator in enumerate(change.operators):
        value = _call(editor, old, value, f"{change.layer}.{position}", operator, len(before.shape), before.dtype)
    place_of(editor, old, value)
    result = editor.done()
    try:
        after = outline(result.model, example)[change.output].shape
    except SlimlineError as reason:
        raise change.misfit() from reason
    change.check_shape(before.shape, after)
    return result


def project(native: Native, change: Project) -> Native:
    """A copy in which a recurrent layer reads a product."""
    editor = Editor(native)
    ((name, kernel),) = change.kernels.items()  # both directions are in one
    ((layer, _),) = editor.values[name].uses()
    editor.put(name, kernel)
    weight = editor.constant(change.weight.T.astype(native.tensors[name].dtype), f"{change.layer}.0.weight")
    layer.replace_input_with(0, editor.insert(layer, "MatMul", [layer.inputs[0], weight]))
    return editor.done()


def _call(
    editor: Editor, before: ir.Node, value: ir.Value, part: str, operator: Operator, rank: int, kind: str
) -> ir.Value:
    if isinstance(operator, Rectifier):
        return editor.insert(before, "Relu", [value])
    if isinstance(operator, Mean):
        return editor.insert(before, "Flatten", [editor.insert(before, "GlobalAveragePool", [value])], {"axis": 1})
    if isinstance(operator, Table):
        table = editor.constant(operator.weight.astype(kind), f"{part}.weight")
        return editor.insert(before, "Gather", [table, value], {"axis": 0})
    bias = None if operator.bias is None else editor.constant(operator.bias.astype(kind), f"{part}.bias")
    if isinstance(operator, Convolution):
        window = operator.looks
        zeros = window.zeros((0,) * len(operator.kernel), operator.kernel)
        attributes = {
            "strides": list(window.stride),
            "dilations": list(window.dilation),
            "pads": [*(b for b, _ in zeros), *(a for _, a in zeros)],
            "group": operator.groups,
        }
        weight = editor.constant(operator.weight.astype(kind), f"{part}.weight")
        return editor.insert(before, "Conv", [value, weight, *([] if bias is None else [bias])], attributes)
    if isinstance(operator, Einsum):
        weight = editor.constant(operator.weight.astype(kind), f"{part}.weight")
        return editor.insert(before, "Einsum", [value, weight], {"equation": operator.equation})
    if rank == 2:
        weight = editor.constant(operator.weight.astype(kind), f"{part}.weight")
        return editor.insert(before, "Gemm", [value, weight, *([] if bias is None else [bias])], {"transB": 1})
    weight = editor.constant(operator.weight.T.astype(kind), f"{part}.weight")
    product = editor.insert(before, "MatMul", [value, weight])
    return product if bias is None else editor.insert(before, "Add", [product, bias])
