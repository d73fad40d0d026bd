"""Layers as matrices and their Gram matrices, against the frameworks' own arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

import slimline as sl
from slimline.evidence.grams import collect
from slimline.graph.edits import PutTensors
from slimline.graph.matrix import matrices

torch = pytest.importorskip("torch")
nn = torch.nn

TORCH = {
    "conv": (nn.Conv2d(3, 4, 3, padding=1), (3, 7, 6)),
    "strided": (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(2, 0), dilation=(1, 2)), (3, 9, 8)),
    "same": (nn.Conv2d(2, 4, 4, padding="same", dilation=2), (2, 9, 8)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (4, 6, 6)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding=1), (4, 6, 6)),
    "one": (nn.Conv1d(3, 5, 5, stride=2, padding=2), (3, 12)),
    "three": (nn.Conv3d(2, 3, (2, 3, 1), padding=(1, 0, 0)), (2, 5, 6, 4)),
    "linear": (nn.Linear(5, 3), (5,)),
    "tokens": (nn.Linear(5, 3, bias=False), (4, 5)),
}


def keras_layers():
    keras = pytest.importorskip("keras")
    L = keras.layers
    return {
        "conv": (L.Conv2D(4, 3, padding="same", strides=2), (7, 6, 3)),
        "valid": (L.Conv2D(4, (3, 2), dilation_rate=2), (9, 8, 3)),
        "grouped": (L.Conv2D(6, 3, groups=2), (6, 6, 4)),
        "depthwise": (L.DepthwiseConv2D(3, depth_multiplier=2, padding="same"), (6, 6, 4)),
        "causal": (L.Conv1D(5, 3, padding="causal", dilation_rate=2), (12, 3)),
        "dense": (L.Dense(3), (4, 5)),
        "einsum": (L.EinsumDense("abc,cde->abde", output_shape=(None, 2, 3), bias_axes="de"), (4, 5)),
    }


def _check(model: sl.Model, x: np.ndarray) -> None:
    (layer,) = matrices(model.graph)
    stored = model.parameters()
    w = layer.matrix(stored[layer.weight])
    assert w.shape == layer.shape
    np.testing.assert_array_equal(layer.tensor(w, stored[layer.weight].shape), stored[layer.weight])
    found = layer.rows(x) @ w.swapaxes(1, 2)
    expected = model.predict(x)
    if layer.bias is not None:
        expected = model.adapter.outputs(model.edit(PutTensors({layer.bias: np.zeros_like(stored[layer.bias])})), (x,))[
            0
        ]
    # The same numbers: (groups, rows, outputs) against (batch, outputs, places) or (batch, places, outputs).
    channel = 1 if model.framework == "torch" and x.ndim > 2 and layer.kernel else -1
    width = w.shape[0] * w.shape[1]
    flat = np.moveaxis(expected, channel, -1).reshape(-1, width) if expected.shape[channel] == width else expected
    np.testing.assert_allclose(
        found.transpose(1, 0, 2).reshape(-1, width), flat.reshape(-1, width), atol=1e-4, rtol=1e-4
    )
    seen = collect(model, [layer], [(x[:2],), (x[2:],)])[layer.node]
    rows = layer.rows(x).astype(np.float64)
    np.testing.assert_allclose(seen.second, rows.swapaxes(1, 2) @ rows / rows.shape[1], atol=1e-5)
    np.testing.assert_allclose(seen.mean, rows.mean(1), atol=1e-6)
    assert layer.rows(x, 3).shape[1] == 3


@pytest.mark.parametrize("name", TORCH)
def test_a_torch_layer_is_its_matrix(name):
    layer, shape = TORCH[name]
    x = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    _check(sl.load(layer, x), x)


def test_a_transposed_convolution_sees_one_place_at_a_time():
    layer = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2, bias=False)
    x = np.random.default_rng(0).normal(size=(2, 4, 5, 5)).astype(np.float32)
    model = sl.load(layer, x)
    (found,) = matrices(model.graph)
    assert found.shape == (2, 3 * 4, 2)
    y = found.rows(x) @ found.matrix(model.parameters()[found.weight]).swapaxes(1, 2)
    places = y.reshape(2, 2, 5, 5, 3, 2, 2).transpose(1, 0, 4, 2, 5, 3, 6).reshape(2, 6, 10, 10)
    np.testing.assert_allclose(places, model.predict(x), atol=1e-5)


@pytest.mark.parametrize("name", ["conv", "valid", "grouped", "depthwise", "causal", "dense", "einsum"])
def test_a_keras_layer_is_its_matrix(name):
    keras = pytest.importorskip("keras")
    layer, shape = keras_layers()[name]
    x = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    _check(sl.load(keras.Sequential([keras.Input(shape), layer])), x)


def test_passes_are_bounded_by_memory():
    model = sl.load(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), np.ones((2, 6), np.float32))
    layers = matrices(model.graph)
    x = np.random.default_rng(1).normal(size=(8, 6)).astype(np.float32)
    small, large = (collect(model, layers, [(x,)], memory=m) for m in (1, 2**20))
    for layer in layers:
        np.testing.assert_array_equal(small[layer.node].second, large[layer.node].second)


def test_no_batches_and_nan_are_refused():
    model = sl.load(nn.Linear(6, 5), np.ones((2, 6), np.float32))
    with pytest.raises(sl.SlimlineError, match="no calibration batch"):
        collect(model, matrices(model.graph), [])
    with pytest.raises(sl.SlimlineError, match="not finite"):
        collect(model, matrices(model.graph), [(np.full((2, 6), np.nan, np.float32),)])
