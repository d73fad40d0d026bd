"""Products before layers whose input cannot be divided where it is made (SmoothQuant): one for all that read a value,
exact in every framework, and integers behind them in every runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slimline as sl
from slimline.graph.crossings import crossings, uncrossed
from slimline.graph.edits import Multiply, PutTensors
from slimline.graph.matrix import matrices
from slimline.methods.equalization import smoothing_scales
from slimline.runtimes.base import runtime
from slimline.steps.quantization.preparation import smoothed, with_products

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from tests.test_encoder_quantization import INPUTS, STATIC, WIDTH, Encoder  # noqa: E402

SMOOTH = STATIC.model_copy(update={"smooth": 0.9})
RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(12, 5, 8)).astype(np.float32)


def assert_near(real: np.ndarray, simulated: np.ndarray) -> None:
    """Alike but for single numbers that fall on the other side of a step, and move what is made of them."""
    assert np.abs(real - simulated).mean() < 0.005 * simulated.std()
    assert np.abs(real - simulated).max() < 0.05 * np.abs(simulated).max()


@pytest.fixture(scope="module")
def encoder() -> sl.Model:
    """Norms that are followed by their residual, a few channels of which are fifty times the others."""
    torch.manual_seed(0)
    net = Encoder().eval()
    with torch.no_grad():
        for norm, readers in (
            (net.norm, (net.block.query, net.block.key, net.block.value)),
            (net.block.first, (net.block.up,)),
        ):
            norm.weight[:2] *= 50
            for layer in readers:
                layer.weight[:, :2] /= 50
    return sl.load(net, tuple(x[:2] for x in INPUTS))


def products(model: sl.Model) -> dict[str, set[str]]:
    """By the stored numbers of a product the layers that read it."""
    graph = model.graph
    return {
        each.vectors[0]: {layer.layer for layer in each.readers}
        for each in crossings(graph)
        if each.vectors and each.vectors[0].rpartition(".")[2] == "factors"
    }


def test_products_stand_where_nothing_can_be_divided(encoder: sl.Model) -> None:
    before = {layer.layer for each in crossings(encoder.graph) for layer in each.readers}
    assert before == {"block.out"}  # through attention
    changed = with_products(encoder, SMOOTH)
    assert products(changed) == {
        "block.query.factors": {"block.query", "block.key", "block.value"},
        "block.up.factors": {"block.up"},
        "block.down.factors": {"block.down"},
    }
    assert [layer.layer for layers in uncrossed(changed.graph).values() for layer in layers] == ["head"]  # of a mean
    np.testing.assert_array_equal(changed.predict(*INPUTS), encoder.predict(*INPUTS))


def test_only_layers_that_become_integers_read_products(encoder: sl.Model) -> None:
    own = {"layers": ("block.*",), "keep": ("block.key",), "overrides": {"*.down": {"weights": "float32"}}}
    changed = with_products(encoder, sl.StaticQuantization(smooth=0.9, **own))
    assert products(changed) == {
        "block.query.factors": {"block.query", "block.value"},
        "block.up.factors": {"block.up"},
    }


def test_what_is_divided_by_is_smoothquants(encoder: sl.Model) -> None:
    changed = smoothed(with_products(encoder, SMOOTH), 0.9, [INPUTS])
    answer = encoder.predict(*INPUTS)
    np.testing.assert_allclose(changed.predict(*INPUTS), answer, atol=1e-5 * np.abs(answer).max())
    (value,) = {node.inputs[0] for node in encoder.graph.nodes if node.layer == "block.query" and node.kind == "linear"}
    seen = np.zeros(WIDTH)
    encoder.adapter.observe(
        encoder.native, [INPUTS], [value], lambda _, x: np.maximum(seen, np.abs(x).max((0, 1)), out=seen)
    )
    stored, new = encoder.parameters(), changed.parameters()
    names = [f"block.{name}.weight" for name in ("query", "key", "value")]
    scales = smoothing_scales(seen, np.max([np.abs(stored[name]).max(0) for name in names], 0), 0.9)
    np.testing.assert_allclose(new["block.query.factors"], 1 / scales, rtol=1e-5)
    np.testing.assert_allclose(new["block.key.weight"], stored["block.key.weight"] * scales, rtol=1e-5)


class Mlp(nn.Module):
    """Behind a norm that its residual reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        with torch.no_grad():
            self.norm.weight[:2] *= 50
            self.up.weight[:, :2] /= 50

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return x / 50 + self.down(nn.functional.gelu(self.up(x)))


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "litert", "executorch"])
def test_artifacts_round_the_products(target: str, tmp_path: Path) -> None:
    if reason := runtime(target).available():
        pytest.skip(reason)
    torch.manual_seed(0)
    model = sl.load(Mlp().eval(), ROWS[:2])
    small = sl.apply(model, SMOOTH, sl.Data(calibration=ROWS), target=target, progress=False)
    path, simulated = sl.export(small, target, tmp_path), small.predict(ROWS)
    assert_near(runtime(target).load(path).run((ROWS,)), simulated)
    executed = runtime(target).integer_layers(path)
    assert not executed or {executed[name] for name in ("up", "down")} == {"integer"}


