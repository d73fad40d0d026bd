"""The TensorRT target: its rules, its command, and ONNX Runtime's answers; nothing runs here."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.runtimes.base import runtime, runtime_for
from slimline.runtimes.onnx_session import OnnxSession
from slimline.runtimes.tensorrt import _session, violations
from tests.runtimes import mobile


@pytest.fixture(scope="module")
def integer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sl.export(mobile.quantized("tensorrt"), "tensorrt", tmp_path_factory.mktemp("integer"))


def test_float_answers_as_the_model(tmp_path: Path) -> None:
    model = mobile.model()
    path = sl.export(model, "tensorrt", tmp_path)
    assert runtime("tensorrt").input_specs(path) == [("x", (None, 3, 8, 8), "float32")]
    assert (tmp_path / "model.trtexec.txt").read_text() == (
        "trtexec --onnx=model.onnx --saveEngine=model.engine --stronglyTyped "
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
    assert " --stronglyTyped " in integer.with_suffix(".trtexec.txt").read_text()


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
    "weight": "is not int8, int4 or float8_e4m3fn",
    "output": "output .* is rounded",
    "bias": "bias of first is rounded",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_rule_is_seen(integer: Path, how: str) -> None:
    assert any(re.search(BROKEN[how], broken) for broken in violations(_changed(integer, how)))


def test_tensorrt_builds_an_engine_of_it(integer: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    from slimline.runtimes.tensorrt import _refused

    assert _refused(integer) == ""
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(_changed(integer, "zero point").SerializeToString())
    assert "zero" in _refused(broken)


class Mixed(nn.Module):
    """A convolution, an embedding and linear layers of 128 and 256 inputs over a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.table = nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Embedding(50, 32)
        self.wide, self.back, self.head = nn.Linear(32, 256), nn.Linear(256, 128), nn.Linear(128, 5)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.norm(self.conv(x))).flatten(2).transpose(1, 2) + self.table(t)[:, None]
        return self.head(torch.relu(self.back(nn.functional.gelu(self.wide(h)))))


@pytest.fixture(scope="module")
def mixed() -> sl.Model:
    torch.manual_seed(0)
    return sl.load(Mixed().eval(), (mobile.images(2), np.array([3, 49])))


FOUR = {"back": {"dtype": "int4", "group_size": 128}, "head": {"dtype": "int4"}}
DECODED = {
    "int8": (sl.WeightQuantization(), {"INT8": 5}),
    "fp8": (sl.WeightQuantization(dtype="fp8_e4m3"), {"FLOAT8E4M3FN": 5}),
    "int4": (sl.WeightQuantization(overrides=FOUR), {"INT8": 3, "INT4": 2}),
    "ternary": (sl.WeightQuantization(dtype="ternary", group_size=None), {"INT8": 5}),
}


@pytest.mark.parametrize(
    ("name", "target"), [*((name, "tensorrt") for name in DECODED), ("int4", "tensorrt:fp16"), ("fp8", "tensorrt:fp16")]
)
def test_weights_alone_are_one_operator_each(mixed: sl.Model, name: str, target: str, tmp_path: Path) -> None:
    step, types = DECODED[name]
    small = sl.apply(mixed, step, target=target)
    path = sl.export(small, target, tmp_path)
    proto = onnx.load(str(path))
    assert not list(violations(proto))
    constants = {each.name: each for each in proto.graph.initializer}
    real = np.float16 if target.endswith("fp16") else np.float32
    stored, weights = Counter(), small.parameters()
    for node in proto.graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        codes, scale = (numpy_helper.to_array(constants[each]) for each in node.input)
        stored[TensorProto.DataType.Name(constants[node.input[0]].data_type)] += 1
        assert scale.dtype == real
        decoded = ReferenceEvaluator(_alone(node, codes.shape, constants)).run(None, {})[0]
        exact = [w for w in weights.values() if w.size == decoded.size]
        near = [
            np.allclose(way, decoded, rtol=2e-3 if real == np.float16 else 0, atol=1e-7)
            for way in _ways(exact, decoded)
        ]
        assert sum(near) == 1
    assert stored == types
    floats = {each.name for each in constants.values() if each.data_type == TensorProto.FLOAT}
    assert not floats or real == np.float32


def _ways(weights: list[np.ndarray], decoded: np.ndarray) -> list[np.ndarray]:
    return [way for w in weights for way in ((w, w.T) if w.ndim == 2 else (w,)) if way.shape == decoded.shape]


def _alone(node: onnx.NodeProto, shape: tuple[int, ...], constants: dict[str, onnx.TensorProto]) -> onnx.ModelProto:
    kind = constants[node.input[1]].data_type
    output = helper.make_tensor_value_info(node.output[0], kind, shape)
    graph = helper.make_graph([node], "g", [], [output], [constants[each] for each in node.input])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


