"""Integers whose ranges are found at run time on ExecuTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("executorch")

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.runtimes.base import runtime

STEP = sl.DynamicQuantization(undo=False)
X = np.random.default_rng(0).normal(size=(6, 5, 48)).astype(np.float32)


class Net(nn.Module):
    """Linear layers on rows and on sequences, of which two read the same, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.over_time = nn.Conv1d(5, 5, 3, padding=1)
        self.query, self.key, self.wide = nn.Linear(48, 64), nn.Linear(48, 64, bias=False), nn.Linear(64, 32)
        self.head = nn.Linear(160, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.over_time(x))
        return self.head(torch.relu(self.wide(self.query(x) * 0.5 + self.key(x))).flatten(1))


@pytest.fixture(scope="module")
def net() -> sl.Model:
    torch.manual_seed(0)
    return sl.load(Net().eval(), X[:2])


@pytest.fixture(scope="module")
def small(net) -> sl.Model:
    return sl.apply(net, STEP, target="executorch")


@pytest.fixture(scope="module")
def artifact(small, tmp_path_factory) -> Path:
    return sl.export(small, "executorch", tmp_path_factory.mktemp("dynamic") / "net.pte")


def integer(path: Path) -> set[str]:
    return {name for name, kind in runtime("executorch").integer_layers(path).items() if kind == "integer"}


def answer(path: Path) -> np.ndarray:
    return runtime("executorch").load(path).run((X,))


def test_layers_run_in_integers_and_answer_as_the_model(net, small, artifact, tmp_path):
    assert integer(artifact) == set(small.quantization.layers) == {"query", "key", "wide", "head"}
    largest = np.abs(net.predict(X)).max()
    assert np.abs(answer(artifact) - small.predict(X)).max() < 1e-3 * largest
    assert 1e-3 * largest < np.abs(answer(artifact) - net.predict(X)).max() < 0.1 * largest
    plain = sl.export(net, "executorch", tmp_path / "float.pte")
    weights = sum(small.parameters()[name].size for name in small.quantization.weights)
    assert plain.stat().st_size - artifact.stat().st_size > 2 * weights


def test_int4_weights_are_in_blocks_whose_scales_are_short(net, tmp_path):
    short = sl.apply(net, sl.DynamicQuantization(weights="int4", undo=False), target="executorch")
    grids = short.quantization.weights
    assert {name.partition(".")[0]: each.bits for name, each in grids.items()} == {
        "query": 8, "key": 8, "wide": 4, "head": 4
    }  # fmt: skip
    scale = grids["head.weight"].scale
    assert scale.shape == (4, 5) and not (scale.view(np.uint32) & 0xFFFF).any()  # bfloat16
    path = sl.export(short, "executorch", tmp_path / "short.pte")
    assert integer(path) == {"query", "key", "wide", "head"}
    largest = np.abs(net.predict(X)).max()
    assert np.abs(answer(path) - short.predict(X)).max() < 1e-3 * largest


def test_a_saved_model_gives_the_same_answers(small, artifact, tmp_path):
    again = sl.load(small.save(tmp_path / "m.pt2"))
    assert again.quantization == small.quantization
    assert np.array_equal(answer(sl.export(again, "executorch", tmp_path / "again.pte")), answer(artifact))


def test_its_int8_models_are_those_of_litert_too(small, tmp_path):
    """Both run XNNPACK, so that they round alike."""
    pytest.importorskip("tensorflow")
    path = sl.export(small, "litert", tmp_path / "net.tflite")
    largest = np.abs(small.predict(X)).max()
    assert np.abs(runtime("litert").load(path).run((X,)) - small.predict(X)).max() < 1e-3 * largest


def test_weights_alone_are_refused(net, tmp_path):
    alone = sl.apply(net, sl.WeightQuantization(dtype="int8"))
    with pytest.raises(SlimlineError, match="no storage for weights alone"):
        sl.export(alone, "executorch", tmp_path / "net.pte")