def test_uneven_channels_cost_less() -> None:
    torch.manual_seed(0)
    model = sl.load(Mlp().eval(), ROWS[:2])
    answer, errors = model.predict(ROWS), []
    for step in (STATIC, SMOOTH):
        small = sl.apply(model, step, sl.Data(calibration=ROWS), target="onnxruntime", progress=False)
        errors.append(float(np.square(small.predict(ROWS) - answer).mean()))
    assert errors[1] < 0.5 * errors[0]


def test_openvino_multiplies_no_reduction(tmp_path: Path) -> None:
    if reason := runtime("openvino").available():
        pytest.skip(reason)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = Mlp(), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x).sum(1))

    torch.manual_seed(0)
    model = sl.load(Net().eval(), ROWS[:2])
    small = sl.apply(model, SMOOTH, sl.Data(calibration=ROWS), target="openvino", progress=False)
    real = runtime("openvino").load(sl.export(small, "openvino", tmp_path)).run((ROWS,))
    simulated = small.predict(ROWS)
    assert_near(real, simulated)


def keras_model() -> sl.Model:
    keras = pytest.importorskip("keras")
    x = inputs = keras.Input((5, 8))
    y = keras.layers.Dense(8, activation="gelu", name="a")(x)
    y = keras.layers.LayerNormalization(name="norm")(x + keras.layers.Dense(8, name="b")(y))
    parts = [keras.layers.Dense(8, name=name)(y) for name in ("c", "d")]
    return sl.load(keras.Model(inputs, y + parts[0] * parts[1]), ROWS[:2])


def onnx_model() -> sl.Model:
    from tests.frameworks.onnx.graphs import model, weights

    graph = model(
        "p = MatMul(x, a__weight) q = Add(p, a__bias) g = Sigmoid(q) r = MatMul(g, b__weight) y = Add(x, r) "
        "c = MatMul(y, c__weight) d = MatMul(y, d__weight) m = Mul(c, d) z = Add(y, m)",
        weights(a__weight=(8, 8), a__bias=(8,), b__weight=(8, 8), c__weight=(8, 8), d__weight=(8, 8)),
        "float[N,5,8] x",
        "float[N,5,8] z",
    )
    return sl.load(graph, ROWS[:2])


@pytest.mark.parametrize("make", [keras_model, onnx_model])
def test_every_framework_multiplies(make: Any, tmp_path: Path) -> None:
    model = make()
    read = uncrossed(model.graph)
    assert sorted(len(layers) for layers in read.values()) == [1, 1, 2]
    rng = np.random.default_rng(1)
    numbers = {value: rng.uniform(0.5, 2, 8).astype(np.float32) for value, _ in read}
    stored, weights = model.parameters(), {}
    for (value, _), layers in read.items():
        weights |= {layer.weight: stored[layer.weight] * numbers[value][:, None] for layer in layers}
    expected = model.edited((PutTensors(weights),), {"step": "weights"}).predict(ROWS)
    readers = {value: [layer.output for layer in layers] for (value, _), layers in read.items()}
    multiplied = model.edited((Multiply(readers, numbers, dict(read.keys())),), {"step": "products"})
    np.testing.assert_allclose(multiplied.predict(ROWS), expected, rtol=1e-4, atol=1e-5)
    again = sl.load(multiplied.save(tmp_path / f"model{model.adapter.suffix}"))
    np.testing.assert_allclose(again.predict(ROWS), expected, rtol=1e-4, atol=1e-5)

    target = model.usual_target
    small = sl.apply(model, SMOOTH, sl.Data(calibration=ROWS), target=target, progress=False)
    rounded = {layer.input for layer in matrices(with_products(model, SMOOTH).graph)}
    assert small.quantization is not None and not rounded & readers.keys()
    assert rounded <= small.quantization.activations.keys()
    path, answer = sl.export(small, target, tmp_path), small.predict(ROWS)
    assert_near(runtime(target).load(path).run((ROWS,)), answer)
