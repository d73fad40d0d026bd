"""Channels that are divided where they are made and multiplied where they are read: no answer changes."""

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
from slimline.methods.equalization import salience_scales, smoothing_scales
from slimline.methods.gram import Gram
from slimline.steps.channel_scaling import divided

RNG = np.random.default_rng(0)
TOKENS = RNG.normal(size=(64, 5, 32)).astype(np.float32)
DATA = sl.Data(calibration=TOKENS)


class RMSNorm(nn.Module):
    """As most language models write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Block(nn.Module):
    """A residual block of a language model: gated, norms first; a few channels are a hundred times the others."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.gate, self.up = nn.Linear(32, 48), nn.Linear(32, 48, bias=False)
        self.down = nn.Linear(48, 32)
        with torch.no_grad():
            norm.weight.uniform_(0.5, 1.5)  # type: ignore[operator,union-attr]
            norm.weight[:3] *= 100  # type: ignore[index,operator]
            for layer in (self.gate, self.up):
                layer.weight[:, :3] /= 100

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.down(torch.sigmoid(self.gate(y)) * self.up(y))


@pytest.fixture(params=[nn.LayerNorm, RMSNorm])
def block(request: pytest.FixtureRequest) -> sl.Model:
    torch.manual_seed(0)
    return sl.load(Block(request.param(32)).eval(), TOKENS[:2])


def scaled(model: sl.Model) -> sl.Model:
    """With every value that can be divided divided by numbers of its own."""
    every = crossings(model.graph)
    return divided(model, [(each, RNG.uniform(0.2, 5, each.channels)) for each in every], "this")


def agree(model: sl.Model, other: sl.Model, x: np.ndarray) -> None:
    before, after = (m.outputs(x)[0] for m in (model, other))
    np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-4 * np.abs(before).max())


def test_norms_and_products_are_divided(block: sl.Model) -> None:
    readers = [sorted(layer.layer for layer in each.readers) for each in crossings(block.graph)]
    assert readers == [["gate", "up"], ["down"]]
    makers = [each.maker and each.maker.layer for each in crossings(block.graph)]
    assert makers == [None, "up"]
    agree(block, scaled(block), TOKENS)


def test_a_scaling_that_changes_an_answer_is_refused(block: sl.Model) -> None:
    first = crossings(block.graph)[0]
    wrong = replace(first, readers=first.readers[:1])  # as if nothing else read it
    with pytest.raises(sl.SlimlineError, match="smooth changed what the model answers to the example inputs"):
        divided(block, [(wrong, np.full(first.channels, 2.0))], "smooth")


def test_a_value_that_something_else_reads_is_left_alone() -> None:
    class Post(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.norm(x)
            z = self.a(y) + y  # the norm's output is added
            return self.b(torch.nn.functional.gelu(z)), z  # GELU minds a scale

    assert crossings(sl.load(Post().eval(), TOKENS[:2]).graph) == []


def test_a_weight_that_is_read_twice_is_left_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a = nn.LayerNorm(32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> Any:
            return self.a(self.norm(self.a(x).relu()))

    assert crossings(sl.load(Tied().eval(), TOKENS[:2]).graph) == []


def test_convolutions_and_their_groups() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, groups=4), nn.PReLU(16), nn.Conv2d(16, 4, 1)
    )
    x = RNG.normal(size=(4, 3, 16, 16)).astype(np.float32)
    model = sl.load(net.eval(), x[:2])
    assert [each.maker and each.maker.layer for each in crossings(model.graph)] == ["0", "3"]
    agree(model, scaled(model), x)


def test_keras_and_onnx(tmp_path: Path, block: sl.Model) -> None:
    sl.export(block, "onnxruntime", tmp_path)
    read = sl.load(tmp_path / "model.onnx")
    assert len(crossings(read.graph)) >= 1
    agree(read, scaled(read), TOKENS)

    import slimline.frameworks.keras  # noqa: F401, I001  chooses the backend before keras is imported
    import keras

    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((5, 32))
    y = keras.layers.LayerNormalization(name="norm")(x)
    product = keras.layers.Multiply()(
        [keras.layers.Dense(48, activation="sigmoid", name="gate")(y), keras.layers.Dense(48, name="up")(y)]
    )
    model = sl.load(keras.Model(inputs, keras.layers.Add()([x, keras.layers.Dense(32, name="down")(product)])))
    assert [len(each.readers) for each in crossings(model.graph)] == [2, 1]
    agree(model, scaled(model), TOKENS)


def test_scales_of_salience() -> None:
    size = np.array([0.01, 1.0, 0.0, 4.0])
    np.testing.assert_allclose(salience_scales(size, 0), 1)
    scales = salience_scales(size, 1)
    np.testing.assert_allclose(scales, [0.05, 5, 1, 20])  # over the geometric mean of the ends, 0.2
    np.testing.assert_allclose(salience_scales(np.zeros(3), 0.5), 1)


def test_a_divided_gram_matrix_is_that_of_divided_inputs() -> None:
    rows, by = RNG.normal(size=(2, 50, 6)), RNG.uniform(0.5, 2, (2, 6))
    whole, parts = Gram(2, 6), Gram(2, 6)
    whole.see(rows)
    parts.see(rows / by[:, None])
    np.testing.assert_allclose(whole.divided(by).second, parts.second, rtol=1e-5)
    np.testing.assert_allclose(whole.divided(by).mean, parts.mean, rtol=1e-4)


def test_scales_of_smoothing() -> None:
    inputs, weights = np.array([100.0, 1, 0, 4]), np.array([1.0, 1, 1, 0])
    np.testing.assert_allclose(smoothing_scales(inputs, weights, 0.5), [10, 1, 1, 1])
    even = smoothing_scales(inputs[:2], weights[:2], 0.5)
    np.testing.assert_allclose(inputs[:2] / even, weights[:2] * even)  # at a half, both are alike
    np.testing.assert_allclose(inputs[:2] / smoothing_scales(inputs[:2], weights[:2], 1), 1)


def test_smoothing_saves_what_a_few_large_channels_would_cost(block: sl.Model) -> None:
    step = sl.StaticQuantization(undo=False, layers=("gate", "up"), observer="minmax")
    reference = block.outputs(TOKENS)[0]
    errors = []
    for strength in (None, 0.5):
        model = sl.apply(block, step.model_copy(update={"smooth": strength}), DATA, progress=False)
        errors.append(float(np.square(model.outputs(TOKENS)[0] - reference).mean()))
    assert errors[1] < 0.1 * errors[0]


@pytest.mark.parametrize("rounding", ["nearest", "mse", "gptq"])
def test_awq_saves_what_a_few_large_channels_would_cost(block: sl.Model, rounding: Any) -> None:
    step = sl.WeightQuantization(dtype="int3", group_size=16, rounding=rounding, layers=("gate", "up"))
    plain, aware = (
        sl.apply(block, step.model_copy(update={"scaling": how}), DATA, target="onnxruntime", progress=False)
        for how in (None, "awq")
    )
    reference = block.outputs(TOKENS)[0]
    errors = [float(np.square(model.outputs(TOKENS)[0] - reference).mean()) for model in (plain, aware)]
    assert errors[1] < (0.5 if rounding == "nearest" else 0.9) * errors[0]
    assert aware.history[-1]["scaling"] == "awq"


def test_awq_needs_samples(block: sl.Model) -> None:
    with pytest.raises(sl.SlimlineError, match="with awq needs data"):
        sl.apply(block, sl.WeightQuantization(dtype="int4", scaling="awq"), progress=False)
