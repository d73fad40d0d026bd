"""Residual streams that are rotated: no answer changes, and what a few channels hold costs less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import slimline as sl
from slimline.graph.streams import streams
from slimline.methods.rotation import randomized_hadamard
from slimline.steps.weight_quantization.rotation import rotated
from tests.test_channel_scaling import RMSNorm

RNG = np.random.default_rng(0)
WORDS = RNG.integers(0, 20, (64, 6))
DATA = sl.Data(calibration=WORDS)
WIDTH, HEADS = 24, 2


class Decoder(nn.Module):
    """Two blocks of a language model with positions; a few channels of its stream are much larger than the others."""

    def __init__(self, norm: Any, tied: bool = False) -> None:
        super().__init__()
        self.table, self.positions = nn.Embedding(20, WIDTH), nn.Parameter(torch.randn(6, WIDTH) / 10)
        self.blocks = nn.ModuleList([Block(norm) for _ in range(2)])
        self.norm, self.head = norm(WIDTH), nn.Linear(WIDTH, 20, bias=False)
        if tied:
            self.head.weight = self.table.weight
        with torch.no_grad():
            for each in (self.norm, *(n for block in self.blocks for n in (block.first, block.second))):
                each.weight.uniform_(0.5, 2)
            self.table.weight[:, :2] *= 30
            for layer in (*(block.qkv for block in self.blocks), *(block.up for block in self.blocks)):
                layer.weight[:, 5] *= 30

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.table(words) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    """Norms first, attention with one layer for queries, keys and values, biases in some layers."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.first, self.second = norm(WIDTH), norm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [y.view(-1, 6, HEADS, WIDTH // HEADS).transpose(1, 2) for y in self.qkv(self.first(x)).chunk(3, -1)]
        y = nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(-1, 6, WIDTH))
        return x + self.down(nn.functional.silu(self.up(self.second(x))))


def decoder(norm: Any = RMSNorm, tied: bool = False) -> sl.Model:
    torch.manual_seed(0)
    return sl.load(Decoder(norm, tied).eval(), WORDS[:2])


def agree(model: sl.Model, other: sl.Model, x: np.ndarray) -> None:
    before, after = (each.outputs(x)[0] for each in (model, other))
    np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-4 * np.abs(before).max())


@pytest.mark.parametrize("width", [1, 6, 16, 24, 80])
def test_rotations_are_orthogonal(width: int) -> None:
    rotation = randomized_hadamard(width)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(width), atol=1e-12)
    if width == 16:
        np.testing.assert_allclose(np.abs(rotation), 0.25)
    np.testing.assert_array_equal(rotation, randomized_hadamard(width))


@pytest.mark.parametrize("norm", [RMSNorm, nn.RMSNorm])
def test_a_stream_is_rotated_as_a_whole_and_no_answer_changes(norm: Any, tmp_path: Path) -> None:
    model = decoder(norm)
    models = [model]
    if norm is RMSNorm:
        models.append(sl.load(sl.export(model, "onnxruntime", tmp_path / "net.onnx"), WORDS[:2]))
    for each in models:
        ((stream,), reasons) = streams(each.graph)
        assert not reasons and stream.width == WIDTH
        assert (len(stream.writers), len(stream.tables), len(stream.readers)) == (4, 2, 5)
        turned = rotated(each)
        agree(each, turned, WORDS)
        before, after = each.parameters(), turned.parameters()
        changed = {name for name in before if not np.array_equal(before[name], after[name])}
        assert changed == stream.parameters
        table = next(name for name in stream.tables if before[name].shape == (20, WIDTH))
        np.testing.assert_allclose(after[table], before[table] @ randomized_hadamard(WIDTH), atol=1e-5)


def test_keras() -> None:
    import slimline.frameworks.keras  # noqa: F401, I001  chooses the backend before keras is imported
    import keras

    keras.utils.set_random_seed(0)
    layers = keras.layers
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(20, WIDTH)(inputs)
    y = layers.Dense(32, "relu")(layers.RMSNormalization()(x))
    x = layers.Add()([x, layers.Dense(WIDTH)(y)])
    net = keras.Model(inputs, layers.Dense(5)(layers.RMSNormalization()(x)))
    for layer in net.layers:
        if isinstance(layer, layers.RMSNormalization):
            layer.scale.assign(RNG.uniform(0.5, 2, WIDTH))
    model = sl.load(net)
    words = WORDS.astype(np.int32)
    turned = rotated(model)
    agree(model, turned, words)
    changed = [np.abs(a - b).max() for a, b in zip(*(m.parameters().values() for m in (model, turned)), strict=True)]
    assert sum(change > 1e-3 for change in changed) >= 6  # a table, two norms, three layers


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_few_bits_cost_less(rounding: Any) -> None:
    model = decoder()
    truth = model.outputs(WORDS)[0]
    step = sl.WeightQuantization(dtype="int4", group_size="channel", rounding=rounding)
    errors = []
    for rotation in (None, "hadamard"):
        small = sl.apply(model, step.model_copy(update={"rotation": rotation}), DATA, progress=False)
        errors.append(float(np.square(small.outputs(WORDS)[0] - truth).mean()))
        assert small.history[-1]["rotation"] == rotation
    assert errors[1] < 0.8 * errors[0]


class Mean(nn.Module):
    """The stream is an output too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(20, 8), RMSNorm(8), nn.Linear(8, 3)

    def forward(self, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.table(words)
        return self.head(self.norm(x)), x


class Gated(Mean):
    """Something else reads the stream."""

    def forward(self, words: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        x = self.table(words)
        return self.head(self.norm(x)) * torch.sigmoid(x).sum(-1, keepdim=True)


class Doubled(Mean):
    """A norm's output is not for layers alone."""

    def forward(self, words: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        y = self.norm(self.table(words))
        return self.head(y) + y.tanh().sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("net", "said"),
    [
        (lambda: Decoder(nn.LayerNorm), "rotated: no RMS norm reads a sum"),
        (lambda: Decoder(RMSNorm, tied=True), "is read by several operators"),
        (Mean, "is an output of the model"),
        (Gated, "sigmoid .*reads it"),
        (Doubled, "tanh .*reads what a norm of it makes"),
    ],
)
def test_what_cannot_be_rotated_is_refused_with_the_reason(net: Any, said: str) -> None:
    torch.manual_seed(0)
    model = sl.load(net().eval(), WORDS[:2])
    with pytest.raises(sl.SlimlineError, match=said):
        sl.apply(model, sl.WeightQuantization(dtype="int4", rotation="hadamard"), progress=False)


def test_what_was_pruned_would_not_stay_zero() -> None:
    sparse = sl.apply(decoder(), sl.SparsePruning(amount=0.5), progress=False)
    with pytest.raises(sl.SlimlineError, match="would revive what was pruned"):
        sl.apply(sparse, sl.WeightQuantization(rotation="hadamard"), progress=False)
