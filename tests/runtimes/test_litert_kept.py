"""Layers that stay in float between integer ones on LiteRT: the converter leaves them so, from every framework."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

pytest.importorskip("tensorflow")
pytest.importorskip("ai_edge_litert")

from ai_edge_litert.interpreter import Interpreter

import slimline as sl
from slimline.model.lowering import write
from slimline.runtimes.base import runtime
from slimline.runtimes.litert import Session
from slimline.steps.quantization.calibration import calibrate

keras = pytest.importorskip("keras")
L = keras.layers
DIGITS = (load_digits().images[:64, None] / 16).astype(np.float32)
LAYERS = ("stem", "middle", "last", "hidden", "deep", "head")


class Net(nn.Module):
    """Three convolutions and three linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.last = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 8, 3, 2)
        self.hidden, self.deep, self.head = nn.Linear(32, 24), nn.Linear(24, 48), nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.last(torch.relu(self.middle(torch.relu(self.stem(x))))))
        return self.head(torch.relu(self.deep(torch.relu(self.hidden(x.flatten(1))))))


class Kinds(nn.Module):
    """The other products that a layer can be."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep, self.back = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 8, 2)
        self.tokens, self.line = nn.Linear(25, 12), nn.Conv1d(8, 6, 3)
        self.head = nn.Linear(60, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.back(torch.relu(self.deep(torch.relu(self.stem(x))))))
        return self.head(torch.relu(self.line(self.tokens(x.flatten(2)))).flatten(1))


def spread(weight: np.ndarray) -> np.ndarray:
    """A weight ``(outputs, …)`` with one large number per output, in whose steps the others are all but lost."""
    flat = weight.reshape(len(weight), -1).copy()
    flat[:, 0] = 30 * np.abs(weight).max()
    return flat.reshape(weight.shape)


def torch_model() -> sl.Model:
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        for layer in (net.middle, net.deep):
            layer.weight.copy_(torch.from_numpy(spread(layer.weight.numpy())))
    return sl.load(net.eval(), (DIGITS[:2],))


def keras_model() -> sl.Model:
    keras.utils.set_random_seed(0)
    x = image = keras.Input((8, 8, 1))
    for name, width, options in (("stem", 8, {}), ("middle", 16, {"padding": "same"}), ("last", 8, {"strides": 2})):
        x = L.Conv2D(width, 3, activation="relu", name=name, **options)(x)
    x = L.Flatten()(x)
    for name, width in (("hidden", 24), ("deep", 48)):
        x = L.Dense(width, activation="relu", name=name)(x)
    net = keras.Model(image, L.Dense(10, name="head")(x))
    for name in ("middle", "deep"):
        kernel = net.get_layer(name).kernel
        kernel.assign(spread(keras.ops.convert_to_numpy(kernel).T).T)
    return sl.load(net)


def operators(path: Path) -> list[str]:
    """What runs, in order."""
    return [o["op_name"] for o in Interpreter(str(path))._get_ops_details() if o["op_name"] != "DELEGATE"]


@pytest.mark.parametrize("road", ["torch", "onnx", "keras"])
def test_layers_between_integers_stay_in_float(road: str, tmp_path: Path) -> None:
    model, images = (keras_model(), DIGITS.transpose(0, 2, 3, 1)) if road == "keras" else (torch_model(), DIGITS)
    if road == "onnx":
        model = sl.load(sl.export(model, "onnxruntime", tmp_path))
    whole = calibrate(model, sl.StaticQuantization(), [(images,)], "litert")
    mixed = calibrate(model, sl.StaticQuantization(keep=("middle", "deep")), [(images,)], "litert")
    paths = tmp_path / "whole.tflite", tmp_path / "mixed.tflite"
    for small, path in zip((whole, mixed), paths, strict=True):
        write(runtime("litert"), small, path)
    kinds = [runtime("litert").integer_layers(path) for path in paths]
    assert [kinds[0][name] for name in LAYERS] == ["integer"] * 6
    assert [kinds[1][name] for name in LAYERS] == ["integer", "float", "integer"] * 2
    moves = ("RESHAPE", "TRANSPOSE")
    assert [o for o in operators(paths[0]) if o not in moves] == [
        "QUANTIZE", *["CONV_2D"] * 6, "DEQUANTIZE"]  # fmt: skip
    assert "CAST" not in operators(paths[1])
    answers, expected = Session(paths[1]).run((images,)), mixed.outputs(images)[0]
    rounded = np.abs(whole.outputs(images)[0] - expected).mean()
    assert np.abs(answers - expected).mean() < 0.1 * rounded


def test_every_kind_of_product_stays_in_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = sl.load(Kinds().eval(), (DIGITS[:2],))
    names = ("deep", "back", "tokens", "line")
    for keep in (names[::2], names[1::2]):
        small = calibrate(model, sl.StaticQuantization(keep=keep), [(DIGITS,)], "litert")
        path = tmp_path / "small.tflite"
        write(runtime("litert"), small, path)
        kinds = runtime("litert").integer_layers(path)
        assert {name for name in ("stem", *names, "head") if kinds[name] == "float"} == set(keep)
        expected = small.outputs(DIGITS)[0]
        np.testing.assert_allclose(Session(path).run((DIGITS,)), expected, rtol=0, atol=0.02 * np.abs(expected).max())


def test_layers_of_keras_that_hold_others_stay_in_float(tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    x = image = keras.Input((8, 8))
    for layer in (L.Dense(16, activation="relu", name="stem"), L.SeparableConv1D(16, 3, name="parts"),
                  L.EinsumDense("abc,cd->abd", (6, 12), name="sum"), L.TimeDistributed(L.Dense(8), name="timed"),
                  L.Flatten(), L.Dense(10, name="head")):  # fmt: skip
        x = layer(x)
    model, images = sl.load(keras.Model(image, x)), DIGITS[:, 0]
    keep = ("parts*", "sum", "timed*")
    small = calibrate(model, sl.StaticQuantization(keep=keep), [(images,)], "litert")
    path = tmp_path / "small.tflite"
    write(runtime("litert"), small, path)
    kinds = runtime("litert").integer_layers(path)
    products = ("stem", "parts.depthwise", "parts.pointwise", "sum", "timed", "head")
    assert [kinds[name] for name in products] == ["integer", *["float"] * 4, "integer"]
    expected = small.outputs(images)[0]
    np.testing.assert_allclose(Session(path).run((images,)), expected, rtol=0, atol=0.02 * np.abs(expected).max())
