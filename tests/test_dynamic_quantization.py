"""Integers whose ranges are found at run time, from the step to the operators that the runtime executes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper
from torch import fx, nn

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.frameworks.torch.rounding import round_dynamically
from slimline.methods.formats import IntegerGrid
from slimline.runtimes.base import names, runtime
from slimline.steps import clock
from slimline.steps.quantization import undo

TOKENS = np.random.default_rng(0).integers(0, 20, (16, 6))
STEP = sl.DynamicQuantization(undo=False)
Array = np.ndarray[Any, np.dtype[Any]]


def dynamic_grid(x: Array) -> IntegerGrid:
    """The grid of DynamicQuantizeLinear as ONNX defines it, in numpy."""
    low, high = np.minimum(x.min(initial=0.0), np.float32(0)), np.maximum(x.max(initial=0.0), np.float32(0))
    scale = (high - low) / np.float32(255) if high > low else np.float32(1)
    zero = np.rint(np.clip(-low / scale, 0, 255)).astype(np.int32)
    return IntegerGrid(np.asarray(scale, np.float32), (), 8, False, zero_point=np.asarray(zero))


class Words(nn.Module):
    """What there is to quantize, and what is not."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.query, self.key = nn.Linear(16, 24), nn.Linear(16, 24, bias=False)
        self.memory = nn.LSTM(24, 8, bidirectional=True, batch_first=True)
        self.last = nn.GRU(16, 12, batch_first=True)
        self.over_time, self.head = nn.Conv1d(12, 12, 3), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.table(x)
        y, _ = self.memory(torch.relu(self.query(y)) + self.key(y))
        y, _ = self.last(y)
        return self.head(torch.relu(self.over_time(y.transpose(1, 2))).mean(2))


