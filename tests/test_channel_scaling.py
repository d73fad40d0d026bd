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
    return divided(model, [(each, each.alike(RNG.uniform(0.2, 5, each.channels))) for each in every], "this")


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


class Attention(nn.Module):
    """Four heads of eight; the values of `kv` heads are those of the others too."""

    def __init__(self, kv: int = 4) -> None:
        super().__init__()
        self.kv = kv
        self.query, self.out = nn.Linear(32, 32), nn.Linear(32, 32)
        self.key, self.value = nn.Linear(32, 8 * kv), nn.Linear(32, 8 * kv)
        with torch.no_grad():  # two channels of each head are large, which their readers make up for
            large = torch.tensor([50.0, 20, 1, 1, 1, 1, 1, 1])
            self.value.weight.mul_(large.repeat(kv)[:, None])
            self.value.bias.mul_(large.repeat(kv))
            self.out.weight.div_(large.repeat(4))

    def heads(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [
            layer(x).view(-1, 5, layer.out_features // 8, 8).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.scaled_dot_product_attention(*self.heads(x), enable_gqa=self.kv < 4)
        return self.out(y.transpose(1, 2).reshape(-1, 5, 32))


class Repeated(Attention):
    """The same, heads repeated and attention written out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, *rest = self.heads(x)
        key, value = (y[:, :, None].expand(-1, -1, 4 // self.kv, 5, 8).reshape(-1, 4, 5, 8) for y in rest)
        y = (query @ key.transpose(2, 3) / 3).softmax(3) @ value
        return self.out(y.transpose(1, 2).contiguous().view(-1, 5, 32))


class Fused(nn.Module):
    """One layer makes queries, keys and values, side by side or head by head."""

    def __init__(self, split: bool) -> None:
        super().__init__()
        self.split = split
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.split:
            parts = [y.view(-1, 5, 4, 8).transpose(1, 2) for y in self.qkv(x).split(32, dim=2)]
        else:
            parts = list(self.qkv(x).reshape(-1, 5, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0))
        y = nn.functional.scaled_dot_product_attention(*parts)
        return self.out(y.transpose(1, 2).reshape(-1, 5, 32))


class Module(nn.Module):
    """torch's own, which moves the batch about."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


ATTENTION = {
    "plain": (Attention, 32), "shared": (lambda: Attention(2), 16), "one": (lambda: Repeated(1), 8),
    "repeated": (lambda: Repeated(2), 16), "split": (lambda: Fused(True), 32), "unbound": (lambda: Fused(False), 32),
    "module": (Module, 32),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "framework"), [*((kind, "torch") for kind in ATTENTION), ("shared", "onnx"), ("split", "onnx")]
)
def test_values_are_divided_through_attention(kind: str, framework: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, free = ATTENTION[kind]
    model = sl.load(net().eval(), TOKENS[:2])
    if framework == "onnx":
        model = sl.load(sl.export(model, "onnxruntime", tmp_path / "net.onnx"), TOKENS[:2])
    (crossing,) = crossings(model.graph)
    assert crossing.channels == 32
    assert len(set(crossing.shares)) == free  # channels of a head that others share are divided alike
    agree(model, scaled(model), TOKENS)
    uneven = RNG.uniform(0.2, 5, 32)
    if free < 32:
        with pytest.raises(sl.SlimlineError, match="this changed what the model answers"):
            divided(model, [(crossing, uneven)], "this")


def test_keras_attention() -> None:
    import slimline.frameworks.keras  # noqa: F401, I001  chooses the backend before keras is imported
    import keras

    keras.utils.set_random_seed(0)
    for layer, free in ((keras.layers.MultiHeadAttention(4, 8), 32), (keras.layers.GroupQueryAttention(8, 4, 2), 16)):
        inputs = keras.Input((5, 32))
        model = sl.load(keras.Model(inputs, layer(inputs, inputs)))
        (crossing,) = crossings(model.graph)
        assert len(set(crossing.shares)) == free
        agree(model, scaled(model), TOKENS)


def test_values_that_something_else_reads_are_left_alone() -> None:
    class Leaking(Fused):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.qkv(x)
            query, key, value = (part.view(-1, 5, 4, 8).transpose(1, 2) for part in y.split(32, dim=2))
            z = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(-1, 5, 32)
            return self.out(z) + (y[..., 60:92] if self.split else y[..., 30:62])

    torch.manual_seed(0)
    assert crossings(sl.load(Leaking(True).eval(), TOKENS[:2]).graph) == []  # some of the values are read again
    apart = sl.load(Leaking(False).eval(), TOKENS[:2])  # only queries and keys are
    assert len(crossings(apart.graph)) == 1
    agree(apart, scaled(apart), TOKENS)

    class Same(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            query, _, value = self.heads(x)
            y = nn.functional.scaled_dot_product_attention(query, value, value)
            return self.out(y.transpose(1, 2).reshape(-1, 5, 32))

    assert crossings(sl.load(Same().eval(), TOKENS[:2]).graph) == []  # the keys mind a scale


def test_uneven_values_cost_less() -> None:
    torch.manual_seed(0)
    model = sl.load(Attention(2).eval(), TOKENS[:2])
    truth = model.outputs(TOKENS)[0]

    def error(step: Any) -> float:
        small = sl.apply(model, step, DATA, target="onnxruntime", progress=False)
        return float(np.square(small.outputs(TOKENS)[0] - truth).mean())

    static = sl.StaticQuantization(undo=False, observer="minmax", layers=("out",))
    assert error(static.model_copy(update={"smooth": 0.5})) < 0.1 * error(static)
    assert error(static.model_copy(update={"equalize": True})) < 0.1 * error(static)
    alone = sl.WeightQuantization(dtype="int3", group_size=32, rounding="nearest", layers=("out",))
    assert error(alone.model_copy(update={"scaling": "awq"})) < 0.5 * error(alone)


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
