"""Weights in few bits, end to end: from the step to the codes in the artifact."""

from __future__ import annotations

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from sklearn.datasets import load_digits
from torch import nn

import slimline as sl
from slimline.methods.formats import FloatFormat, IntegerGrid
from slimline.runtimes.base import runtime
from tests.digit_models import Inverted, Perceptron, Recurrent, digits, fitted

X, Y = digits(), load_digits().target


class Words(nn.Module):
    """An embedding, linear layers on sequences with and without a bias, a convolution over time and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 48)
        self.query, self.key = nn.Linear(48, 96), nn.Linear(48, 96, bias=False)
        self.over_time, self.norm = nn.Conv1d(96, 24, 3), nn.BatchNorm1d(24)
        self.head = nn.Linear(24, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.table(x)
        y = torch.relu(self.query(y)) + self.key(y)
        return self.head(torch.relu(self.norm(self.over_time(y.transpose(1, 2)))).mean(2))


@pytest.fixture(scope="module")
def words() -> sl.Model:
    torch.manual_seed(0)
    return sl.load(Words().eval(), torch.randint(0, 20, (2, 8)))


@pytest.fixture(scope="module")
def perceptron() -> sl.Model:
    torch.manual_seed(1)
    return sl.load(fitted(Perceptron), X[:8])


@pytest.fixture(scope="module")
def images() -> sl.Data:
    return sl.Data(train=(X[:1024], Y[:1024]), test=(X[1024:], Y[1024:]))


def accuracy(model: sl.Model) -> float:
    return float(np.mean(model.predict(X[1024:]).argmax(1) == Y[1024:]))


def stored(path: Path) -> dict[str, int]:
    """Numbers in an ONNX file by their type."""
    counts: dict[str, int] = {}
    for tensor in onnx.load(path).graph.initializer:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        counts[kind] = counts.get(kind, 0) + int(np.prod(tensor.dims))
    return counts


CASES = [
    ({"dtype": "int8"}, "INT8", 0.29),
    ({"dtype": "int4"}, "INT4", 0.18),
    ({"dtype": "int4", "symmetric": False, "group_size": 32}, "UINT4", 0.21),
    ({"dtype": "int3", "group_size": 24, "rounding": "hqq"}, "INT4", 0.20),
    ({"dtype": "int8", "group_size": 10, "symmetric": False}, "UINT8", 0.45),
    ({"dtype": "fp16"}, "FLOAT16", 0.52),
    ({"dtype": "bf16"}, "BFLOAT16", 0.52),
    ({"dtype": "fp8_e4m3"}, "FLOAT8E4M3FN", 0.29),
    ({"dtype": "fp8_e5m2", "group_size": 32}, "FLOAT8E5M2", 0.38),
]


@pytest.fixture(scope="module")
def exported(words, tmp_path_factory) -> Path:
    """The float network as an ONNX file, from which it is loaded as an ONNX model."""
    return sl.export(words, "onnxruntime", tmp_path_factory.mktemp("words") / "words.onnx")


@pytest.mark.parametrize(("fields", "kind", "size"), CASES, ids=[f"{i}-{case[1]}" for i, case in enumerate(CASES)])
def test_the_file_holds_the_codes_and_answers_as_the_model(exported, tmp_path, fields, kind, size):
    model = sl.load(exported, np.zeros((2, 8), np.int64))
    small = sl.apply(model, sl.WeightQuantization(**fields))
    path = sl.export(small, "onnxruntime", tmp_path / "small.onnx")
    counts = stored(path)
    weights = sum(a.size for a in model.parameters().values() if a.ndim > 1)
    assert counts[kind] >= weights
    assert counts["FLOAT"] < weights / 5  # biases and scales
    assert path.stat().st_size < size * exported.stat().st_size
    x = np.random.default_rng(0).integers(0, 20, (32, 8))
    simulated = small.predict(x)
    error = np.abs(runtime("onnxruntime").load(path).run((x,)) - simulated).max() / np.abs(simulated).max()
    # MatMulNBits rounds what it multiplies by; all else is exact.
    packed = sum(kind == "integer" for kind in runtime("onnxruntime").integer_layers(path).values())
    assert packed == {"INT8": 3, "INT4": 3, "UINT4": 3}.get(kind, 0) - 2 * (fields["dtype"] == "int3")
    assert error < (0.02 if packed else 1e-5)


class Tied(nn.Module):
    """A language model whose embedding is its output layer too, and a linear layer that is applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(400, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.layer(torch.tanh(self.layer(self.table(x)))))
        return y @ self.table.weight.T


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_what_several_read_is_stored_once_and_an_output_layer_multiplies_by_its_codes(target, dtype, tmp_path):
    torch.manual_seed(0)
    x = np.random.default_rng(0).integers(0, 400, (32, 8))
    model = sl.load(Tied().eval(), x[:2])
    step = sl.WeightQuantization(
        dtype=dtype, group_size=32, overrides={"table": {"dtype": "int8", "group_size": "channel"}}
    )
    small = sl.apply(model, step, target=target, progress=False)
    path = sl.export(small, target, tmp_path / f"small.{'onnx' if target == 'onnxruntime' else 'xml'}")
    if target == "onnxruntime":
        counts = stored(path)
        numbers = [400 * 64 + 64 * 64] if dtype == "int8" else [400 * 64, 64 * 64]
        assert [counts[kind] for kind in ("INT8", "INT4") if kind in counts] == numbers
        assert runtime(target).integer_layers(path)["table"] == "integer"
    else:
        assert path.with_suffix(".bin").stat().st_size < 400 * 64 + 2 * 64 * 64
    simulated = small.predict(x)
    error = np.abs(runtime(target).load(path).run((x,)) - simulated).max() / np.abs(simulated).max()
    assert error < 0.02


