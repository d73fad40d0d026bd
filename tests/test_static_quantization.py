"""What StaticQuantization can be told, end to end: grids against closed forms, artifacts against simulations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slimline as sl
from slimline.graph.ends import first_layers, last_layers
from slimline.methods.formats import IntegerGrid
from slimline.runtimes.base import runtime

pytest.importorskip("torch")
import torch
from torch import nn

rng = np.random.default_rng(0)
X = rng.normal(size=(96, 3, 8, 8)).astype(np.float32)
DATA = sl.Data(calibration=X)


def network() -> Any:
    """Convolutions, a depthwise one among them, and a linear layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU(),
        nn.Conv2d(16, 24, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def model() -> sl.Model:
    return sl.load(network(), X[:2])


def quantized(model: sl.Model, target: str = "onnxruntime", **settings: Any) -> sl.Model:
    step = sl.StaticQuantization(undo=False, **settings)
    return sl.apply(model, step, DATA, target=target, progress=False)


def grids(model: sl.Model, side: str = "activations") -> dict[str, IntegerGrid]:
    assert model.quantization is not None
    return {name: each for name, each in getattr(model.quantization, side).items() if isinstance(each, IntegerGrid)}


def disagreement(model: sl.Model, folder: Path, target: str = "onnxruntime") -> float:
    """The largest difference between the artifact and its simulation, as a part of the largest answer."""
    sl.export(model, target, folder)
    path = next(p for p in folder.iterdir() if p.suffix == runtime(target).suffix)
    answers, simulated = runtime(target).load(path).run((X,)), model.predict(X)
    return float(np.abs(answers - simulated).max() / np.abs(simulated).max())


@pytest.mark.parametrize("observer", ["minmax", "moving_average", "percentile", "mse", "entropy"])
def test_every_observer_gives_a_model_near_the_float_one(model: sl.Model, observer: str) -> None:
    small = quantized(model, observer=observer, percentile=99.9, batch_size=16)
    error = small.predict(X) - model.predict(X)
    assert np.square(error).sum() < 0.02 * np.square(model.predict(X)).sum()


@pytest.mark.parametrize("activations", ["uint8", "int8"])
def test_symmetric_activations_have_their_zero_in_the_middle(model: sl.Model, activations: str, tmp_path: Path) -> None:
    small = quantized(model, symmetric=True, activations=activations)
    zeros = {int(grid.zero) for grid in grids(small).values()}
    assert zeros == ({0} if activations == "int8" else {0, 128})  # 128: the input, 0: behind a ReLU
    assert disagreement(small, tmp_path) < 0.02


def test_first_and_last_layers_by_rule_and_an_override_before_it(model: sl.Model) -> None:
    assert first_layers(model.graph) == {"0"} and last_layers(model.graph) == {"9"}
    small = quantized(model, first_layers="float32", last_layers="float32")
    assert set(grids(small, "weights")) == {"3.weight", "5.weight"}
    other = quantized(model, first_layers="float32", overrides={"0": {"weights": "int8"}})
    assert "0.weight" in grids(other, "weights")


def test_ends_of_a_network_with_branches() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: Any) -> Any:
            first = self.a(x) + self.b(x)
            return self.c(first).relu(), self.d(first)

    graph = sl.load(Two().eval(), np.zeros((2, 4), np.float32)).graph
    assert first_layers(graph) == {"a", "b"} and last_layers(graph) == {"c", "d"}


def test_one_scale_for_all_weights_but_where_an_override_says_otherwise(model: sl.Model) -> None:
    small = quantized(model, granularity="tensor", overrides={"9": {"granularity": "channel"}})
    sizes = {name: grid.scale.size for name, grid in grids(small, "weights").items()}
    assert sizes == {"0.weight": 1, "3.weight": 1, "5.weight": 1, "9.weight": 5}
