"""Weights alone on LiteRT: float16 and INT8 in the file, float32 in the kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("ai_edge_litert")
pytest.importorskip("tensorflow")

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import adapter
from slimline.runtimes.base import runtime

adapter("keras")  # sets what must be set before keras is imported

import keras  # noqa: E402
from keras import layers as L  # noqa: E402

X = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)
TOKENS = np.random.default_rng(0).integers(0, 50, (4, 6))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.apart = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=16)
        self.rows, self.head = nn.Linear(16, 64, bias=False), nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.apart(torch.relu(self.first(x))).flatten(2).transpose(1, 2)
        return self.head(torch.relu(self.rows(y) * 0.3).mean(1))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(50, 32), nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(x).mean(1))


def keras_net() -> keras.Model:
    keras.utils.set_random_seed(0)
    i = keras.Input((8, 8, 3))
    x = L.BatchNormalization()(L.Conv2D(16, 3, use_bias=False)(i))
    x = L.GlobalAveragePooling2D()(L.DepthwiseConv2D(3, depth_multiplier=2)(L.ReLU()(x)))
    return keras.Model(i, L.Dense(5)(L.Dense(64, activation="relu")(x)))


def model(kind: str) -> tuple[sl.Model, Any]:
    torch.manual_seed(0)
    match kind:
        case "images":
            return sl.load(Net().eval(), X[:2]), X
        case "words":
            return sl.load(Words().eval(), TOKENS[:2]), TOKENS
        case _:
            return sl.load(keras_net()), X.transpose(0, 2, 3, 1)


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
@pytest.mark.parametrize("kind", ["images", "words", "keras"])
def test_files_are_smaller_and_answer_as_the_model(kind, dtype, tmp_path):
    plain, x = model(kind)
    small = sl.apply(plain, sl.WeightQuantization(dtype=dtype), target="litert")
    paths = [sl.export(each, "litert", tmp_path / f"{n}.tflite") for n, each in enumerate((plain, small))]
    answer = runtime("litert").load(paths[1]).run((x,))
    assert np.abs(answer - small.predict(x)).max() < 1e-5
    assert np.abs(small.predict(x) - plain.predict(x)).max() > 1e-6
    assert "integer" not in runtime("litert").integer_layers(paths[1]).values()
    numbers = sum(small.parameters()[name].size for name in small.quantization.weights)
    saved = paths[0].stat().st_size - paths[1].stat().st_size
    assert saved > numbers * {"fp16": 2, "int8": 3}[dtype] - 2500  # scales, and the operators that turn them to float


def test_tables_are_stored_beside_ranges_found_at_run_time(tmp_path):
    class Tied(Words):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.table(x).mean(1)
            return torch.nn.functional.linear(y, self.table.weight) + self.head(y).sum(1, keepdim=True)

    torch.manual_seed(0)
    for net in (Words(), Tied()):
        plain = sl.load(net.eval(), TOKENS[:2])
        small = sl.apply(plain, sl.DynamicQuantization(undo=False), target="litert")
        paths = [sl.export(each, "litert", tmp_path / f"{n}.tflite") for n, each in enumerate((plain, small))]
        answer = runtime("litert").load(paths[1]).run((TOKENS,))
        assert np.abs(answer - small.predict(TOKENS)).max() < 1e-5
        assert "integer" in runtime("litert").integer_layers(paths[1]).values()
        assert paths[0].stat().st_size - paths[1].stat().st_size > 3 * 50 * 32 - 1500


@pytest.mark.parametrize("field", [{"dtype": "int4"}, {"dtype": "int8", "group_size": 4}, {"dtype": "bf16"}])
def test_other_formats_are_refused(field, tmp_path):
    plain, _ = model("words")
    with pytest.raises(SlimlineError, match="it stores float16, and symmetric integers of 8 bits"):
        sl.export(sl.apply(plain, sl.WeightQuantization(**field)), "litert", tmp_path / "m.tflite")