def test_torch_writes_what_the_onnx_model_does(words, exported, tmp_path):
    step = sl.WeightQuantization(dtype="int4")
    files = [
        sl.export(sl.apply(model, step), "onnxruntime", tmp_path / f"{model.framework}.onnx")
        for model in (words, sl.load(exported, np.zeros((2, 8), np.int64)))
    ]
    assert stored(files[0]) == stored(files[1])
    layers = runtime("onnxruntime").integer_layers(files[0])
    assert {name: layers[name] for name in ("query", "key", "head", "over_time")} == {
        "query": "integer", "key": "integer", "head": "integer", "over_time": "float"
    }  # fmt: skip


def test_codes_in_the_file_are_those_of_the_formats(exported, tmp_path):
    small = sl.apply(sl.load(exported, np.zeros((2, 8), np.int64)), sl.WeightQuantization(dtype="int4", group_size=16))
    path = sl.export(small, "onnxruntime", tmp_path / "small.onnx")
    arrays = [numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
    codes = [a.astype(np.int8) for a in arrays if a.dtype == ml_dtypes.int4]
    for name, each in small.quantization.weights.items():
        weight = small.parameters()[name]
        assert np.array_equal(each.round(weight), weight)
        if weight.ndim > 2:  # whose last group is padded
            continue
        expected = each.encode(weight)
        assert any(np.array_equal(c.ravel(), e.ravel()) for c in codes for e in (expected, expected.T))
        assert any(np.array_equal(a.ravel(), s.ravel()) for a in arrays for s in (each.scale, each.scale.T))


def test_a_saved_model_gives_the_same_artifact(perceptron, exported, tmp_path):
    step = sl.WeightQuantization(dtype="int4", rounding="hqq", symmetric=False)
    for model in (perceptron, sl.load(exported, np.zeros((2, 8), np.int64))):
        small = sl.apply(model, step)
        loaded = sl.load(small.save(tmp_path / f"small{model.adapter.suffix}"))
        assert loaded.quantization == small.quantization
        assert loaded.history == small.history
        for name, weight in small.parameters().items():
            assert np.array_equal(loaded.parameters()[name], weight)
    files = [sl.export(m, "onnxruntime", tmp_path / f"{n}.onnx").read_bytes() for n, m in enumerate((small, loaded))]
    assert files[0] == files[1]


OPENVINO = [
    ({"dtype": "int8"}, "i8", 0.28),
    ({"dtype": "int4"}, "i4", 0.17),
    ({"dtype": "int4", "symmetric": False, "group_size": 32}, "u4", 0.21),
    ({"dtype": "int8", "group_size": 10, "symmetric": False}, "u8", 0.41),
    ({"dtype": "fp16"}, "f16", 0.51),
    ({"dtype": "bf16"}, "bf16", 0.51),
    ({"dtype": "fp8_e4m3"}, "f8e4m3", 0.28),
]


@pytest.mark.parametrize(("fields", "kind", "size"), OPENVINO, ids=[f"{i}-{c[1]}" for i, c in enumerate(OPENVINO)])
def test_openvino_keeps_the_codes_in_its_own_files(exported, tmp_path, fields, kind, size):
    pytest.importorskip("openvino")
    model = sl.load(exported, np.zeros((2, 8), np.int64))
    small = sl.apply(model, sl.WeightQuantization(**fields), target="openvino")
    path = sl.export(small, "openvino", tmp_path / "small.xml")
    whole = sl.export(model, "openvino", tmp_path / "whole.xml").with_suffix(".bin")
    constants = re.findall(r'type="Const"[^>]*>\s*<data element_type="(\w+)"', path.read_text())
    assert constants.count(kind) == 5 * (2 if "symmetric" in fields else 1)  # codes, and zero points
    assert path.with_suffix(".bin").stat().st_size < size * whole.stat().st_size
    x = np.random.default_rng(0).integers(0, 20, (32, 8))
    target, answers = runtime("openvino"), small.predict(x)
    # With VNNI it rounds what it multiplies by integers to 8 bits.
    rounds = any(target.rounds_inputs(each) for each in small.quantization.weights.values())
    assert np.abs(target.load(path).run((x,)) - answers).max() < (0.02 * answers.std() if rounds else 1e-4)
    # Its own name for the type of the weights is no integer arithmetic.
    assert set(runtime("openvino").integer_layers(path).values()) == {"float"}


def test_a_target_that_cannot_is_refused_before_any_work(perceptron, images, tmp_path):
    with pytest.raises(sl.SlimlineError, match=r"cannot store .*choose the target .*onnxruntime or openvino"):
        sl.compress(
            perceptron,
            images,
            target="executorch",
            recipe=[sl.WeightQuantization(dtype="int4")],
            output=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()
    with pytest.raises(sl.SlimlineError, match="executorch cannot store"):
        sl.preview(perceptron, sl.WeightQuantization(dtype="int4"), target="executorch")


@pytest.mark.parametrize(("dtype", "drop"), [("int4", 0.01), ("int3", 0.02), ("int2", 0.05)])
def test_data_pays(perceptron, images, dtype, drop):
    errors, scores = {}, {}
    for rounding in ("nearest", "mse", "gptq", "hqq"):
        small = sl.apply(perceptron, sl.WeightQuantization(dtype=dtype, rounding=rounding), images)
        errors[rounding] = np.mean((small.predict(X[1024:]) - perceptron.predict(X[1024:])) ** 2)
        scores[rounding] = accuracy(small)
    assert 2 * errors["gptq"] < errors["mse"] < 0.7 * errors["nearest"]
    assert scores["gptq"] >= accuracy(perceptron) - drop


def test_a_whole_run(perceptron, images, tmp_path):
    run = sl.compress(
        perceptron,
        images,
        recipe=[sl.WeightQuantization(dtype="int4", group_size=32, rounding="gptq")],
        output=tmp_path / "run",
        batch_sizes=(1,),
    )
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["compressed"]["file_bytes"] == run.artifact.stat().st_size < report["original"]["file_bytes"] * 0.25
    assert report["compressed"]["accuracy"] > report["original"]["accuracy"] - 0.01
    assert {row["precision"] for row in report["layers"]} == {"int4 weights"}
    assert report["integers"]["macs"] == 1.0
    assert report["parity"]["passed"]
    step = report["steps"][0]
    assert step["formats"]["weights"] == {"int4, symmetric, in blocks of 1×32": 3}
    assert all(0 < layer["error"] < 0.05 and layer["bits"] == 5.0 for layer in step["layers"].values())
    assert any("linear layers compute from integer codes" in n["reason"] for n in report["notices"])


def test_what_was_pruned_stays_pruned(perceptron, images):
    sparse = sl.apply(perceptron, sl.SparsePruning(amount=0.5), images)
    small = sl.apply(sparse, sl.WeightQuantization(dtype="int4", rounding="gptq"), images)
    for name, mask in sparse.masks.items():
        assert not small.parameters()[name][~mask].any()
        assert small.quantization.weights[name].round(small.parameters()[name]) is not None
    narrow = sl.apply(perceptron, sl.ChannelPruning(ratio=0.5), images)
    assert sl.apply(narrow, sl.WeightQuantization(dtype="int4"), images).predict(X[:4]).shape == (4, 10)


def test_convolutions_share_scales_by_whole_kernels():
    model = sl.load(fitted(Inverted), X[:8])
    small = sl.apply(model, sl.WeightQuantization(dtype="int4", overrides={"head": {"dtype": "fp16"}}))
    weights = small.quantization.weights
    assert weights["head.weight"] == FloatFormat.plain("float16")
    depthwise, pointwise = weights["depth.0.weight"], weights["expand.0.weight"]
    assert isinstance(depthwise, IntegerGrid) and depthwise.blocks == (1, None, None, None)
    assert pointwise.blocks == (1, None, None, None)
    # Batch norms are folded first: the artifact has none, and no weight is scaled behind its codes.
    assert not any(node.kind == "batch_norm" for node in small.graph.nodes)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"dtype": "fp16", "rounding": "hqq"}, "rounding hqq is for integers, and fp16 is none"),
        ({"dtype": "bf16", "symmetric": False}, "symmetric false is for integers"),
        ({"dtype": "int5"}, "WeightQuantization with dtype"),
        ({"overrides": {"fc": {}}}, "says nothing"),
        ({"group_size": 0}, "group_size"),
    ],
)
def test_fields_that_mean_nothing_are_refused(fields, reason):
    with pytest.raises(sl.SlimlineError, match=reason):
        sl.WeightQuantization(**fields)


