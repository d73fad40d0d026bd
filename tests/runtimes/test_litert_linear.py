"""Linear layers in integers on LiteRT have a scale for each output, from every framework and in every form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

pytest.importorskip("tensorflow")
pytest.importorskip("ai_edge_litert")

import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema

import slimline as sl
from slimline.model.lowering import write
from slimline.runtimes.base import runtime
from slimline.runtimes.forms.tensorflow import einsum_by_columns
from slimline.runtimes.litert import Session
from slimline.steps.quantization.calibration import calibrate

keras = pytest.importorskip("keras")
L = keras.layers
ROWS = np.random.default_rng(0).normal(size=(32, 6, 12)).astype(np.float32)


class Net(nn.Module):
    """Layers over rows and over all of them, one used twice, one without a bias, one of a single output."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.twice = nn.Linear(12, 24), nn.Linear(24, 24)
        self.bare, self.head, self.one = nn.Linear(24, 5, bias=False), nn.Linear(30, 7), nn.Linear(7, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.twice(torch.relu(self.twice(torch.relu(self.wide(x)))))
        x = self.head(self.bare(x).flatten(1))
        return x, self.one(x)


class Equations(nn.Module):
    """Products by a stored tensor: by its rows, by its columns, by several of its dimensions, by each of a stack."""

    SHAPES = (12, 8), (10, 8), (6, 10, 9), (6, 9, 4)
    TERMS = ("btc,cd->btd", "btc,dc->bdt", "bct,tcd->bd", "tc,tcd->td")

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(shape) / shape[0]) for shape in self.SHAPES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.einsum(self.TERMS[1], torch.einsum(self.TERMS[0], x, self.weights[0]), self.weights[1])
        y = torch.einsum("bct,tcd->bd", x, self.weights[2])
        return torch.einsum("btd,tdk->btk", x.transpose(1, 2)[:, :, :9], self.weights[3]) + y[:, None, :4]


def uneven(weight: np.ndarray, axis: int) -> np.ndarray:
    """A weight whose outputs are of very different sizes."""
    factors = np.exp(np.random.default_rng(1).normal(size=weight.shape[axis]))
    return (weight * factors.reshape([-1 if d == axis else 1 for d in range(weight.ndim)])).astype(np.float32)


def torch_model() -> sl.Model:
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        for layer in (net.wide, net.twice, net.bare, net.head):
            layer.weight.copy_(torch.from_numpy(uneven(layer.weight.numpy(), 0)))
    return sl.load(net.eval(), (ROWS[:2],))


def keras_model() -> sl.Model:
    keras.utils.set_random_seed(0)
    x = rows = keras.Input((6, 12))
    twice = L.Dense(24, "relu", name="twice")
    x = L.EinsumDense("abc,cd->abd", (None, 24), "relu", "d", name="columns")(twice(twice(L.Dense(24, name="wide")(x))))
    x = L.EinsumDense("abcd,cde->abe", (6, 7), name="several")(L.Reshape((6, 4, 6))(x))
    x = L.EinsumDense("abc,dc->adb", (9, 6), name="rows")(x)
    x = L.EinsumDense("abc,bcd->abd", (9, 4), name="stack")(x)
    x = L.Dense(7, use_bias=False, name="head")(L.Flatten()(x))
    net = keras.Model(rows, [x, L.Dense(1, name="one")(x)])
    for layer in ("wide", "twice", "columns", "head"):
        kernel = net.get_layer(layer).kernel
        kernel.assign(uneven(keras.ops.convert_to_numpy(kernel), -1 % len(kernel.shape)))
    return sl.load(net)


def made(road: str, folder: Path) -> sl.Model:
    model = keras_model() if road == "keras" else torch_model()
    return sl.load(sl.export(model, "onnxruntime", folder)) if road == "onnx" else model


def products(path: Path) -> list[tuple[np.ndarray, np.ndarray, np.ndarray | None, float]]:
    """Codes ``(outputs, inputs)`` of the layers in a file, their scales, codes of biases, and scales of inputs."""
    file = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    graph = file.subgraphs[0]
    layers = []
    for operator in graph.operators:
        if type(operator.builtinOptions) not in (schema.Conv2DOptionsT, schema.FullyConnectedOptionsT):
            continue
        x, weight, *bias = (graph.tensors[i] for i in operator.inputs if i >= 0)
        codes = [np.asarray(file.buffers[t.buffer].data, np.uint8) for t in (weight, *bias)]
        assert weight.type == schema.TensorType.INT8 and weight.quantization.quantizedDimension == 0
        numbers = codes[1].view(np.int32) if bias else None
        scale = np.asarray(weight.quantization.scale)
        layers.append((codes[0].view(np.int8).reshape(weight.shape[0], -1), scale, numbers, x.quantization.scale[0]))
    return layers


