"""Layers one behind the other, as ONNX: what runtimes that read ONNX are asked about single layers with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from slimline.runtimes.base import Layer


def chain(layer: Layer) -> bytes:
    """An ONNX model of float layers such as `layer`, see `slimline.runtimes.base.Runtime.sample`."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes, weights = [], []
    for i, (inputs, outputs) in enumerate(layer.chain):
        if layer.kernel:
            shape = (outputs, 1 if layer.depthwise else inputs, *layer.kernel)
            reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel, strict=True)]
            pads = [*(n // 2 for n in reach), *(n - n // 2 for n in reach)]
            group = inputs if layer.depthwise else 1
            names = [f"x{i}", f"w{i}"], [f"x{i + 1}"]
            node = helper.make_node("Conv", *names, pads=pads, dilations=layer.dilation, group=group)
        else:
            shape = (outputs, inputs)
            node = helper.make_node("Gemm", [f"x{i}", f"w{i}"], [f"x{i + 1}"], transB=1)
        nodes.append(node)
        weights.append(numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), f"w{i}"))
    size: list[str | int | None] = ["batch", layer.inputs, *(layer.places if layer.kernel else ())]
    kind = TensorProto.FLOAT
    ends = [helper.make_tensor_value_info(name, kind, size) for name in ("x0", f"x{len(layer.chain)}")]
    graph = helper.make_graph(nodes, "sample", ends[:1], ends[1:], weights)
    opset = [helper.make_opsetid("", 20)]
    content: bytes = helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()
    return content