def test_models_that_cannot_have_it_are_refused(words, perceptron, images, tmp_path):
    small = sl.apply(words, sl.WeightQuantization(dtype="int4"))
    with pytest.raises(sl.SlimlineError, match="already"):
        sl.apply(small, sl.WeightQuantization())
    with pytest.raises(sl.SlimlineError, match="nope"):
        sl.apply(words, sl.WeightQuantization(layers=("nope",)))
    with pytest.raises(sl.SlimlineError, match="finds no weight"):
        sl.apply(words, sl.WeightQuantization(keep=("*",)))
    with pytest.raises(sl.SlimlineError, match="gptq needs data"):
        sl.apply(words, sl.WeightQuantization(rounding="gptq"))
    with pytest.raises(sl.SlimlineError, match=r"executorch cannot store .*choose the target .*onnxruntime"):
        sl.export(small, "executorch", tmp_path)


def test_recurrent_layers_are_said_to_stay():
    torch.manual_seed(0)
    model = sl.load(Recurrent(nn.LSTM).eval(), torch.randn(2, 6, 5))
    small = sl.apply(model, sl.WeightQuantization())
    assert list(small.quantization.weights) == ["head.weight"]


def test_keras_simulates_every_format_and_stores_it(tmp_path):
    pytest.importorskip("tensorflow")
    import keras
    from keras import layers as L

    keras.utils.set_random_seed(0)
    x = keras.Input((8, 8, 1))
    y = L.ReLU()(L.BatchNormalization()(L.Conv2D(12, 3, use_bias=False)(x)))
    y = L.Flatten()(L.DepthwiseConv2D(3)(y))
    images = sl.Data(train=(X[:256, 0, :, :, None], Y[:256]), test=(X[1024:, 0, :, :, None], Y[1024:]))
    model = sl.load(keras.Model(x, L.Dense(10)(L.Dense(40, activation="relu")(y))), X[:4, 0, :, :, None])
    inputs = X[1024:, 0, :, :, None]
    before = model.predict(inputs)
    for dtype, most in (("int8", 0.02), ("int4", 0.3), ("bf16", 0.02), ("fp8_e4m3", 0.1)):
        small = sl.apply(model, sl.WeightQuantization(dtype=dtype, group_size=32 if dtype == "int4" else None), images)
        assert 0 < np.abs(small.predict(inputs) - before).mean() / before.std() < most
        for name, each in small.quantization.weights.items():
            assert np.array_equal(each.round(small.parameters()[name]), small.parameters()[name])
    small = sl.apply(model, sl.WeightQuantization(dtype="int4", group_size=9), images)
    blocks = {small.graph.values[name].shape: each.blocks for name, each in small.quantization.weights.items()}
    assert blocks[(3, 3, 1, 12)] == (None, None, None, 1)
    assert blocks[(3, 3, 12, 1)] == (None, None, 1, 1)
    assert blocks[(40, 10)] == (9, 1)
    with pytest.raises(sl.SlimlineError, match=r"litert cannot store .*it stores float16"):
        sl.export(small, "litert", "unused.tflite")
    layers = [L.Conv2DTranspose(4, 2, strides=2), L.DepthwiseConv2D(3, depth_multiplier=2)]
    wide = keras.Sequential([keras.Input((4, 4, 3)), *layers, L.EinsumDense("abcd,de->abce", (6, 6, 5)), L.Dense(5)])
    given = np.random.default_rng(0).normal(size=(6, 4, 4, 3)).astype(np.float32)
    for network, x, dtype, target in (
        (model, inputs, "int4", "openvino"), (model, inputs, (-1.0, 0.2, 2.0), "onnxruntime"),
        (sl.load(wide, given), given, "fp16", "onnxruntime"), (sl.load(wide, given), given, "binary", "openvino"),
    ):  # fmt: skip
        coded = sl.apply(network, sl.WeightQuantization(dtype=dtype, group_size=4), target=target)
        path = sl.export(coded, target, tmp_path / f"{target}-{dtype}")
        outputs, expected = runtime(target).load(path).run((x,)), coded.predict(x)
        np.testing.assert_allclose(outputs, expected, atol=1e-5 * np.abs(expected).max())
    exact = sl.export(model, "onnxruntime", tmp_path / "float")
    assert (
        path.stat().st_size and sl.export(small, "onnxruntime", tmp_path / "int4").stat().st_size < exact.stat().st_size
    )
