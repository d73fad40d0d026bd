"""Activations of 16 bits beside weights of 8 on LiteRT: kernels, exactness, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("tensorflow")
pytest.importorskip("ai_edge_litert")

from ai_edge_litert import schema_py_generated as schema

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.model.lowering import write
from slimline.runtimes.base import names, runtime
from slimline.runtimes.litert import Session
from slimline.steps.quantization.calibration import calibrate
from tests.runtimes import mobile

IMAGES = np.random.default_rng(0).normal(size=(32, 3, 8, 8)).astype(np.float32)


class Net(nn.Module):
    """All kinds of convolutions, sums, pools and moves, and functions that LiteRT has in float alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.first, self.deep = nn.Conv2d(8, 16, 3, stride=2), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point, self.back = nn.Conv2d(16, 16, 1), nn.ConvTranspose2d(16, 8, 2, 2)
        self.hidden, self.head = nn.Linear(24, 32), nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = nn.functional.relu6(self.first(nn.functional.pad(x, [1, 1, 1, 1])))
        x = nn.functional.max_pool2d(torch.relu(x + self.point(self.deep(x))), 2)
        x = torch.sigmoid(x) * x
        x = torch.cat([x.mean((2, 3)), torch.tanh(self.back(x)).mean((2, 3))], 1)
        return torch.softmax(self.head(nn.functional.gelu(self.hidden(x)) - 0.1), 1)


@pytest.fixture(scope="module")
def model() -> sl.Model:
    torch.manual_seed(0)
    net = Net()
    net.train()(torch.randn(32, 3, 8, 8))
    return sl.load(net.eval(), (IMAGES[:2],))


def wide(model: sl.Model, **fields: object) -> sl.Model:
    step = sl.StaticQuantization(activations="int16", **fields)
    return calibrate(model, step, [(IMAGES,)], "litert")


def checked(small: sl.Model, path: Path) -> dict[str, str]:
    """Which operators are integer, of a file that answers as the model does, by both kinds of LiteRT's kernels."""
    write(runtime("litert"), small, path)
    expected = small.outputs(IMAGES[:5])[0]
    for reference in (False, True):
        answers = Session(path, reference=reference).run((IMAGES[:5],))
        np.testing.assert_allclose(answers, expected, rtol=0, atol=2e-4 * np.abs(expected).max())
    return dict(runtime("litert").integer_layers(path))


LAYERS = ("stem", "first", "deep", "point", "back", "hidden", "head")


@pytest.mark.parametrize("road", ["torch", "onnx"])
def test_the_file_rounds_as_the_model(model: sl.Model, road: str, tmp_path: Path) -> None:
    source = model if road == "torch" else sl.load(sl.export(model, "onnxruntime", tmp_path))
    small = wide(source)
    assert small.quantization.layers == LAYERS
    grids = small.quantization.activations.values()
    assert all((each.bits, each.signed, each.zero_point) == (16, True, None) for each in grids)
    kinds = checked(small, tmp_path / "small.tflite")
    floating = {name.split(" ")[0] for name, kind in kinds.items() if kind == "float"}
    assert all(kinds[layer] == "integer" for layer in (*LAYERS, "ADD", "MAX_POOL_2D", "MUL"))
    assert {"LOGISTIC", "TANH", "GELU", "SOFTMAX"} <= floating and "CAST" not in floating
    expected, answers = model.outputs(IMAGES)[0], small.outputs(IMAGES)[0]
    bytes_alone = calibrate(source, sl.StaticQuantization(), [(IMAGES,)], "litert").outputs(IMAGES)[0]
    assert np.abs(answers - expected).max() < 0.5 * np.abs(bytes_alone - expected).max()


def test_types_and_biases_of_the_file(model: sl.Model, tmp_path: Path) -> None:
    path = sl.export(wide(model), "litert", tmp_path)
    file = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    graph, kinds = file.subgraphs[0], schema.TensorType
    products = [o for o in graph.operators if type(o.builtinOptions).__name__ in (
        "Conv2DOptionsT", "DepthwiseConv2DOptionsT", "FullyConnectedOptionsT")]  # fmt: skip
    types = {tuple(graph.tensors[i].type for i in (*o.inputs, *o.outputs)) for o in products}
    assert types == {(kinds.INT16, kinds.INT8, kinds.INT64, kinds.INT16)}
    steps = [t.quantization.zeroPoint for t in graph.tensors if t.type == kinds.INT16]
    weights = [graph.tensors[o.inputs[1]] for o in products]
    assert all(len(w.quantization.scale) == max(w.shape[0], w.shape[-1] * (w.shape[0] == 1)) for w in weights)
    assert steps and all(zero is None or not np.any(zero) for zero in steps)


def test_layers_that_stay_in_float_keep_their_weights(model: sl.Model, tmp_path: Path) -> None:
    small = wide(model, keep=("deep", "head"))
    kinds = checked(small, tmp_path / "small.tflite")
    assert [kinds[layer] for layer in ("first", "deep", "point", "head")] == ["integer", "float", "integer", "float"]


def test_a_saved_model_is_the_same(model: sl.Model, tmp_path: Path) -> None:
    for source, name in ((model, "small.pt2"), (sl.load(sl.export(model, "onnxruntime", tmp_path)), "small.onnx")):
        small = wide(source)
        small.save(tmp_path / name)
        again = sl.load(tmp_path / name)
        assert again.quantization == small.quantization
        np.testing.assert_array_equal(again.outputs(IMAGES)[0], small.outputs(IMAGES)[0])


@pytest.mark.parametrize("target", [name for name in names() if "int16" not in runtime(name).policies])
def test_who_has_none_says_who_has(target: str) -> None:
    data = sl.Data(calibration=(mobile.images(8), np.arange(8) % 5))
    with pytest.raises(SlimlineError, match=f"^{target} computes with no int16 activations: .* the target litert"):
        sl.apply(mobile.model(), sl.StaticQuantization(activations="int16"), data, target=target)


def test_keras_models_go_there_as_onnx(tmp_path: Path) -> None:
    keras = pytest.importorskip("keras")
    net = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(8, 3, activation="relu"),
                            keras.layers.Flatten(), keras.layers.Dense(5)])  # fmt: skip
    images, model = IMAGES.transpose(0, 2, 3, 1), sl.load(net)
    step = sl.StaticQuantization(activations="int16")
    with pytest.raises(SlimlineError, match="models that go there as ONNX: export the float model for onnxruntime"):
        calibrate(model, step, [(images,)], "litert")
    again = sl.load(sl.export(model, "onnxruntime", tmp_path))
    small = calibrate(again, step, [(images,)], "litert")
    path = tmp_path / "small.tflite"
    write(runtime("litert"), small, path)
    expected = small.outputs(images)[0]
    np.testing.assert_allclose(Session(path).run((images,)), expected, rtol=0, atol=2e-4 * np.abs(expected).max())


def test_int16_goes_with_int8_weights() -> None:
    with pytest.raises(SlimlineError, match="multiplied by such numbers alone"):
        sl.StaticQuantization(weights="fp8_e4m3", activations="int16")
    with pytest.raises(SlimlineError, match="computes with no int4 weights beside integer activations"):
        calibrate(mobile.model(), sl.StaticQuantization(weights="int4", activations="int16"), [(IMAGES,)], "litert")
    with pytest.raises(SlimlineError, match="MixedPrecision chooses among integers beside activations of 8 bits"):
        sl.MixedPrecision(max_size=0.5, quantization=sl.StaticQuantization(activations="int16"))
