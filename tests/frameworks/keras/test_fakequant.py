"""Folding and fake quantization of Keras models, against numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")

from slimline.frameworks.base import adapter
from slimline.frameworks.keras import fakequant
from slimline.graph.edits import PutTensors
from slimline.graph.quantization import Quantization
from slimline.methods import ranges
from slimline.methods.formats import IntegerGrid

KERAS = adapter("keras")  # sets what must be set before keras is imported

import keras  # noqa: E402
from keras import layers as L  # noqa: E402

import slimline as sl  # noqa: E402
from slimline.basics.errors import SlimlineError  # noqa: E402
from slimline.frameworks.keras.gridded import IntegerActivation  # noqa: E402
from slimline.frameworks.keras.rounding import rounded  # noqa: E402
from slimline.steps.quantization.calibration import calibrate  # noqa: E402
from tests import zoo_keras  # noqa: E402


def _loaded(net: keras.Model) -> tuple[Any, tuple[np.ndarray, ...]]:
    """The canonical model with random statistics and weights, and example inputs."""
    native, example = KERAS.load(net, None)
    rng = np.random.default_rng(1)
    for variable in native.variables:
        array = rng.normal(size=variable.shape) * 0.5
        variable.assign(np.abs(array) + 0.2 if "variance" in variable.path else array)
    return native, example


THREE = np.array([0.1, 0.02, 0.5], np.float32)


@pytest.mark.parametrize(
    ("grid", "shape"),
    [
        (ranges.affine_grid(-0.7, 2.3, signed=True), (5, 4)),
        (ranges.affine_grid(0.0, 6.0), (5, 4)),
        (ranges.affine_grid(-3.0, 0.0, signed=True), (7,)),
        (IntegerGrid(THREE.reshape(1, 1, 1, 3), (None, None, None, 1), 8, True, True), (2, 2, 4, 3)),
        (IntegerGrid(THREE.reshape(1, 1, 3, 1), (None, None, 1, None), 8, True, True), (2, 2, 3, 2)),
    ],
)
def test_rounds_as_the_grid_says(grid: IntegerGrid, shape: tuple[int, ...]) -> None:
    x = (np.random.default_rng(2).normal(size=shape) * 3).astype(np.float32)
    if grid.axis is None:  # away from ties, where float error decides
        scale, zero = float(grid.scale), int(grid.zero)
        x = np.where(np.abs((x / scale + zero) % 1 - 0.5) < 0.01, x + 0.1 * scale, x).astype(np.float32)
    difference = np.abs(keras.ops.convert_to_numpy(rounded(x, grid)) - grid.round(x))
    assert difference.max() < 1e-5


def _net(layer: Any, shape: tuple[int, ...]) -> keras.Model:
    i = keras.Input(shape)
    return keras.Model(i, L.ReLU()(L.BatchNormalization(name="norm")(layer(i))))


FOLDED = {
    "conv": (lambda: L.Conv2D(6, 3, padding="same", use_bias=False), (5, 5, 4)),
    "biased": (lambda: L.Conv2D(6, 3, strides=2), (5, 5, 4)),
    "depthwise": (lambda: L.DepthwiseConv2D(3, depth_multiplier=2), (5, 5, 4)),
    "transposed": (lambda: L.Conv2DTranspose(6, 2, strides=2), (5, 5, 4)),
    "line": (lambda: L.Conv1D(6, 3), (9, 4)),
    "dense": (lambda: L.Dense(6, use_bias=False), (7,)),
}


@pytest.mark.parametrize("name", FOLDED)
def test_folding_keeps_the_function(name: str) -> None:
    make, shape = FOLDED[name]
    native, example = _loaded(_net(make(), shape))
    before = [np.array(v) for v in native.variables]
    folded = fakequant.fold(native, example)
    assert not any(isinstance(layer, L.BatchNormalization) for layer in folded.layers)
    np.testing.assert_allclose(
        KERAS.outputs(folded, example)[0], KERAS.outputs(native, example)[0], rtol=1e-4, atol=1e-5
    )
    assert all(np.array_equal(a, np.array(v)) for a, v in zip(before, native.variables, strict=True))


def test_batch_norm_with_two_readers_before_it_stays() -> None:
    i = keras.Input((5, 5, 4))
    y = L.Conv2D(4, 1)(i)
    native, example = _loaded(keras.Model(i, L.Add()([y, L.BatchNormalization()(y)])))
    folded = fakequant.fold(native, example)
    assert any(isinstance(layer, L.BatchNormalization) for layer in folded.layers)
    np.testing.assert_allclose(
        KERAS.outputs(folded, example)[0], KERAS.outputs(native, example)[0], rtol=1e-4, atol=1e-5
    )


def _quantized_dense() -> tuple[Any, tuple[np.ndarray, ...], Quantization]:
    i = keras.Input((7,), name="x")
    native, example = _loaded(keras.Model(i, L.Dense(5, name="fc")(i)))
    kernel = KERAS.parameters(native)["fc/kernel"]
    activations = {"x": ranges.affine_grid(-1, 2, signed=True), "fc": ranges.affine_grid(-4, 4, signed=True)}
    return (
        native,
        example,
        Quantization(
            activations=activations, weights={"fc/kernel": ranges.symmetric_grid(kernel, None)}, layers=("fc",)
        ),
    )


KERNELS = {
    "dense": (lambda: L.Dense(6, activation="relu", name="k"), (7,)),
    "einsum": (lambda: L.EinsumDense("abc,cd->abd", (None, 6), bias_axes="d", name="k"), (5, 7)),
    "line": (lambda: L.Conv1D(6, 3, 2, activation="tanh", name="k"), (9, 4)),
    "causal": (lambda: L.Conv1D(6, 3, padding="causal", dilation_rate=2, name="k"), (9, 4)),
    "grouped line": (lambda: L.Conv1D(6, 3, padding="same", groups=2, use_bias=False, name="k"), (9, 4)),
    "images": (lambda: L.Conv2D(6, 3, 2, padding="same", name="k"), (5, 5, 4)),
    "volumes": (lambda: L.Conv3D(6, 2, name="k"), (4, 5, 5, 4)),
    "depthwise line": (lambda: L.DepthwiseConv1D(3, 2, depth_multiplier=2, name="k"), (9, 4)),
    "depthwise": (lambda: L.DepthwiseConv2D(3, padding="same", activation="relu", name="k"), (5, 5, 4)),
    "transposed": (lambda: L.Conv2DTranspose(6, 3, 2, padding="same", name="k"), (5, 5, 4)),
}


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_rounded_where_it_is_used(name: str, channels: bool) -> None:
    """As the same layer with the rounded kernel computes."""
    make, shape = KERNELS[name]
    i = keras.Input(shape)
    native, example = _loaded(keras.Model(i, make()(i)))
    kernel = KERAS.parameters(native)["k/kernel"]
    grid = ranges.symmetric_grid(kernel, kernel.ndim - 1 if channels else None, bits=3)
    quantized = fakequant.quantize(native, Quantization(activations={}, weights={"k/kernel": grid}, layers=("k",)))
    expected = KERAS.edit(native, (PutTensors({"k/kernel": grid.round(kernel)}),), example)
    answers = [KERAS.outputs(each, example)[0] for each in (quantized, expected, native)]
    np.testing.assert_allclose(answers[0], answers[1], rtol=1e-4, atol=1e-5)
    assert np.abs(answers[1] - answers[2]).max() > 1e-2


def test_quantized_dense_is_numpys(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    native, _, quantization = _quantized_dense()
    x = rng.normal(size=(64, 7)).astype(np.float32)
    stored = KERAS.parameters(native)
    grids = quantization.activations
    kernel = quantization.weights["fc/kernel"].round(stored["fc/kernel"])
    wanted = grids["fc"].round(grids["x"].round(x) @ kernel + stored["fc/bias"])
    quantized = fakequant.quantize(native, quantization)
    got = KERAS.outputs(quantized, (x,))[0]
    assert np.abs(got - wanted).max() <= grids["fc"].scale * 1.01  # ties
    assert (np.abs(got - wanted) > 1e-5).mean() < 0.02


def test_float_weights_stay_and_files_reload(tmp_path: Path) -> None:
    native, example, quantization = _quantized_dense()
    quantized = fakequant.quantize(native, quantization)
    KERAS.save(quantized, tmp_path / "q.keras", example, {})
    again, _, _ = KERAS.open(tmp_path / "q.keras", False)
    np.testing.assert_array_equal(KERAS.outputs(again, example)[0], KERAS.outputs(quantized, example)[0])
    plain = keras.saving.load_model(tmp_path / "q.keras")
    np.testing.assert_array_equal(KERAS.outputs(plain, example)[0], KERAS.outputs(quantized, example)[0])
    for name, array in KERAS.parameters(native).items():
        if name != "fc/kernel":
            np.testing.assert_array_equal(KERAS.parameters(again)[name], array)
    np.testing.assert_array_equal(KERAS.parameters(quantized)["fc/kernel"], KERAS.parameters(native)["fc/kernel"])


def test_the_graph_of_a_quantized_model_reads_as_before() -> None:
    native, example, quantization = _quantized_dense()
    graph = KERAS.read(fakequant.quantize(native, quantization), example)
    assert [node.kind for node in graph.nodes] == ["elementwise", "linear", "elementwise"]
    assert graph.size == KERAS.read(native, example).size


def test_dense_on_sequences_is_numpys() -> None:
    i = keras.Input((4, 7), name="x")
    native, example = _loaded(keras.Model(i, L.Dense(5, name="fc")(i)))
    kernel = KERAS.parameters(native)["fc/kernel"]
    grid = ranges.symmetric_grid(kernel, None)
    quantized = fakequant.quantize(native, Quantization(weights={"fc/kernel": grid}))
    wanted = example[0] @ grid.round(kernel) + KERAS.parameters(native)["fc/bias"]
    np.testing.assert_allclose(KERAS.outputs(quantized, example)[0], wanted, rtol=1e-5, atol=1e-5)


def test_gradients_pass_the_rounding() -> None:
    import tensorflow as tf

    native, _, quantization = _quantized_dense()
    quantized = fakequant.quantize(native, quantization)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(quantized(tf.fill((2, 7), 0.5), training=True) ** 2)
    gradients = tape.gradient(loss, [v.value for v in quantized.trainable_variables])
    assert all(g is not None and np.abs(np.array(g)).max() > 0 for g in gradients)


@pytest.mark.parametrize("function", ["hard_sigmoid", "hard_silu", "silu"])
def test_integer_activations_are_close(function: str) -> None:
    x = np.linspace(-5, 5, 801, dtype=np.float32)
    exact = keras.ops.convert_to_numpy(getattr(keras.activations, function)(x))
    got = keras.ops.convert_to_numpy(IntegerActivation(function)(x))
    # One step of the gate, times what it multiplies.
    assert np.abs(got - exact).max() <= (1 if function == "hard_sigmoid" else 5) * 1.5 / 255


def test_lone_batch_norm_is_a_depthwise_convolution() -> None:
    i = keras.Input((4, 4, 3), name="x")
    native, example = _loaded(keras.Model(i, L.BatchNormalization(name="norm")(i)))
    grids = {"x": ranges.affine_grid(-4, 4, signed=True), "norm": ranges.affine_grid(-4, 4, signed=True)}
    quantized = fakequant.quantize(native, Quantization(activations=grids))
    difference = np.abs(KERAS.outputs(quantized, example)[0] - np.clip(KERAS.outputs(native, example)[0], -4, 4))
    assert difference.max() < 3 * 8 / 255


def test_a_layer_without_integer_form_is_named() -> None:
    i = keras.Input((4, 4, 4, 3))
    native, _ = _loaded(keras.Model(i, L.Conv3DTranspose(2, 2, name="volume")(i)))
    kernel = KERAS.parameters(native)["volume/kernel"]
    with pytest.raises(SlimlineError, match=r"'volume' \(Conv3DTranspose\).*keep="):
        fakequant.quantize(native, Quantization(weights={"volume/kernel": ranges.symmetric_grid(kernel, 4)}))


def test_observe_sees_every_batch_once() -> None:
    rng = np.random.default_rng(0)
    i = keras.Input((3,), name="x")
    native, _ = _loaded(keras.Model(i, L.Dense(2, activation="relu", name="fc")(i)))
    batches = [(rng.normal(size=(n, 3)).astype(np.float32),) for n in (4, 2)]
    seen: dict[str, list[np.ndarray]] = {"x": [], "fc": [], "fc.activation": []}
    KERAS.observe(native, batches, list(seen), lambda name, array: seen[name].append(array))
    stored = KERAS.parameters(native)
    for k, (x,) in enumerate(batches):
        np.testing.assert_array_equal(seen["x"][k], x)
        before = x @ stored["fc/kernel"] + stored["fc/bias"]
        np.testing.assert_allclose(seen["fc"][k], before, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(seen["fc.activation"][k], np.maximum(before, 0), rtol=1e-5, atol=1e-6)
    with pytest.raises(SlimlineError, match="inside a Keras layer"):
        KERAS.observe(native, batches, ["fc/0"], lambda *_: None)


def test_calls_of_a_shared_layer_keep_their_grids_in_a_file(tmp_path: Path) -> None:
    model = sl.load(zoo_keras.shared())
    left, right = model.example
    quantized = calibrate(model, sl.StaticQuantization(), [(left, 9 * right)], "litert")
    again = sl.load(quantized.save(tmp_path / "shared.keras"))
    assert quantized.quantization is not None and again.quantization is not None
    assert quantized.quantization.activations["left"] != quantized.quantization.activations["right"]
    assert again.quantization == quantized.quantization
    assert again.adapter.format_mismatches(again.native, quantized.quantization) == []
    sources = [{n.name: n.inputs[0] for n in m.graph.nodes if n.layer in ("one", "two")} for m in (quantized, again)]
    assert sources[0] == sources[1]
    for a, b in zip(quantized.outputs(left, right), again.outputs(left, right), strict=True):
        np.testing.assert_array_equal(a, b)
