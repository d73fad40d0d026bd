"""Integers whose ranges are found at run time row by row, as XNNPACK does, on LiteRT: from all frameworks."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.datasets import load_digits
from torch import fx, nn

pytest.importorskip("ai_edge_litert")
pytest.importorskip("tensorflow")

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import adapter
from slimline.frameworks.torch.rounding import round_dynamically
from slimline.runtimes.base import runtime
from slimline.runtimes.litert import Session

adapter("keras")  # sets what must be set before keras is imported

import keras  # noqa: E402
from keras import layers as L  # noqa: E402

from slimline.frameworks.keras.rounding import rounded_by_rows  # noqa: E402

STEP = sl.DynamicQuantization(undo=False)
ROWS, CHANNELS = 6, 4
Array = np.ndarray[Any, np.dtype[Any]]


def row_codes(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """XNNPACK's grid as its source defines it, in numpy: codes less the zero point, and what one of them is."""
    zero, levels = np.float32(0), np.float32(255)
    low, high = (np.minimum(x.min(axes, keepdims=True), zero), np.maximum(x.max(axes, keepdims=True), zero))
    factor = levels / np.maximum(high - low, np.float32(1e-30))
    bottom, top = np.float32(-128), np.float32(127)
    nearer = (bottom + low * factor) + (top + high * factor) > 0
    point = np.rint(np.clip(np.where(nearer, bottom - low * factor, top - high * factor), bottom, top))
    return np.clip(np.rint(x * factor) + point, bottom, top) - point, np.float32(1) / factor


@cache
def identity(convolution: bool) -> Session:
    """LiteRT's own kernel, whose weight is the unit matrix: code 127, scale 1."""
    import tempfile

    layer: Any = nn.Conv2d(CHANNELS, CHANNELS, (1, 3), padding=(0, 1)) if convolution else nn.Linear(CHANNELS, CHANNELS)
    with torch.no_grad():
        layer.weight.zero_()
        (layer.weight[..., 0, 1] if convolution else layer.weight).copy_(127 * torch.eye(CHANNELS))
        layer.bias.zero_()
    x = np.zeros((2, CHANNELS, 3, 2) if convolution else (2, CHANNELS), np.float32)
    small = sl.apply(sl.load(nn.Sequential(layer).eval(), (x,)), STEP, target="litert")
    return runtime("litert").load(sl.export(small, "litert", Path(tempfile.mkdtemp()) / "m.tflite"))


@cache
def simulation(axes: tuple[int, ...]) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(round_dynamically(graph.placeholder("x"), axes))
    return fx.GraphModule(nn.Module(), graph)


NUMBERS = st.floats(-1e4, 1e4, width=32).filter(lambda v: v == 0 or abs(v) > 1e-20)


SHAPE = (ROWS, CHANNELS, 3, 2)
STEPS = st.builds(lambda k, s: np.float32(s) * k, hnp.arrays(np.int32, SHAPE, elements=st.integers(-9, 9)), NUMBERS)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float32, SHAPE, elements=NUMBERS) | STEPS)
@pytest.mark.parametrize("convolution", [False, True])
def test_grid_and_simulations_are_the_runtimes_own_bit_by_bit(convolution, x):
    x = x.astype(np.float32) if convolution else x.astype(np.float32)[..., 0, 0].copy()
    axes = (1, 2, 3) if convolution else (1,)
    codes, step = row_codes(x, axes)
    assert np.array_equal(identity(convolution).run((x,)), (127 * codes).astype(np.float32) * step)
    assert np.array_equal(simulation(axes)(torch.tensor(x)).numpy(), codes * step)
    assert np.array_equal(keras.ops.convert_to_numpy(rounded_by_rows(x, axes)), codes * step)


