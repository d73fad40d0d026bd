"""Layers that are rounded one after the other, those behind making up for the error of those before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import slimline as sl
from slimline.evidence.propagation import layer_by_layer, levels
from slimline.evidence.walk import Walk
from slimline.graph.matrix import matrices
from slimline.methods.gram import Gram
from slimline.methods.scales import widest
from slimline.steps.weight_rounding import WeightRounding
from tests.digit_models import Perceptron, digits, fitted

X, Y = digits(), load_digits().target
DATA = sl.Data(train=(X[:512], Y[:512]), test=(X[1024:], Y[1024:]))
RNG = np.random.default_rng(0)
ROUGH = sl.WeightQuantization(dtype="int2", group_size="channel", rounding="gptq")


class Chain(nn.Module):
    """Two branches of linear layers that meet, and a weight that is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right, self.last = (nn.Linear(12, 12) for _ in range(4))
        self.tied = nn.Linear(12, 12, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.tied(x))
        return self.last(torch.relu(self.left(x)) + self.right(torch.relu(self.tied(x))))


@pytest.fixture(scope="module")
def chain() -> sl.Model:
    torch.manual_seed(0)
    return sl.load(Chain().eval(), RNG.normal(size=(2, 12)).astype(np.float32))


def keras_perceptron() -> sl.Model:
    import slimline.frameworks.keras  # noqa: F401, I001  chooses the backend before keras is imported
    import keras

    keras.utils.set_random_seed(0)
    dense = [keras.layers.Dense(48, "relu"), keras.layers.Dense(48, "relu"), keras.layers.Dense(10)]
    net = keras.Sequential([keras.Input((1, 8, 8)), keras.layers.Flatten(), *dense])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    net.compile(keras.optimizers.Adam(3e-3), loss)
    net.fit(X[:512], Y[:512], epochs=6, batch_size=128, verbose=0)
    return sl.load(net)


def in_framework(framework: str, folder: Path) -> sl.Model:
    if framework == "keras":
        return keras_perceptron()
    model = sl.load(fitted(Perceptron), X[:8])
    return model if framework == "torch" else sl.load(sl.export(model, "onnxruntime", folder / "net.onnx"), X[:8])


def error(model: sl.Model, other: sl.Model) -> float:
    """Of outputs that calibration has not seen."""
    return float(np.square(model.predict(X[1024:]) - other.predict(X[1024:])).mean())


@pytest.mark.parametrize("framework", ["torch", "keras", "onnx"])
def test_the_outputs_are_nearer_to_those_of_the_float_network(framework: str, tmp_path: Path) -> None:
    model = in_framework(framework, tmp_path)
    for rounding in ("mse", "gptq"):
        step = ROUGH.model_copy(update={"rounding": rounding})
        alone, together = (
            sl.apply(model, step.model_copy(update={"propagate": how}), DATA, target="onnxruntime", progress=False)
            for how in (False, True)
        )
        assert error(together, model) < 0.8 * error(alone, model)
        for name, each in together.quantization.weights.items():
            weight = together.parameters()[name]
            assert np.array_equal(each.round(weight), weight)


def test_layers_that_do_not_depend_on_each_other_go_together(chain: sl.Model) -> None:
    layers = [layer for layer in matrices(chain.graph) if layer.layer != "tied"]
    assert [[layer.layer for layer in level] for level in levels(chain.graph, layers)] == [
        ["first"],
        ["left", "right"],
        ["last"],
    ]


