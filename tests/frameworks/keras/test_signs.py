"""Layers of Keras models that read signs: the numbers of PyTorch's on the same weights, and artifacts that agree."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.datasets import load_digits

keras = pytest.importorskip("keras")
tf = pytest.importorskip("tensorflow")

import slimline as sl  # noqa: E402
from slimline.frameworks.keras.gridded import FakeQuantize  # noqa: E402
from slimline.frameworks.keras.learned import LearnedRounding  # noqa: E402
from slimline.graph.edits import LearnRounding, Subtract, Unround  # noqa: E402
from slimline.graph.matrix import matrices  # noqa: E402
from slimline.graph.quantization import Quantization  # noqa: E402
from slimline.methods.formats import Levels  # noqa: E402
from slimline.methods.scales import learning_speeds  # noqa: E402
from slimline.runtimes.base import runtime  # noqa: E402
from slimline.steps.quantization_aware.signs import with_thresholds  # noqa: E402

L = keras.layers
ENDS = {name: {"weights": "int8", "activations": "uint8"} for name in ("stem", "head")}
FIELDS = {"weights": "binary", "activations": "binary", "overrides": ENDS, "batch_size": 64, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    x, y = load_digits(return_X_y=True)
    return (x / 16).astype(np.float32).reshape(-1, 8, 8, 1), y


@pytest.fixture(scope="module")
def data(digits) -> sl.Data:
    x, y = digits
    own = {"train": (x[:1000], y[:1000]), "selection": (x[1000:1200], y[1000:1200]), "calibration": (x[:128],)}
    return sl.Data(**own, overlap="allow")


@pytest.fixture(scope="module")
def net(digits):
    """A residual block with ReLUs, in whose branch signs are read, between a stem and a head."""
    keras.utils.set_random_seed(0)
    i = keras.Input((8, 8, 1), name="x")
    x = L.ReLU(name="act")(L.BatchNormalization(name="norm")(L.Conv2D(16, 3, padding="same", name="stem")(i)))
    y = L.Conv2D(16, 3, padding="same", use_bias=False, name="branch")(x)
    x = L.ReLU(name="end")(L.Add(name="sum")([x, L.BatchNormalization(name="behind")(y)]))
    x = L.Flatten(name="flat")(L.ReLU(name="low")(L.Conv2D(32, 2, strides=2, name="down")(x)))
    net = keras.Model(i, L.Dense(10, name="head")(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    net.compile(keras.optimizers.Adam(1e-2), loss, jit_compile=False)
    net.fit(digits[0][:960], digits[1][:960], batch_size=64, epochs=3, verbose=0)
    return net


@pytest.fixture(scope="module")
def model(net) -> sl.Model:
    return sl.load(net, np.zeros((2, 8, 8, 1), np.float32))


def test_gradients_go_through_between_plus_and_minus_the_scale():
    each = Levels.binary(np.asarray(0.5, np.float32))
    learned, fixed = LearnedRounding(format=each, count=6), FakeQuantize(format=each)
    x = tf.constant([-2.0, -0.5, -0.1, 0.0, 0.4, 0.6])
    slopes = np.arange(1.0, 7.0, dtype=np.float32)
    signs = np.array([-1, -1, -1, -1, 1, 1])
    for layer in (learned, fixed):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
            loss = tf.reduce_sum(y * slopes)
        by_x, *by_step = tape.gradient(loss, [x, *(v.value for v in layer.trainable_variables)])
        np.testing.assert_array_equal(y, 0.5 * signs)
        np.testing.assert_array_equal(by_x, [0, 2, 3, 4, 5, 0])
        if layer is learned:
            np.testing.assert_allclose(by_step[0], 0.5 * (signs @ slopes) * learning_speeds(each, 6), rtol=1e-6)
        else:
            assert not by_step


@pytest.fixture(scope="module")
def rounding() -> FakeQuantize:
    return FakeQuantize(format=Levels.binary(np.asarray(0.3, np.float32)))


@settings(max_examples=25, deadline=None)
@given(arrays(np.float32, (3, 4), elements=st.floats(-10, 10, width=32, allow_subnormal=False)))
def test_the_layer_rounds_as_the_format_says(rounding, x):
    np.testing.assert_allclose(rounding.call(x), rounding.format.round(x), rtol=1e-6)


def test_thresholds_are_means_and_change_no_answer_within_the_edges(tmp_path):
    keras.utils.set_random_seed(2)
    i = keras.Input((6, 6, 2), name="x")
    y = L.ReLU(name="b")(L.Conv2D(4, 3, name="a")(i))
    y = L.BatchNormalization(name="d")(L.Conv2D(4, 3, groups=2, use_bias=False, name="c")(y))
    model = sl.load(keras.Model(i, L.Dense(3, name="f")(L.Flatten(name="e")(y))))
    x = np.random.default_rng(0).normal(size=(40, 6, 6, 2)).astype(np.float32) + 1
    changed = with_thresholds(model, matrices(model.graph), [(x[:24],), (x[24:],)])
    np.testing.assert_allclose(changed.predict(x), model.predict(x), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(changed.parameters()["a.threshold/value"], x.mean((0, 1, 2)), rtol=1e-5)
    again = with_thresholds(changed, matrices(changed.graph), [(x,)])  # of what has them already
    assert {"a.threshold/value", "a.threshold_/value"} <= again.parameters().keys()
    np.testing.assert_allclose(again.predict(x), model.predict(x), rtol=1e-3, atol=1e-4)
    loaded = sl.load(changed.save(tmp_path / "model.keras"))
    np.testing.assert_array_equal(loaded.predict(x), changed.predict(x))


def test_numbers_lie_along_any_dimension():
    i = keras.Input((3, 4), name="x")
    model = sl.load(keras.Model(i, L.Dense(2, name="a")(i)))
    x = np.random.default_rng(1).normal(size=(5, 3, 4)).astype(np.float32)
    for numbers, axis in ((np.array([1.0, -2, 3]), 1), (np.array([1.0, -2, 3, 0.5]), 2), (np.array([0.7]), None)):
        axes = {} if axis is None else {"a": axis}
        changed = model.edit(Subtract({"a": ("x", numbers.astype(np.float32))}, axes))
        spread = numbers[:, None] if axis == 1 else numbers
        np.testing.assert_allclose(
            model.adapter.outputs(changed, (x,))[0], model.predict((x - spread).astype(np.float32)), atol=1e-5
        )
    with pytest.raises(sl.SlimlineError, match="computes no value called 'nothing'"):
        model.edit(Subtract({"nothing": ("x", np.ones(1, np.float32))}))


def test_it_learns_as_in_pytorch_and_onnxruntime_runs_it(net, model, digits, tmp_path):
    torch = pytest.importorskip("torch")
    from tests.test_binary_activations import Binary

    twin = Binary().eval()
    for layer, ours in (("stem", twin.stem[0]), ("branch", twin.branch[0]), ("down", twin.down[0])):
        kernel, *bias = net.get_layer(layer).get_weights()
        ours.weight.data = torch.tensor(kernel.transpose(3, 2, 0, 1).copy())
        for each in bias:
            ours.bias.data = torch.tensor(each)
    for layer, ours in (("norm", twin.stem[1]), ("behind", twin.branch[1])):
        numbers = map(torch.tensor, net.get_layer(layer).get_weights())
        ours.weight.data, ours.bias.data, ours.running_mean, ours.running_var = numbers
        ours.eps = net.get_layer(layer).epsilon
    kernel, bias = net.get_layer("head").get_weights()
    twin.head.weight.data = torch.tensor(kernel.reshape(4, 4, 32, 10).transpose(3, 2, 0, 1).reshape(10, 512).copy())
    twin.head.bias.data = torch.tensor(bias)
    x, y = digits
    turned = x.transpose(0, 3, 1, 2)
    theirs = sl.load(twin, turned[:2])
    np.testing.assert_allclose(theirs.predict(turned[:64]), model.predict(x[:64]), atol=1e-4)
    fields = {**FIELDS, "epochs": 1, "samples": 128, "optimizer": "sgd", "learning_rate": 1e-2}
    trained = []
    for start, images, stem in ((model, x, "stem"), (theirs, turned, "stem.0")):
        step = sl.QuantizationAwareTraining(**{**fields, "overrides": {stem: ENDS["stem"], "head": ENDS["head"]}})
        own = {"train": (images[:128], y[:128]), "selection": (images[1000:1064], y[1000:1064])}
        data = sl.Data(**own, calibration=(images[:128],), overlap="allow")
        trained.append(sl.apply(start, step, data, target="onnxruntime"))
    ours, reference = trained
    for layer, name in (("branch", "branch.0"), ("down", "down.0")):
        learned = ours.parameters()[f"{layer}.threshold/value"]
        np.testing.assert_allclose(learned, reference.parameters()[f"{name}.threshold"], rtol=1e-3, atol=1e-4)
    scales = [[each.scale.item() for each in m.quantization.activations.values()] for m in trained]
    np.testing.assert_allclose(*scales, rtol=1e-3)
    answers = ours.predict(x[:256])
    assert np.mean(np.abs(answers - reference.predict(turned[:256])).max(1) < 1e-2) > 0.9
    path = sl.export(ours, "onnxruntime", tmp_path)
    outputs = runtime("onnxruntime").load(path).run((x[:256],))
    np.testing.assert_allclose(outputs, answers, atol=1e-3 * np.abs(outputs).max())
    ran = runtime("onnxruntime").integer_layers(path)
    assert all(ran[layer] == "integer" for layer in ("stem", "branch", "down", "head"))
    with pytest.raises(sl.SlimlineError, match=r"openvino cannot write.*choose the target"):
        sl.export(ours, "openvino", tmp_path / "small.xml")


def test_a_network_of_signs_learns_and_its_artifacts_agree(model, data, digits, tmp_path):
    step = sl.QuantizationAwareTraining(**{**FIELDS, "weights": "int8"}, epochs=2, samples=128)
    small = sl.apply(model, step, data, target="litert")
    x, y = digits[0][1200:], digits[1][1200:]
    answers = small.predict(x)
    assert np.mean(answers.argmax(1) == y) > 0.75
    signs = {name: each for name, each in small.quantization.activations.items() if isinstance(each, Levels)}
    assert len(signs) == 2 and all(each.is_sign for each in signs.values())
    assert small.parameters()["branch.threshold/value"].shape == (16,)
    path = sl.export(small, "litert", tmp_path)
    outputs = runtime("litert").load(path).run((x,))
    assert np.mean(outputs.argmax(1) == answers.argmax(1)) >= 0.995
    ran = runtime("litert").integer_layers(path)
    assert all(ran[layer] == "integer" for layer in ("stem", "branch", "down", "head"))
    path = sl.export(small, "onnxruntime", tmp_path / "small.onnx")
    assert np.mean(runtime("onnxruntime").load(path).run((x,)).argmax(1) == answers.argmax(1)) >= 0.99
    again = sl.load(small.save(tmp_path / "model.keras"))
    np.testing.assert_array_equal(again.predict(x), answers)
    assert again.quantization == small.quantization
    plain = small.edit(Unround(small.quantization))
    assert not small.adapter.format_mismatches(plain, Quantization())


def test_signs_wait_like_other_activations(model):
    name = next(each.input for each in matrices(model.graph) if each.layer == "branch")
    each = Levels.binary(np.asarray(0.3, np.float32))
    held = Quantization({name: each})
    learning = model.edit(LearnRounding(held, delayed=frozenset({name})))
    (layer,) = (layer for layer in learning.layers if isinstance(layer, LearnedRounding))
    x = np.linspace(-1, 1, 9, dtype=np.float32)
    np.testing.assert_array_equal(layer(x), x)
    layer.begin(each)
    np.testing.assert_array_equal(layer(x), each.round(x))
    assert [v.name for v in layer.trainable_variables] == ["log_step"]
