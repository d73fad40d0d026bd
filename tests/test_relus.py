"""ReLU6 that becomes ReLU where it hardly clips, and biases that pass a ReLU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import slimline as sl
from slimline.graph.crossings import crossings
from slimline.graph.edits import FoldNorms
from slimline.steps.base import Context, perform
from slimline.steps.quantization.preparation import equalized, pairs, prepared
from slimline.steps.quantization.relus import absorbed, unclipped

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 3, 8, 8)).astype(np.float32)
BATCHES = [(X[:32],), (X[32:],)]
DATA = sl.Data(calibration=X)


def mobile() -> nn.Module:
    """An inverted block whose channels are uneven and hardly reach 6 but behind the last ReLU6."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6(),
        nn.Conv2d(16, 8, 1), nn.ReLU6(), nn.Conv2d(8, 4, 1), nn.Flatten(),
    )  # fmt: skip
    with torch.no_grad():
        for norm in (net[1], net[4]):
            norm.weight.copy_(torch.logspace(-2, 0, 16))
        net[6].weight.mul_(300)
    return net.eval()


def keras_mobile() -> Any:
    import slimline.frameworks.keras  # noqa: F401, I001  chooses the backend before keras is imported
    import keras

    keras.utils.set_random_seed(0)
    layers = keras.layers
    return keras.Sequential([
        keras.Input((8, 8, 3)), layers.Conv2D(16, 1), layers.ReLU(6.0), layers.DepthwiseConv2D(3, padding="same"),
        layers.BatchNormalization(), layers.ReLU(6.0), layers.Conv2D(4, 1), layers.Flatten(),
    ])  # fmt: skip


def functions(model: sl.Model) -> list[str]:
    return [node.attributes["function"] for node in model.graph.nodes if node.kind == "elementwise"]


def quantized(model: sl.Model, x: np.ndarray = X, **fields: Any) -> sl.Model:
    step = sl.StaticQuantization(undo=False, granularity="tensor", observer="minmax", **fields)
    return sl.apply(model, step, sl.Data(calibration=x), target="onnxruntime", progress=False)


def error(model: sl.Model, other: sl.Model, x: np.ndarray = X) -> float:
    return float(np.square(model.predict(x) - other.predict(x)).mean())


def test_those_that_clip_least_become_relu_within_the_tolerance() -> None:
    model = sl.load(mobile(), X[:2])
    assert functions(model) == ["relu6"] * 3
    even = unclipped(model, 1e-4, BATCHES)
    assert functions(even) == ["relu", "relu", "relu6"]
    truth = model.predict(X)
    assert error(even, model) <= 1e-4 * np.square(truth).mean()
    every = unclipped(model, 0.999, BATCHES)
    assert functions(every) == ["relu"] * 3
    assert 1e-4 * np.square(truth).mean() < error(every, model)
    clipping = sl.load(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6()).eval(), X[:2])
    assert functions(unclipped(clipping, 0.5, BATCHES)) == ["relu6"]  # no layer reads it: nothing is won


def test_channels_are_evened_across_what_was_relu6() -> None:
    model = sl.load(mobile(), X[:2])
    step = sl.StaticQuantization(equalize=True)
    ready = prepared(model, step, BATCHES)
    folded = replace(ready, native=ready.edit(FoldNorms()))
    assert [(first.layer, second.layer) for _, first, second in pairs(folded.graph)] == [("0", "3"), ("3", "6")]
    after, _ = equalized(folded)
    np.testing.assert_allclose(after.predict(X), ready.predict(X), rtol=1e-3, atol=1e-4)
    clipped, even = (quantized(model, equalize=True, unclip=each) for each in (0.0, 1e-4))
    assert error(even, model) < 0.7 * error(clipped, model)


@pytest.mark.parametrize(("unclip", "count"), [(0.0, None), (1e-4, 2)])
def test_the_record_says_which_relu6_are_gone(unclip: float, count: int | None) -> None:
    model = sl.load(mobile(), X[:2])
    step = sl.StaticQuantization(equalize=True, unclip=unclip, undo=False)
    notes = " ".join(perform(step, model, Context(None, DATA, "onnxruntime")).record.get("notes", ()))
    assert ("ReLU6" in notes) == (count is not None)
    assert count is None or f"{count} ReLU6 that hardly clipped are ReLU" in notes