class Layers(nn.Module):
    """Layers that read the same numbers, by XNNPACK's different kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.ModuleList((nn.Linear(4, 6), nn.Linear(4, 3, bias=False)))
        self.steps = nn.ModuleList((nn.Conv1d(4, 6, 1), nn.Conv1d(4, 6, 3, bias=False), nn.Conv1d(4, 6, 1, 2)))
        self.images = nn.ModuleList(
            (nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 1, padding=1), nn.Conv2d(4, 6, 1, 2), nn.Conv2d(4, 6, 3, 2, 1))
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [
            *(layer(x.transpose(1, 3)) for layer in self.rows),
            *(layer(x[:, :, 0]) for layer in self.steps),
            *(layer(x) for layer in self.images),
        ]


def test_each_layer_is_that_of_the_codes(tmp_path):
    x = np.random.default_rng(1).normal(size=(5, 4, 4, 5)).astype(np.float32)
    small = sl.apply(sl.load(Layers().eval(), (x[:2],)), STEP, target="litert")
    path = sl.export(small, "litert", tmp_path / "layers.tflite")
    assert integer(path) == set(small.quantization.layers) and len(integer(path)) == 9
    for real, simulated in zip(runtime("litert").load(path).outputs((x,)), small.outputs(x), strict=True):
        assert np.abs(real - simulated).max() < 2e-6


def test_each_layer_of_keras_is_that_of_the_codes(tmp_path):
    x = np.random.default_rng(2).normal(size=(5, 6, 5, 4)).astype(np.float32)
    i = keras.Input((6, 5, 4))
    steps = L.Reshape((30, 4))(i)
    layers = (L.Conv2D(6, 1)(i), L.Conv2D(6, 3, 2, "same")(i), L.Dense(6)(i), L.Dense(6)(L.Flatten()(i)))
    layers += (L.Conv1D(6, 1)(steps), L.Conv1D(6, 3, padding="causal")(steps), L.Conv1D(6, 3, 2)(steps))
    small = sl.apply(sl.load(keras.Model(i, list(layers))), STEP, target="litert")
    path = sl.export(small, "litert", tmp_path / "layers.tflite")
    assert integer(path) == set(small.quantization.layers) and len(integer(path)) == 7
    for real, simulated in zip(runtime("litert").load(path).outputs((x,)), small.outputs(x), strict=True):
        assert np.abs(real - simulated).max() < 2e-6


class Net(nn.Module):
    """What there is to quantize, and what is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.apart = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8)
        self.second = nn.Conv2d(8, 16, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.query, self.key = nn.Linear(16, 24), nn.Linear(16, 24, bias=False)
        self.head = nn.Linear(4 * 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.apart(torch.relu(self.first(x)))
        y = torch.relu(self.norm(self.second(y))).flatten(2).transpose(1, 2)
        scores = (self.query(y) * 0.3) @ self.key(y).transpose(1, 2)
        return self.head(scores.flatten(1)) if scores.shape[-1] == 4 else scores


IMAGES = (load_digits().images[:16, None] / 16).astype(np.float32)


@pytest.fixture(scope="module")
def net() -> sl.Model:
    torch.manual_seed(0)
    return sl.load(Net().eval(), IMAGES[:2])


@pytest.fixture(scope="module")
def small(net) -> sl.Model:
    return sl.apply(net, STEP, target="litert")


@pytest.fixture(scope="module")
def artifact(small, tmp_path_factory) -> Path:
    return sl.export(small, "litert", tmp_path_factory.mktemp("rows") / "net.tflite")


@pytest.fixture(scope="module")
def exported(net, tmp_path_factory) -> sl.Model:
    return sl.load(sl.export(net, "onnxruntime", tmp_path_factory.mktemp("float") / "net.onnx"), IMAGES[:2])


def integer(path: Path) -> set[str]:
    return {name for name, kind in runtime("litert").integer_layers(path).items() if kind == "integer"}


def answer(path: Path, x: Array) -> Array:
    return runtime("litert").load(path).run((x,))


def test_layers_run_in_integers_and_the_file_is_small(net, small, artifact, tmp_path):
    assert small.quantization.layers == ("first", "second", "query", "key", "head")
    assert integer(artifact) == {"first", "second", "query", "key", "head"}
    assert np.abs(answer(artifact, IMAGES) - small.predict(IMAGES)).max() < 2e-3
    assert np.abs(answer(artifact, IMAGES) - net.predict(IMAGES)).max() < 0.1 * np.abs(net.predict(IMAGES)).max()
    plain = sl.export(net, "litert", tmp_path / "float.tflite")
    weights = sum(small.parameters()[name].size for name in small.quantization.weights)
    assert plain.stat().st_size - artifact.stat().st_size > 2 * weights


def test_what_stays_in_float_is_said(net):
    from slimline.steps.base import Context, perform

    record = perform(STEP, net, Context(teacher=None, data=None, target="litert")).record
    (left,) = record["refused"]
    assert left["what"] == "apart" and "depthwise" in left["reason"]


def test_int4_weights_have_one_scale_an_output(net, tmp_path):
    short = sl.apply(net, sl.DynamicQuantization(weights="int4", undo=False), target="litert")
    assert {each.bits for each in short.quantization.weights.values()} == {4, 8}
    assert short.quantization.weights["query.weight"].scale.shape == (24, 1)
    path = sl.export(short, "litert", tmp_path / "short.tflite")
    assert integer(path) == {"first", "second", "query", "key", "head"}
    assert np.abs(answer(path, IMAGES) - short.predict(IMAGES)).max() < 2e-3


def test_int4_weights_of_an_odd_number_of_inputs_are_int8(tmp_path):
    x = np.random.default_rng(0).normal(size=(8, 7)).astype(np.float32)
    model = sl.load(nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)).eval(), (x[:2],))
    short = sl.apply(model, sl.DynamicQuantization(weights="int4", undo=False), target="litert")
    assert [each.bits for each in short.quantization.weights.values()] == [8, 4]
    path = sl.export(short, "litert", tmp_path / "short.tflite")
    assert np.abs(answer(path, x) - short.predict(x)).max() < 1e-2 * np.abs(short.predict(x)).max()