def test_weights_of_onnx_models(mixed: sl.Model, tmp_path: Path) -> None:
    model = sl.load(sl.export(mixed, "onnxruntime", tmp_path / "float"))
    step = sl.WeightQuantization(overrides={"re:wide|back|head": {"dtype": "int4", "group_size": 64}})
    small = sl.apply(model, step, target="tensorrt")
    path = sl.export(small, "tensorrt", tmp_path / "small")
    kinds = Counter(TensorProto.DataType.Name(each.data_type) for each in onnx.load(str(path)).graph.initializer)
    assert (kinds["INT8"], kinds["INT4"]) == (3, 2)  # 32 inputs are fewer than a block, and no 4 bits without blocks
    assert path.stat().st_size < 0.3 * (tmp_path / "float" / "model.onnx").stat().st_size


def test_weights_that_it_does_not_take(mixed: sl.Model, tmp_path: Path) -> None:
    for fields in ({"symmetric": False}, {"dtype": "bf16"}, {"dtype": "int4", "group_size": 32}, {"dtype": "fp8_e5m2"}):
        with pytest.raises(SlimlineError, match="tensorrt cannot store"):
            sl.export(sl.apply(mixed, sl.WeightQuantization(layers=("back",), **fields)), "tensorrt", tmp_path)
    net = nn.Sequential(nn.Linear(100, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    odd = sl.apply(sl.load(net, (np.ones((2, 100), np.float32),)), sl.WeightQuantization(dtype="int4", layers=("0",)))
    with pytest.raises(
        SlimlineError, match=r"^The weight .* has 100 inputs, which 64 in a group do not divide: choose"
    ):
        sl.export(odd, "tensorrt", tmp_path)
    assert not list(tmp_path.iterdir())


def test_half_precision(integer: Path, tmp_path: Path) -> None:
    model = mobile.quantized("tensorrt:fp16")
    path = sl.export(model, "tensorrt:fp16", tmp_path / "one")
    proto = onnx.load(str(path))
    assert not list(violations(proto)) and not any(
        each.data_type == TensorProto.FLOAT for each in proto.graph.initializer
    )
    assert [each.type.tensor_type.elem_type for each in (*proto.graph.input, *proto.graph.output)] == [1, 1]
    expected, answers = model.outputs(mobile.images(9))[0], OnnxSession(_session(path)).run((mobile.images(9),))
    assert 0 < np.abs(answers - expected).mean() < 0.02 * expected.std()
    again = sl.export(mobile.quantized("tensorrt:fp16"), "tensorrt:fp16", tmp_path / "two")
    assert again.read_bytes() == path.read_bytes()
    assert path.stat().st_size < integer.stat().st_size


def test_steps_that_float16_lacks_are_refused(tmp_path: Path) -> None:
    net = nn.Linear(32, 32)
    with torch.no_grad():
        net.weight *= 1e-6
    tiny = sl.apply(sl.load(net, (np.ones((2, 32), np.float32),)), sl.WeightQuantization())
    with pytest.raises(SlimlineError, match=r"float16 does not hold the step .*: export in float32"):
        sl.export(tiny, "tensorrt:fp16", tmp_path)


@pytest.mark.parametrize(
    ("axis", "block", "kind", "said"),
    [
        (0, 64, TensorProto.INT4, None),
        (0, 32, TensorProto.INT4, "is not in whole blocks of 64 or 128"),
        (1, 0, TensorProto.INT4, "is not in whole blocks of 64 or 128"),
        (0, 64, TensorProto.INT8, "has blocks, and is not int4"),
        (0, 64, TensorProto.UINT4, "is not int8, int4 or float8_e4m3fn"),
    ],
)
def test_rules_of_blocks(axis: int, block: int, kind: int, said: str | None) -> None:
    weight = helper.make_tensor("w", kind, [128, 8], [0] * 1024)
    shape = [2, 8] if block == 64 else [4, 8] if block else [8]
    scale = helper.make_tensor("s", TensorProto.FLOAT, shape, [1.0] * int(np.prod(shape)))
    node = helper.make_node(
        "DequantizeLinear", ["w", "s"], ["y"], axis=axis, **({"block_size": block} if block else {})
    )
    product = helper.make_node("MatMul", ["x", "y"], ["z"], name="product")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, n]) for name, n in (("x", 128), ("z", 8))]
    model = helper.make_model(helper.make_graph([node, product], "g", ends[:1], ends[1:], [weight, scale]))
    broken = list(violations(model))
    assert not broken if said is None else any(said in each for each in broken)


def test_nothing_is_run_here(integer: Path) -> None:
    with pytest.raises(SlimlineError, match="runs with TensorRT on NVIDIA GPUs, not here"):
        runtime("tensorrt").load(integer)
    assert runtime_for(integer).name == "onnxruntime"  # files with this suffix are measured where they can be
    with pytest.raises(SlimlineError, match="without a zero point"):
        mobile.quantized("tensorrt", activations="uint8")