def test_every_layer_sees_what_those_before_have_become(chain: sl.Model) -> None:
    x = RNG.normal(size=(40, 12)).astype(np.float32)
    stored = {name: np.asarray(array, np.float64) for name, array in chain.parameters().items()}
    layers = [layer for layer in matrices(chain.graph) if layer.layer != "tied"]
    seen: dict[str, Gram] = {}

    def change(layer: Any, gram: Gram) -> dict[str, np.ndarray]:
        seen[layer.layer] = gram
        return {layer.weight: 1.5 * chain.parameters()[layer.weight]}

    start = {"tied.weight": 0.5 * chain.parameters()["tied.weight"]}
    changed = layer_by_layer(chain, layers, [(x[:30],), (x[30:],)], start, change)
    assert set(changed) == set(stored) - {name for name in stored if name.endswith("bias")}

    def read_by_last(weights: dict[str, np.ndarray]) -> np.ndarray:
        def layer(name: str, y: np.ndarray) -> np.ndarray:
            return y @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

        y = layer("first", layer("tied", x))
        return np.maximum(layer("left", y), 0) + layer("right", np.maximum(layer("tied", y), 0))

    before = read_by_last(stored) @ stored["last.weight"].T
    now = read_by_last(stored | changed)
    gram = seen["last"]
    np.testing.assert_allclose(gram.second[0], now.T @ now / 40, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(gram.cross[0], before.T @ now / 40, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(gram.others_mean[0], before.mean(0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(gram.others_energy[0], (before**2).mean(0), rtol=1e-3)


def test_the_target_is_the_least_squares_weight_and_the_error_that_of_the_outputs(chain: sl.Model) -> None:
    layer = next(layer for layer in matrices(chain.graph) if layer.layer == "last")
    weight = chain.parameters()[layer.weight]
    was = RNG.normal(size=(400, 12))
    now = was + 0.3 * RNG.normal(size=(400, 12)) @ RNG.normal(size=(12, 12))
    gram = Gram(1, 12, 12)
    gram.see(now[None], (was @ weight.T)[None])
    worker = WeightRounding(weight, layer, gram, damping=1e-9)
    np.testing.assert_allclose(worker.target.T, np.linalg.lstsq(now, was @ weight.T, rcond=None)[0], atol=1e-4)
    rounded = worker.rounded(worker.fitted(widest(worker.target, "int4", (1, None)), "gptq"), "gptq")
    lost = np.square(now @ rounded.T - was @ weight.T).sum() / np.square(was @ weight.T).sum()
    assert worker.error(rounded) == pytest.approx(lost, rel=1e-3)
    assert WeightRounding(weight, layer, gram, damping=1e6).target == pytest.approx(weight, abs=1e-3)


def test_the_rounding_is_near_the_best_of_all(chain: sl.Model) -> None:
    """Against the search through all roundings of a row of few weights."""
    layer = next(layer for layer in matrices(chain.graph) if layer.layer == "last")
    layer = replace(layer, outputs=((layer.outputs[0][0], 3),), inputs=((layer.inputs[0][0], 5),))
    layer = replace(layer, _stored=(*layer.outputs, *layer.inputs))
    mixing = RNG.normal(size=(5, 5)) + np.eye(5)
    was = RNG.normal(size=(300, 5)) @ mixing
    now = was + 0.2 * RNG.normal(size=was.shape)
    weight = RNG.normal(size=(3, 5)).astype(np.float32)
    gram = Gram(1, 5, 3)
    gram.see(now[None], (was @ weight.T)[None])
    worker = WeightRounding(weight, layer, gram, damping=1e-6)
    each = worker.fitted(widest(worker.target, "int2", (1, None)), "gptq")
    rounded = worker.rounded(each, "gptq")
    codes = np.stack(np.meshgrid(*[np.arange(-2, 2)] * 5, indexing="ij"), -1).reshape(-1, 5)
    for row in range(3):
        every = np.square(codes * each.scale[row] @ now.T - was @ weight[row]).mean(1)
        own = np.square(rounded[row] @ now.T - was @ weight[row]).mean()
        assert own <= 1.1 * every.min()
        alone = each.round(weight)[row]
        assert own <= np.square(alone @ now.T - was @ weight[row]).mean()


class Residual(nn.Module):
    """Blocks whose outputs are added up; the sums are inputs of no layer, as a norm lies between."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(12) for _ in range(depth))
        self.first, self.second = (nn.ModuleList(nn.Linear(12, 12) for _ in range(depth)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, first, second in zip(self.norms, self.first, self.second, strict=True):
            x = x + second(torch.tanh(first(norm(x))))
        return x


def residual(framework: str, folder: Path, depth: int) -> sl.Model:
    x = RNG.normal(size=(2, 12)).astype(np.float32)
    if framework != "keras":
        torch.manual_seed(0)
        model = sl.load(Residual(depth).eval(), x)
        return model if framework == "torch" else sl.load(sl.export(model, "onnxruntime", folder / "net.onnx"), x)
    import slimline.frameworks.keras  # noqa: F401, I001  chooses the backend before keras is imported
    import keras

    x = inputs = keras.Input((12,))
    for _ in range(depth):
        normed = keras.layers.LayerNormalization()(x)
        x = keras.layers.Add()([x, keras.layers.Dense(12)(keras.layers.Dense(12, "tanh")(normed))])
    return sl.load(keras.Model(inputs, x))


@pytest.mark.parametrize("framework", ["torch", "keras", "onnx"])
def test_what_is_kept_and_computed_does_not_grow_with_depth(
    framework: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = residual(framework, tmp_path, 6)
    schedule = levels(model.graph, matrices(model.graph))
    assert len(schedule) == 12
    batches = [(RNG.normal(size=(8, 12)).astype(np.float32),), (RNG.normal(size=(3, 12)).astype(np.float32),)]
    stops = [[layer.input for layer in level] for level in schedule]
    whole: dict[str, list[np.ndarray]] = {}
    model.adapter.observe(
        model.native, batches, [n for stop in stops for n in stop], lambda n, x: whole.setdefault(n, []).append(x + 0)
    )
    begun: list[int] = []
    observe = type(model.adapter).observe

    def counted(adapter: Any, native: Any, inputs: Any, values: Any, see: Any, sources: Any) -> None:
        begun.append(len(sources))
        observe(adapter, native, inputs, values, see, sources)

    monkeypatch.setattr(type(model.adapter), "observe", counted)
    walk = Walk(model, batches, stops)
    for stop in stops:
        seen: dict[str, list[np.ndarray]] = {}
        walk.on(model.native, lambda n, x, seen=seen: seen.setdefault(n, []).append(x + 0))  # type: ignore[misc]
        assert set(seen) == set(stop)
        for name in stop:
            for own, direct in zip(seen[name], whole[name], strict=True):
                np.testing.assert_allclose(own, direct, rtol=1e-5, atol=1e-6)
        assert len(walk.held) <= 3  # the model's input, the sum, and what the last stop saw
    assert max(begun) <= 3


def test_what_is_read_twice_is_rounded_first_and_what_was_pruned_stays_zero(chain: sl.Model) -> None:
    data = sl.Data(calibration=RNG.normal(size=(64, 12)).astype(np.float32))
    sparse = sl.apply(chain, sl.SparsePruning(amount=0.5), progress=False)
    small = sl.apply(sparse, ROUGH, data, target="onnxruntime", progress=False)
    names = ["tied", "first", "left", "right", "last"]
    assert list(small.quantization.weights) == [f"{name}.weight" for name in names]
    for name, mask in sparse.masks.items():
        assert not small.parameters()[name][~mask].any()
    tied = sparse.parameters()["tied.weight"]
    assert np.array_equal(small.quantization.weights["tied.weight"].round(tied), small.parameters()["tied.weight"])


@pytest.mark.parametrize("bias_correction", [None, "empirical", "analytic"])
def test_integer_layers_make_up_for_each_other_too(bias_correction: Any) -> None:
    model = sl.load(fitted(Perceptron), X[:8])
    step = sl.StaticQuantization(weights="int4", rounding="gptq", granularity="tensor", undo=False)
    step = step.model_copy(update={"bias_correction": bias_correction})
    alone, together = (
        sl.apply(model, step.model_copy(update={"propagate": how}), DATA, target="onnxruntime", progress=False)
        for how in (False, True)
    )
    assert error(together, model) < 0.95 * error(alone, model)
    if bias_correction == "empirical":  # the mean of the outputs is then that of the float network
        plain = sl.apply(
            model, step.model_copy(update={"bias_correction": None}), DATA, target="onnxruntime", progress=False
        )
        seen = X[:512]
        shift = [np.abs((m.predict(seen) - model.predict(seen)).mean(0)).max() for m in (together, plain)]
        assert shift[0] < shift[1]