def test_an_onnx_model_gives_the_same_answers(small, exported, artifact, tmp_path):
    other = sl.apply(exported, STEP, target="litert")
    path = sl.export(other, "litert", tmp_path / "other.tflite")
    assert len(integer(path)) == 5
    assert np.abs(answer(path, IMAGES) - answer(artifact, IMAGES)).max() < 2e-3
    assert np.abs(other.predict(IMAGES) - small.predict(IMAGES)).max() < 2e-3


def keras_net() -> keras.Model:
    keras.utils.set_random_seed(0)
    x = i = keras.Input((8, 8, 1))
    x = L.Conv2D(8, 3, padding="same", activation="relu", name="first")(x)
    x = L.BatchNormalization()(L.Conv2D(16, 3, 2, use_bias=False, name="second")(x))
    x = L.Reshape((9, 16))(L.DepthwiseConv2D(3, padding="same", name="apart")(x))
    x = L.Dense(12, activation="relu", name="rows")(L.Conv1D(16, 3, padding="causal", name="steps")(x))
    return keras.Model(i, L.Dense(5, name="head")(L.Flatten()(x)))


@pytest.fixture(scope="module")
def keras_small() -> sl.Model:
    return sl.apply(sl.load(keras_net()), STEP, target="litert")


PICTURES = IMAGES.transpose(0, 2, 3, 1)


def test_a_keras_model_runs_in_integers(tmp_path):
    model = sl.load(keras_net())
    short = sl.apply(model, sl.DynamicQuantization(weights="int4", undo=False), target="litert")
    path = sl.export(short, "litert", tmp_path / "net.tflite")
    assert integer(path) == set(short.quantization.layers) == {"first", "second", "steps", "rows", "head"}
    largest = np.abs(model.predict(PICTURES)).max()
    assert np.abs(answer(path, PICTURES) - short.predict(PICTURES)).max() < 0.02 * largest
    assert 0.02 * largest < np.abs(answer(path, PICTURES) - model.predict(PICTURES)).max() < 0.5 * largest


@pytest.mark.parametrize("kind", ["torch", "keras", "onnx"])
def test_a_saved_model_gives_the_same_artifact(small, keras_small, exported, tmp_path, kind):
    model = {"torch": small, "keras": keras_small}.get(kind) or sl.apply(exported, STEP, target="litert")
    x = PICTURES if kind == "keras" else IMAGES
    again = sl.load(model.save(tmp_path / f"m{model.adapter.suffix}"))
    assert again.quantization == model.quantization and again.quantization.dynamic_grid == "int8_per_row"
    assert np.array_equal(again.predict(x), model.predict(x))
    paths = [sl.export(each, "litert", tmp_path / f"{n}.tflite") for n, each in enumerate((model, again))]
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("kind", ["torch", "keras", "onnx"])
def test_a_network_that_does_not_round_as_its_notes_say_is_found(net, small, keras_small, exported, kind):
    model = {"torch": small, "keras": keras_small}.get(kind) or sl.apply(exported, STEP, target="litert")
    plain = {"torch": net, "onnx": exported}.get(kind) or sl.load(keras_net())
    mismatches, own = model.adapter.format_mismatches, replace(model.quantization, weights={})
    assert mismatches(model.native, own) == []
    assert mismatches(model.native, replace(own, dynamic=own.dynamic[1:]))
    assert set(mismatches(plain.native, own)) == set(own.dynamic)
    if kind != "keras":  # whose layers have one such grid only
        assert mismatches(model.native, replace(own, dynamic_grid="uint8_per_tensor"))


def test_a_model_for_another_target_is_refused(net, small, tmp_path):
    with pytest.raises(SlimlineError, match="onnxruntime finds ranges at run time otherwise"):
        sl.export(small, "onnxruntime", tmp_path / "m.onnx")
    linear = sl.DynamicQuantization(layers=["type:linear"], undo=False)
    with pytest.raises(SlimlineError, match="quantize the float model for litert"):
        sl.export(sl.apply(net, linear), "litert", tmp_path / "m.tflite")
    blocks = sl.apply(net, linear.model_copy(update={"weights": "int4"}))
    with pytest.raises(SlimlineError, match="quantize the float model for litert"):
        sl.export(blocks, "litert", tmp_path / "m.tflite")


def test_keras_models_are_refused_where_another_grid_is_needed():
    with pytest.raises(SlimlineError, match="do not round as onnxruntime does when it runs: choose the target"):
        sl.apply(sl.load(keras_net()), STEP, target="onnxruntime")


def test_a_grid_that_there_is_not_is_refused():
    from slimline.graph.quantization import Quantization

    notes = replace(Quantization(dynamic=("a",)), dynamic_grid="int8_per_row").notes()
    assert Quantization.from_notes(notes).dynamic_grid == "int8_per_row"
    alone = {name: each for name, each in notes.items() if name != "dynamic"}
    for bad in ({**notes, "dynamic_grid": "int9"}, {**notes, "dynamic_grid": []}, alone):
        with pytest.raises(SlimlineError, match="damaged"):
            Quantization.from_notes(bad)