def test_keras_and_onnx(tmp_path: Path) -> None:
    read = sl.load(sl.export(sl.load(mobile(), X[:2]), "onnxruntime", tmp_path / "net.onnx"), X[:2])
    assert functions(unclipped(read, 1e-4, BATCHES)) == ["relu", "relu", "relu6"]
    images = X.transpose(0, 2, 3, 1)
    keras_model = sl.load(keras_mobile())
    even = unclipped(keras_model, 1e-4, [(images,)])
    assert functions(even) == ["relu", "relu"]
    assert error(quantized(even, images), keras_model, images) < 0.01 * np.square(keras_model.predict(images)).mean()


class HighBias(nn.Module):
    """Channels that are never below 20 or 10; those behind `after`, of which two are at `later`, are padded."""

    def __init__(self, later: float = 0.0) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1, bias=False)
        self.after, self.last, self.head = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)
        with torch.no_grad():
            self.norm.weight.fill_(0.5)
            self.norm.bias[:4] = torch.tensor([20.0, 10, 5, -5])
            self.after.bias[:2] = later
            self.second.weight[:, :3] /= 20
            self.after.running_var.fill_(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.after(self.second(torch.relu(self.norm(self.first(x))))))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


def test_biases_pass_a_relu_where_nothing_is_padded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = sl.load(HighBias(20.0).eval(), X[:2])
    exported = sl.load(sl.export(model, "onnxruntime", tmp_path / "net.onnx"), X[:2])
    for each in (model, exported):
        moved = absorbed(each, BATCHES)
        np.testing.assert_allclose(moved.predict(X), each.predict(X), rtol=1e-3, atol=1e-4)
        before, after = each.parameters(), moved.parameters()
        changed = {name for name in before if not np.array_equal(before[name], after[name])}
        first, second = ("norm.bias", "after.running_mean") if each is model else ("first.bias", "second.bias")
        if each is model:
            assert changed == {first, second}
        value = crossings(each.graph)[0].value
        lows = []
        for native in (each.native, moved.native):
            each.adapter.observe(native, BATCHES[:1], [value], lambda name, x: lows.append(x.min((0, 2, 3))))  # noqa: B023
        assert lows[0].max() > 15 and np.abs(lows[1]).max() < 1  # what all samples have is gone
    model = sl.load(HighBias().eval(), X[:2])
    plain, mended = (quantized(model, absorb_bias=how) for how in (False, True))
    assert error(mended, model) < 0.5 * error(plain, model)


def test_biases_of_layers_pass_too_and_nothing_else_changes() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        net[1].bias[:8] += 30
    model = sl.load(net.eval(), X[:2])
    moved = absorbed(model, BATCHES)
    np.testing.assert_allclose(moved.predict(X), model.predict(X), rtol=1e-3, atol=1e-4)
    before, after = model.parameters(), moved.parameters()
    assert (before["1.bias"][:8] - after["1.bias"][:8] > 20).all()
    assert np.array_equal(before["1.bias"][8:], after["1.bias"][8:])
    clipped = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Sigmoid(), nn.Linear(4, 3)).eval()
    bent = sl.load(clipped, X[:2])
    assert absorbed(bent, BATCHES) is bent


def test_keras_biases_pass() -> None:
    import slimline.frameworks.keras  # noqa: F401, I001  chooses the backend before keras is imported
    import keras

    keras.utils.set_random_seed(0)
    dense = keras.layers.Dense(8, "relu", bias_initializer=keras.initializers.Constant(9.0))
    model = sl.load(keras.Sequential([keras.Input((6,)), dense, keras.layers.Dense(3)]))
    x = X.reshape(-1, 6)[:64]
    moved = absorbed(model, [(x,)])
    np.testing.assert_allclose(moved.predict(x), model.predict(x), rtol=1e-3, atol=1e-4)
    moved_bias = [
        np.abs(a - b).max() for a, b in zip(moved.parameters().values(), model.parameters().values(), strict=True)
    ]
    assert sum(change > 1 for change in moved_bias) == 2  # what one loses the other gains
