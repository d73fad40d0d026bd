"""The TensorRT target: its rules, its command, and ONNX Runtime's answers; nothing runs here."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.runtimes.base import runtime, runtime_for
from slimline.runtimes.tensorrt import violations
from tests.runtimes import mobile


@pytest.fixture(scope="module")
def integer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sl.export(mobile.quantized("tensorrt"), "tensorrt", tmp_path_factory.mktemp("integer"))


def test_float_answers_as_the_model(tmp_path: Path) -> None:
    model = mobile.model()
    path = sl.export(model, "tensorrt", tmp_path)
    assert runtime("tensorrt").input_specs(path) == [("x", (None, 3, 8, 8), "float32")]
    assert (tmp_path / "model.trtexec.txt").read_text() == (
        "trtexec --onnx=model.onnx --saveEngine=model.engine --fp16 "
        "--minShapes=x:1x3x8x8 --optShapes=x:32x3x8x8 --maxShapes=x:1024x3x8x8\n"
    )
    expected = model.outputs(mobile.images(3))[0]
    answers = runtime("onnxruntime").load(path).run((mobile.images(3),))
    np.testing.assert_allclose(answers, expected, rtol=1e-4, atol=1e-5)


def test_integers_follow_every_rule(integer: Path) -> None:
    proto = onnx.load(str(integer))
    assert not list(violations(proto))
    makers = {output: node for node in proto.graph.node for output in node.output}
    weights = {name.name: name for name in proto.graph.initializer}
    kinds = {}
    for node in proto.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            kinds[node.name] = [makers[i].op_type if i in makers else "float" for i in node.input]
    both = ["DequantizeLinear", "DequantizeLinear", "float"]
    # Three channels, and five, are too few for integers; so is what pooling has left of them.
    assert kinds == {
        "stem": ["float"] * 3,
        "first": both,
        "second": both,
        "hidden": both,
        "head": ["Relu", *both[2:] * 2],
    }
    zeros = [numpy_helper.to_array(weights[n.input[2]]) for n in proto.graph.node if n.op_type == "QuantizeLinear"]
    assert zeros and all(zero.dtype == np.int8 and not zero.any() for zero in zeros)
    (add,) = (node for node in proto.graph.node if node.op_type == "Add")
    assert sorted(makers[name].op_type for name in add.input) == ["Conv", "DequantizeLinear"]  # the residual alone
    assert "--int8" in integer.with_suffix(".trtexec.txt").read_text()


def test_the_same_bytes_each_time(integer: Path, tmp_path: Path) -> None:
    again = sl.export(mobile.quantized("tensorrt"), "tensorrt", tmp_path)
    assert again.read_bytes() == integer.read_bytes()


def _changed(integer: Path, how: str) -> onnx.ModelProto:
    proto = onnx.load(str(integer))
    graph = proto.graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    rounding = next(node for node in graph.node if node.op_type == "QuantizeLinear")
    conv = next(node for node in graph.node if node.name == "first")
    weight = next(node for node in graph.node if node.output[0] == conv.input[1])

    def put(name: str, array: np.ndarray) -> None:
        held[name].CopyFrom(numpy_helper.from_array(array, name))

    if how == "zero point":
        put(rounding.input[2], np.array(3, np.int8))
    elif how == "uint8":
        put(rounding.input[2], np.array(0, np.uint8))
    elif how == "no step":
        put(rounding.input[1], np.array(0, np.float32))
    elif how == "per channel":
        put(rounding.input[1], np.ones(16, np.float32))
    elif how == "axis":
        next(a for a in weight.attribute if a.name == "axis").i = 1
    elif how == "weight":
        integers = numpy_helper.to_array(held[weight.input[0]])
        put(weight.input[0], integers.astype(np.uint8))
    elif how == "output":
        node = next(n for n in graph.node if n.output[0] == graph.output[0].name)
        node.output[0] = "before"
        graph.node.append(helper.make_node("QuantizeLinear", ["before", *rounding.input[1:]], ["q"]))
        graph.node.append(helper.make_node("DequantizeLinear", ["q", *rounding.input[1:]], [graph.output[0].name]))
    elif how == "bias":
        graph.initializer.append(helper.make_tensor("b", TensorProto.INT32, [16], [0] * 16))
        graph.node.append(helper.make_node("DequantizeLinear", ["b", rounding.input[1]], ["bias"]))
        conv.input[2] = "bias"
    return proto


BROKEN = {
    "zero point": "zero point",
    "uint8": "uint8",
    "no step": "not positive",
    "per channel": "more than one step",
    "axis": "along dimension 1",
    "weight": "is not int8",
    "output": "output .* is rounded",
    "bias": "bias of first is rounded",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_rule_is_seen(integer: Path, how: str) -> None:
    assert any(re.search(BROKEN[how], broken) for broken in violations(_changed(integer, how)))


def test_the_parser_of_tensorrt_takes_it(integer: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    from slimline.runtimes.tensorrt import _parsed

    assert _parsed(integer) == ""


def test_nothing_is_run_here(integer: Path) -> None:
    with pytest.raises(SlimlineError, match="runs with TensorRT on NVIDIA GPUs, not here"):
        runtime("tensorrt").load(integer)
    assert runtime_for(integer).name == "onnxruntime"  # files with this suffix are measured where they can be
    with pytest.raises(SlimlineError, match="without a zero point"):
        mobile.quantized("tensorrt", activations="uint8")