class Encoder(nn.Module):
    """A transformer's encoder and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.table(x)).mean(1))


def loaded(module: nn.Module) -> sl.Model:
    return sl.load(module.eval(), TOKENS[:2])


@pytest.fixture(scope="module")
def words() -> sl.Model:
    torch.manual_seed(0)
    return loaded(Words())


@pytest.fixture(scope="module")
def small(words) -> sl.Model:
    return sl.apply(words, STEP)


@pytest.fixture(scope="module")
def artifact(small, tmp_path_factory) -> Path:
    return sl.export(small, "onnxruntime", tmp_path_factory.mktemp("dynamic") / "words.onnx")


@pytest.fixture(scope="module")
def float_file(words, tmp_path_factory) -> Path:
    return sl.export(words, "onnxruntime", tmp_path_factory.mktemp("float") / "words.onnx")


@pytest.fixture(scope="module")
def exported(float_file) -> sl.Model:
    """The float network as an ONNX model."""
    return sl.load(float_file, TOKENS[:2])


@cache
def runtimes_own() -> onnxruntime.InferenceSession:
    """DynamicQuantizeLinear by itself, and what its codes stand for."""
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["codes", "scale", "zero"]),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["y"]),
    ]
    kinds = {"codes": TensorProto.UINT8, "scale": TensorProto.FLOAT, "zero": TensorProto.UINT8, "y": TensorProto.FLOAT}
    ends = [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])], ends)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


@cache
def simulation() -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(round_dynamically(graph.placeholder("x")))
    return fx.GraphModule(nn.Module(), graph)


NUMBERS = st.floats(-1e4, 1e4, width=32).filter(lambda v: v == 0 or abs(v) > 1e-30)


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(np.float32, st.integers(1, 40), elements=NUMBERS)
    | st.builds(lambda k, s: np.float32(s) * k, hnp.arrays(np.int32, 32, elements=st.integers(-9, 9)), NUMBERS)
)
def test_grid_and_simulation_are_the_runtimes_own_bit_by_bit(x):
    x = x.astype(np.float32)
    codes, scale, zero, real = runtimes_own().run(None, {"x": x})
    grid = dynamic_grid(x)
    assert grid.scale == scale and grid.zero == zero
    assert np.array_equal(grid.encode(x), codes)
    assert np.array_equal(grid.round(x), real)
    assert np.array_equal(simulation()(torch.tensor(x)).numpy(), real)


def test_a_product_is_that_of_the_codes(tmp_path):
    torch.manual_seed(1)
    x = np.random.default_rng(1).normal(size=(7, 33)).astype(np.float32)
    model = sl.apply(sl.load(nn.Sequential(nn.Linear(33, 9)).eval(), x[:2]), STEP)
    answer = runtime("onnxruntime").load(sl.export(model, "onnxruntime", tmp_path / "m.onnx")).run((x,))
    grid, (each,) = dynamic_grid(x), model.quantization.weights.values()
    stored = model.parameters()
    codes = each.encode(stored["0.weight"]).astype(np.int64)
    sums = (grid.encode(x).astype(np.int64) - int(grid.zero)) @ codes.T
    expected = sums.astype(np.float32) * (grid.scale * each.scale.ravel()) + stored["0.bias"]
    assert np.array_equal(answer, expected)
    assert np.allclose(model.predict(x), expected, atol=1e-5)


def lstm(x: Array, w: Any, r: Any, bias: Array) -> Array:
    """DynamicQuantizeLSTM by its definition: the input is rounded once for all steps, the state at each of them."""

    def product(a: Array, matrix: tuple[Array, Array]) -> Array:
        grid = dynamic_grid(a)
        sums = (grid.encode(a).astype(np.int64) - int(grid.zero)) @ matrix[0].astype(np.int64)
        return sums.astype(np.float32) * (grid.scale * matrix[1])

    def sigmoid(a: Array) -> Array:
        return 1 / (1 + np.exp(-a))

    wide = product(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:2], -1) + bias
    h = c = np.zeros((x.shape[1], r[0].shape[0]), np.float32)
    steps = []
    for gates in wide:
        i, o, f, g = np.split(gates + product(h, r), 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = (sigmoid(o) * np.tanh(c)).astype(np.float32)
        steps.append(h)
    return np.stack(steps)


def test_an_lstm_is_that_of_the_codes(tmp_path):
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory = nn.LSTM(12, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.memory(x.transpose(0, 1))[0].transpose(0, 1)

    torch.manual_seed(2)
    x = np.random.default_rng(2).normal(size=(3, 5, 12)).astype(np.float32)
    model = sl.apply(sl.load(Last().eval(), x[:2]), STEP)
    path = sl.export(model, "onnxruntime", tmp_path / "m.onnx")
    assert runtime("onnxruntime").integer_layers(path)["memory/LSTM"] == "integer"
    stored, grids = model.parameters(), model.quantization.weights

    def ordered(array: Array) -> Array:  # i, f, g, o to i, o, f, c
        return np.concatenate([np.split(array, 4)[k] for k in (0, 3, 1, 2)])

    def matrix(name: str) -> tuple[Array, Array]:
        return ordered(grids[name].encode(stored[name])).T, ordered(grids[name].scale.ravel())

    bias = ordered(stored["memory.bias_ih_l0"] + stored["memory.bias_hh_l0"])
    expected = lstm(x.swapaxes(0, 1), matrix("memory.weight_ih_l0"), matrix("memory.weight_hh_l0"), bias)
    answer = runtime("onnxruntime").load(path).run((x,)).swapaxes(0, 1)
    assert np.abs(answer - expected).max() < 2e-5  # the runtime's own sigmoid
    assert np.abs(answer - model.predict(x).swapaxes(0, 1)).max() > 1e-4  # what it remembers is rounded too


def test_layers_run_in_integers_and_the_file_is_small(words, small, artifact, float_file):
    layers = runtime("onnxruntime").integer_layers(artifact)
    integer = {name for name, kind in layers.items() if kind == "integer"}
    assert integer == {"query", "key", "head", "memory/LSTM"}
    assert small.quantization.layers == ("query", "key", "memory", "head")
    bits = runtime("onnxruntime").weight_bits
    answer = runtime("onnxruntime").load(artifact).run((TOKENS,))
    assert np.abs(answer - words.predict(TOKENS)).max() < (0.1 if bits == 8 else 0.2) * np.abs(answer).max()
    stored = onnx.load(artifact).graph.initializer
    codes = sum(int(np.prod(t.dims)) for t in stored if t.data_type == TensorProto.INT8)
    assert codes >= sum(words.parameters()[name].size for name in small.quantization.weights)
    largest = max(np.abs(numpy_helper.to_array(t)).max() for t in stored if t.data_type == TensorProto.INT8 and t.dims)
    assert largest <= 127 and artifact.stat().st_size < 0.75 * float_file.stat().st_size


def test_what_stays_in_float_is_said(words):
    from slimline.steps.base import Context, perform

    record = perform(STEP, words, Context(teacher=None, data=None, target="onnxruntime")).record
    reasons = {entry["what"]: entry["reason"] for entry in record["refused"]}
    assert reasons.keys() == {"over_time", "last"}
    assert "no fast kernel" in reasons["over_time"] and "GRU" in reasons["last"]
    assert record["weight_bits"] == runtime("onnxruntime").weight_bits
    assert any("recurrent" in note for note in record["notes"])


def test_an_onnx_model_gives_the_same_artifact(exported, small, artifact, tmp_path):
    other = sl.apply(exported, STEP)
    path = sl.export(other, "onnxruntime", tmp_path / "other.onnx")
    answers = [runtime("onnxruntime").load(each).run((TOKENS,)) for each in (artifact, path)]
    assert np.array_equal(*answers)
    assert np.allclose(other.predict(TOKENS), small.predict(TOKENS), atol=1e-6)


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_a_saved_model_gives_the_same_artifact(small, artifact, exported, tmp_path, kind):
    model = small if kind == "torch" else sl.apply(exported, STEP)
    again = sl.load(model.save(tmp_path / f"m{model.adapter.suffix}"))
    assert again.quantization == model.quantization
    assert np.array_equal(again.predict(TOKENS), model.predict(TOKENS))
    first = artifact if kind == "torch" else sl.export(model, "onnxruntime", tmp_path / "first.onnx")
    assert sl.export(again, "onnxruntime", tmp_path / "again.onnx").read_bytes() == first.read_bytes()


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_a_network_that_does_not_round_as_its_notes_say_is_found(words, exported, kind):
    from dataclasses import replace

    model = sl.apply(words if kind == "torch" else exported, STEP)
    adapter, own = model.adapter, replace(model.quantization, weights={})
    assert adapter.format_mismatches(model.native, own) == []
    assert adapter.format_mismatches(model.native, replace(own, dynamic=own.dynamic[1:]))
    plain = words if kind == "torch" else exported
    assert adapter.format_mismatches(plain.native, own) == list(own.dynamic)


def test_attention_projections_of_an_encoder_run_in_integers(tmp_path):
    torch.manual_seed(3)
    model = loaded(Encoder())
    small = sl.apply(model, STEP)
    path = sl.export(small, "onnxruntime", tmp_path / "encoder.onnx")
    layers = runtime("onnxruntime").integer_layers(path)
    integer = [name for name, kind in layers.items() if kind == "integer"]
    assert len(integer) == 4 + 1 and "head" in integer
    answer = runtime("onnxruntime").load(path).run((TOKENS,))
    assert np.abs(answer - small.predict(TOKENS)).max() < 1e-5  # but for the order of sums
    assert np.abs(answer - model.predict(TOKENS)).max() < 0.05 * np.abs(answer).max()


def test_int4_weights_run_by_the_kernel_for_them(exported, tmp_path):
    small = sl.apply(exported, sl.DynamicQuantization(weights="int4", undo=False))
    path = sl.export(small, "onnxruntime", tmp_path / "small.onnx")
    layers = runtime("onnxruntime").integer_layers(path)
    assert sum(kind == "integer" for kind in layers.values()) == 4
    assert sum(t.data_type == TensorProto.INT4 for t in onnx.load(path).graph.initializer) == 3


def test_layers_that_are_slower_go_back(words, monkeypatch):
    answer = {"back": ["key"], "slower": "", "batch": 1, "threads": 1, "artifacts": 0, "seconds": 0.0, "trials": []}
    monkeypatch.setattr(clock, "by_the_clock", lambda *_: answer)
    monkeypatch.setattr(undo, "_agreeing", lambda *_: {"back": [], "reason": "", "artifacts": 0})
    small = sl.apply(words, sl.DynamicQuantization())
    assert small.quantization.layers == ("query", "memory", "head")
    assert small.quantization.float_layers == {"key": undo.SLOWER}
    assert "key.weight" not in small.quantization.weights


def test_layers_are_chosen(words):
    small = sl.apply(words, sl.DynamicQuantization(layers=["type:linear"], keep=["head"], undo=False))
    assert small.quantization.layers == ("query", "key")


@pytest.mark.parametrize("target", [name for name in names() if not runtime(name).dynamic])
def test_targets_without_such_integers_are_refused(words, target):
    with pytest.raises(SlimlineError, match=r"choose the target .*onnxruntime"):
        sl.apply(words, STEP, target=target)


def test_models_with_nothing_to_quantize_are_refused(small):
    convolution = sl.load(nn.Sequential(nn.Conv2d(1, 2, 3)).eval(), torch.zeros(1, 1, 8, 8))
    with pytest.raises(SlimlineError, match="finds no weight"):
        sl.apply(convolution, STEP)
    with pytest.raises(SlimlineError, match="on integer grids already"):
        sl.apply(small, STEP)
    with pytest.raises(SlimlineError, match="layer for keep"):
        sl.apply(convolution, sl.DynamicQuantization(keep=["nothing"]))