def assert_near(small: sl.Model, path: Path) -> None:
    """Both kinds of LiteRT's kernels answer as the model does; of halves they round some otherwise."""
    expected = small.outputs(ROWS)
    for reference in (False, True):
        for answer, simulated in zip(Session(path, reference=reference).outputs((ROWS,)), expected, strict=True):
            step = np.diff(np.unique(simulated)).min()  # of a grid, whose numbers are many
            assert np.abs(answer - simulated).mean() <= (1.0 if reference else 0.5) * step


@pytest.mark.parametrize("road", ["torch", "onnx", "keras"])
def test_the_file_holds_codes_and_scales_of_the_grids(road: str, tmp_path: Path) -> None:
    model = made(road, tmp_path)
    small = calibrate(model, sl.StaticQuantization(), [(ROWS,)], "litert")
    path = tmp_path / "small.tflite"
    write(runtime("litert"), small, path)
    assert set(runtime("litert").integer_layers(path).values()) == {"integer"}
    assert_near(small, path)
    grids, stored, layers = small.quantization, small.parameters(), products(path)
    readers = model.graph.consumers()
    assert len(layers) == sum(len(readers[name]) for name in grids.weights) - (road == "keras")  # the stack
    for name, grid in grids.weights.items():
        if "stack" in name:
            assert grid.axis is None
            continue
        assert grid.axis is not None and grid.scale.size == stored[name].shape[grid.axis]
        order = [d for d in range(stored[name].ndim) if d != grid.axis]
        codes = grid.encode(stored[name]).transpose(grid.axis, *order).reshape(grid.scale.size, -1)
        own = [each for each in layers if np.array_equal(each[0], codes)]
        assert len(own) == len(readers[name]), name
        for _, scale, bias, x in own:
            np.testing.assert_allclose(scale, grid.scale.ravel(), rtol=1e-6)
            if bias is not None and bias.any():
                real = stored[str(readers[name][0].inputs[2])].ravel()
                assert np.abs(bias * (scale * x) - real).max() <= 0.51 * (scale * x).max()
    write(runtime("litert"), small, tmp_path / "again.tflite")
    assert (tmp_path / "again.tflite").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("road", ["torch", "onnx"])
def test_einsums_by_a_matrix_and_by_a_stack(road: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = sl.load(Equations().eval(), (ROWS[:2],))
    model = sl.load(sl.export(model, "onnxruntime", tmp_path)) if road == "onnx" else model
    small = calibrate(model, sl.StaticQuantization(), [(ROWS,)], "litert")
    assert sorted(str(grid.axis) for grid in small.quantization.weights.values()) == ["0", "1", "2", "None"]
    path = tmp_path / "small.tflite"
    write(runtime("litert"), small, path)
    assert sorted(len(scale) for _, scale, *_ in products(path)) == [8, 9, 10]
    assert_near(small, path)


def test_one_scale_where_it_is_asked_for(tmp_path: Path) -> None:
    step = sl.StaticQuantization(granularity="tensor", overrides={"head": {"granularity": "channel"}})
    small = calibrate(torch_model(), step, [(ROWS,)], "litert")
    path = tmp_path / "small.tflite"
    write(runtime("litert"), small, path)
    assert sorted(np.unique(scale).size for _, scale, *_ in products(path)) == [1, 1, 1, 1, 1, 7]
    assert_near(small, path)


def test_a_trained_network_answers_nearer_to_float() -> None:
    """With activations of 16 bits, beside which the error is that of the weights."""
    images, labels = (load_digits().data / 16).astype(np.float32), load_digits().target
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.LayerNorm(48), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))
    x, y = torch.from_numpy(images[:1200]), torch.from_numpy(labels[:1200])
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    model = sl.load(net.eval(), (images[:2],))
    errors = {}
    for granularity in ("tensor", "channel"):
        step = sl.StaticQuantization(granularity=granularity, activations="int16")
        small = calibrate(model, step, [(images[:256],)], "litert")
        errors[granularity] = np.square(small.predict(images[1200:]) - model.predict(images[1200:])).mean()
    assert errors["channel"] < 0.7 * errors["tensor"]


@pytest.mark.parametrize(
    ("equation", "x", "weight"),
    [
        ("abc,cd->abd", (2, 3, 4), (4, 5)), ("abc,dc->dab", (2, 3, 4), (5, 4)), ("abc,bdc->da", (2, 3, 4), (3, 5, 4)),
        ("...a,ab->...b", (2, 3, 4), (4, 5)), ("...a,ba", (2, 3, 4), (5, 4)), ("ab,bc", (3, 4), (4, 5)),
        ("xab, bxc -> ac", (2, 3, 4), (4, 2, 5)), ("a...,ab->...b", (4, 2, 3), (4, 5)),
    ],
)  # fmt: skip
def test_equations_by_columns(equation: str, x: Any, weight: Any) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=x).astype(np.float32), rng.normal(size=weight).astype(np.float32)

    def columns(order: Any) -> Any:
        turned = b.transpose(order)
        return tf.constant(turned.reshape(1, 1, -1, turned.shape[-1]))

    answer = einsum_by_columns(equation, tf.constant(a), columns)
    np.testing.assert_allclose(answer, np.einsum(equation, a, b), rtol=1e-4, atol=1e-5)
