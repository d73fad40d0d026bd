"""Layers that read less: channels selected in front of them, smaller kernels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from slimline.frameworks.base import Array
from slimline.frameworks.onnx.native import Editor, Native
from slimline.frameworks.onnx.operators import biased
from slimline.graph.cuts import Cut
from slimline.graph.removal import take


def cut(native: Native, cuts: Sequence[Cut], example: tuple[Array, ...]) -> Native:
    """A copy in which each layer reads only what its cut leaves; it is run once on `example` to prove that it runs."""
    editor = Editor(native)
    for change in cuts:
        node = reading(editor, change.reader.node.name)
        weight = change.reader.layer.weight
        editor.put(weight, take(native.tensors[weight], change.retained))
        if change.window is not None:
            _shrink(editor, node, change)
        if change.selection is not None:
            dim, index = change.selection
            places = editor.constant(index.astype(np.int64), f"{node.outputs[0].name}_inputs")
            node.replace_input_with(0, editor.insert(node, "Gather", [node.inputs[0], places], {"axis": dim}))
    result = editor.done()
    result.session(example)
    return result


def reading(editor: Editor, name: str) -> ir.Node:
    """The operator that reads the weight of a layer of the neutral graph."""
    node = editor.named([name])[name].producer()
    assert node is not None
    return biased(node) or node


def _shrink(editor: Editor, node: ir.Node, change: Cut) -> None:
    """Give a convolution its smaller kernel's dilation and padding."""
    zeros = change.zeros
    node.attributes.pop("kernel_shape", None)
    node.attributes.pop("auto_pad", None)
    node.attributes["dilations"] = ir.AttrInt64s("dilations", list(change.dilation))
    inside = [(max(before, 0), max(after, 0)) for before, after in zeros]
    node.attributes["pads"] = ir.AttrInt64s("pads", [*(b for b, _ in inside), *(a for _, a in inside)])
    for dim, (before, after), size in zip(change.reader.places, zeros, change.reader.sizes, strict=True):
        if before < 0 or after < 0:
            numbers = (max(-before, 0), size - max(-after, 0), dim, 1)
            ends = [editor.constant(np.array([n], np.int64), f"{node.outputs[0].name}_crop") for n in numbers]
            node.replace_input_with(0, editor.insert(node, "Slice", [node.inputs[0], *ends]))
