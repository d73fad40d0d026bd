"""FP8 weights and activations: TensorRT's file against ONNX Runtime, the rules, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.graph.quantization import Quantization
from slimline.methods.formats import FloatFormat
from slimline.runtimes.base import names, runtime
from slimline.runtimes.onnx_session import OnnxSession
from slimline.runtimes.tensorrt import _session, violations
from slimline.steps.quantization.calibration import calibrate
from tests.runtimes import mobile

FP8 = "fp8_e4m3"
EIGHT = TensorProto.FLOAT8E4M3FN
LABELS = np.arange(64) % 5


def exported(small: sl.Model, folder: Path, target: str = "tensorrt") -> onnx.ModelProto:
    """The file, whose every rule is kept, and whose answers, operator by operator, are those of the simulation."""
    path = sl.export(small, target, folder)
    proto = onnx.load(str(path))
    assert not list(violations(proto))
    x = np.random.default_rng(5).normal(size=(7, *small.example[0].shape[1:])).astype(np.float32)
    expected, answers = small.outputs(x)[0], OnnxSession(_session(path)).run((x,))
    if target == "tensorrt":
        np.testing.assert_allclose(answers, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    else:
        assert 0 < np.abs(answers - expected).mean() < 0.02 * expected.std()
    return proto


def floats(proto: onnx.ModelProto) -> dict[str, int]:
    """Of each operator with a weight, how many of its first two operands are of FP8."""
    held = {each.name: each.data_type for each in proto.graph.initializer}
    makers = {output: node for node in proto.graph.node for output in node.output}

    def eight(name: str) -> bool:
        node = makers.get(name)
        while node is not None and node.op_type in ("Flatten", "Reshape", "Transpose"):
            node = makers.get(node.input[0])
        return node is not None and node.op_type == "DequantizeLinear" and held[node.input[2]] == EIGHT

    layers = [node for node in proto.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    return {node.name: sum(map(eight, node.input[:2])) for node in layers}


@pytest.fixture(scope="module")
def small() -> sl.Model:
    return mobile.quantized("tensorrt", weights=FP8)


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt:fp16"])
def test_the_file_rounds_as_the_model(small: sl.Model, target: str, tmp_path: Path) -> None:
    proto = exported(small, tmp_path, target)
    assert floats(proto) == {"stem": 0, "first": 2, "second": 2, "hidden": 2, "head": 0}
    assert proto.opset_import[0].version >= 19
    held = {each.name: each for each in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "QuantizeLinear":  # the largest number is 448 steps
            assert held[node.input[1]].dims == [] and not numpy_helper.to_array(held[node.input[2]]).astype(float)
    stored = small.parameters()
    codes = {tuple(each.dims): each for each in held.values() if each.data_type == EIGHT and each.dims}
    for name, each in small.quantization.weights.items():
        assert each.blocks[0] == 1 and np.allclose(each.scale.ravel() * 448, np.abs(stored[name]).reshape(
            len(stored[name]), -1).max(1), rtol=1e-6)  # fmt: skip
        shape = stored[name].shape if stored[name].shape in codes else stored[name].shape[::-1]
        written = numpy_helper.to_array(codes[shape]).view(np.uint8)
        expected = each.encode(stored[name])
        np.testing.assert_array_equal(written if shape == stored[name].shape else written.T, expected)


def test_saved_and_loaded_it_is_the_same(small: sl.Model, tmp_path: Path) -> None:
    small.save(tmp_path / "small.pt2")
    again = sl.load(tmp_path / "small.pt2")
    assert again.quantization == small.quantization
    np.testing.assert_array_equal(again.outputs(mobile.images())[0], small.outputs(mobile.images())[0])


def test_onnx_models_of_old_operators(tmp_path: Path) -> None:
    path = sl.export(mobile.model(), "onnxruntime", tmp_path / "float")
    proto = onnx.load(str(path))
    proto.opset_import[0].version, proto.ir_version = 13, 7
    held = {each.name: numpy_helper.to_array(each) for each in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "ReduceMean":
            node.attribute.append(helper.make_attribute("axes", held[node.input[1]].tolist()))
            del node.input[1]
    onnx.save(proto, str(tmp_path / "old.onnx"))
    model = sl.load(tmp_path / "old.onnx")
    small = calibrate(model, sl.StaticQuantization(weights=FP8), [(mobile.images(64),)], "tensorrt")
    # ONNX Runtime would leave out a Relu before floats of 8 bits, and the model with it.
    assert floats(exported(small, tmp_path / "small")) == {"stem": 0, "first": 2, "second": 2, "hidden": 2, "head": 0}
    small.save(tmp_path / "small.onnx")
    again = sl.load(tmp_path / "small.onnx")
    np.testing.assert_array_equal(again.outputs(mobile.images())[0], small.outputs(mobile.images())[0])
    wider = {name: FloatFormat(each.scale * 2, (), each.dtype) for name, each in small.quantization.activations.items()}
    others = Quantization(wider, small.quantization.weights)
    assert small.adapter.format_mismatches(small.native, others) == list(wider)


def test_keras_models(tmp_path: Path) -> None:
    keras = pytest.importorskip("keras")
    layers = keras.layers
    keras.utils.set_random_seed(0)
    net = keras.Sequential([
        keras.Input((8, 8, 3)), layers.Conv2D(32, 3, activation="relu", name="stem"),
        layers.Conv2D(32, 1, activation="relu", name="conv"), layers.DepthwiseConv2D(3, name="depthwise"),
        layers.Reshape((16, 32)), layers.Conv1D(48, 3, activation="relu", name="line"), layers.Flatten(),
        layers.Dense(16, name="dense"),
    ])  # fmt: skip
    x = np.random.default_rng(1).normal(size=(64, 8, 8, 3)).astype(np.float32)
    small = calibrate(sl.load(net), sl.StaticQuantization(weights=FP8), [(x,)], "tensorrt")
    assert floats(exported(small, tmp_path)) == {"stem": 0, "conv": 2, "depthwise": 0, "line": 2, "dense": 2}
    small.save(tmp_path / "small.keras")
    again = sl.load(tmp_path / "small.keras")
    np.testing.assert_array_equal(again.outputs(x)[0], small.outputs(x)[0])


def test_convolutions_that_tensorrt_has_not_stay_in_float() -> None:
    net = nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 32, 7, padding=3), nn.Conv2d(32, 32, 3, groups=4, padding=1),
        nn.Conv2d(32, 64, 3, groups=2), nn.Conv2d(64, 40, 1), nn.ConvTranspose2d(40, 32, 3), nn.Conv2d(32, 8, 1),
    )  # fmt: skip
    x = np.random.default_rng(2).normal(size=(4, 16, 8, 8)).astype(np.float32)
    small = calibrate(sl.load(net.eval(), (x,)), sl.StaticQuantization(weights=FP8), [(x,)], "tensorrt")
    assert small.quantization.layers == ("0", "3")
    said = small.quantization.float_layers
    assert "more than 32 positions" in said["1"] and "transposed" in said["5"]
    assert all("no multiple of 16" in said[layer] for layer in ("2", "4", "6"))


def test_both_operands_are_of_one_type(small: sl.Model, tmp_path: Path) -> None:
    proto = exported(small, tmp_path)
    conv = next(node for node in proto.graph.node if node.name == "first")
    weight = next(node for node in proto.graph.node if node.output[0] == conv.input[1])
    for name in (weight.input[0], weight.input[2]):
        each = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
        each.CopyFrom(numpy_helper.from_array(np.zeros(each.dims, np.int8), name))
    assert list(violations(proto)) == ["first multiplies float8_e4m3fn by integers"]


def test_tensorrt_builds_an_engine_of_it(small: sl.Model, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    from slimline.runtimes.tensorrt import _refused

    assert _refused(sl.export(small, "tensorrt", tmp_path)) == ""


def test_weights_that_make_up_for_errors() -> None:
    data = sl.Data(calibration=(mobile.images(64), LABELS))
    step = sl.StaticQuantization(weights=FP8, rounding="gptq", observer="entropy", samples=64)
    better = sl.apply(mobile.model(), step, data, target="tensorrt")
    assert better.quantization.summary()["activations"] == {"float8_e4m3fn, scaled per tensor": 3}
    plain = sl.StaticQuantization(weights=FP8, observer="entropy")
    nearest = calibrate(mobile.model(), plain, [(mobile.images(64),)], "tensorrt")
    expected = mobile.model().outputs(mobile.images(64))[0]
    errors = [np.square(each.outputs(mobile.images(64))[0] - expected).mean() for each in (better, nearest)]
    assert errors[0] < errors[1] < 0.01 * expected.var()


@pytest.mark.parametrize("target", [name for name in names() if FP8 not in runtime(name).policies])
def test_who_has_none_says_who_has(target: str, tmp_path: Path) -> None:
    data = sl.Data(train=(mobile.images(8), LABELS[:8]), test=(mobile.images(8) + 1, LABELS[:8]))
    step = sl.StaticQuantization(weights=FP8, batch_size=4)
    with pytest.raises(SlimlineError, match=f"^{target} computes with no fp8_e4m3 activations: .* the target tensorrt"):
        sl.compress(mobile.model(), data, target=target, recipe=[step], output=tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "fields",
    [
        {"activations": FP8},
        {"weights": FP8, "activations": "int8"},
        {"weights": FP8, "last_layers": "int8"},
        {"weights": FP8, "overrides": {"head": {"weights": "int4"}}},
        {"overrides": {"head": {"weights": FP8}}},
    ],
)
def test_types_that_are_not_multiplied_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(SlimlineError, match="multiplied by such numbers alone"):
        sl.StaticQuantization(**fields)


def test_what_needs_integers_is_refused() -> None:
    with pytest.raises(SlimlineError, match="adaround rounds to integers"):
        sl.StaticQuantization(weights=FP8, rounding="adaround")
    with pytest.raises(SlimlineError, match="MixedPrecision chooses among integers"):
        sl.MixedPrecision(max_size=0.5, quantization=sl.StaticQuantization(weights=FP8))


def test_layers_may_stay_in_float(tmp_path: Path) -> None:
    step = {
        "weights": FP8,
        "activations": FP8,
        "first_layers": "float32",
        "overrides": {"second": {"weights": "float32"}},
    }
    small = mobile.quantized("tensorrt", **step)
    assert small.quantization.layers == ("first", "hidden")
    assert sl.StaticQuantization.model_validate(sl.StaticQuantization(**step).model_dump(mode="json"))
