"""Low rank of what recurrent layers read their input by, in every framework."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import slimline as sl
from slimline.graph import cost
from slimline.graph.matrix import recurrences
from slimline.steps.low_rank.plan import LowRankPlan

STEPS, INPUTS, WIDTH = 7, 24, 16
RNG = np.random.default_rng(0)
X = (
    RNG.normal(size=(96, STEPS, 5)) @ RNG.normal(size=(5, INPUTS)) + 0.1 * RNG.normal(size=(96, STEPS, INPUTS))
).astype(np.float32)
DATA = sl.Data(calibration=(X,))


class Reader(nn.Module):
    """A recurrent layer, whose last answer is classed."""

    def __init__(self, kind: str, **fields: Any) -> None:
        super().__init__()
        self.cells = getattr(nn, kind)(INPUTS, WIDTH, batch_first=True, **fields)
        self.head = nn.Linear(WIDTH * (2 if self.cells.bidirectional else 1), 3)

    def forward(self, x: Any) -> Any:
        return self.head(self.cells(x)[0][:, -1])


def torch_reader(kind: str, **fields: Any) -> sl.Model:
    torch.manual_seed(0)
    return sl.load(Reader(kind, **fields).eval(), X[:2])


def keras_reader(kind: str) -> sl.Model:
    pytest.importorskip("keras")
    from slimline.frameworks.base import adapter

    adapter("keras")
    import keras

    keras.utils.set_random_seed(0)
    layers = keras.layers
    cells = {
        "LSTM": lambda: layers.LSTM(WIDTH, name="cells"),
        "GRU": lambda: layers.GRU(WIDTH, name="cells"),
        "stacked": lambda: layers.RNN([layers.LSTMCell(WIDTH), layers.GRUCell(8)], name="cells"),
        "both": lambda: layers.Bidirectional(layers.LSTM(WIDTH, name="cells"), name="ways"),
        "masked": lambda: layers.LSTM(WIDTH, name="cells"),
    }[kind]()
    inputs = keras.Input((STEPS, INPUTS))
    x = layers.Masking()(inputs) if kind == "masked" else inputs
    return sl.load(keras.Model(inputs, layers.Dense(3, name="head")(cells(x))))


def onnx_reader(kind: str) -> sl.Model:
    from tests.frameworks.onnx.graphs import model, weights

    gates, ways = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind], 2
    shapes = {
        "cells_W": (ways, gates * WIDTH, INPUTS), "cells_R": (ways, gates * WIDTH, WIDTH),
        "cells_B": (ways, 2 * gates * WIDTH), "head_W": (2 * WIDTH, 3),
    }  # fmt: skip
    body = (
        f't = Transpose<perm = [1, 0, 2]>(x) a, b = {kind}<hidden_size = {WIDTH}, direction = "bidirectional">'
        "(t, cells_W, cells_R, cells_B) c = Transpose<perm = [1, 0, 2]>(b) d = Flatten(c) y = MatMul(d, head_W)"
    )
    return sl.load(model(body, weights(**shapes), f"float[N,{STEPS},{INPUTS}] x"), X[:2])


@cache
def reader(case: str) -> sl.Model:
    framework, kind = case.split()
    both = {"bidirectional": kind.startswith("bi")}
    kind = kind.removeprefix("bi")
    if framework == "torch":
        return torch_reader(kind.removesuffix("s"), num_layers=2 if kind.endswith("s") else 1, **both)
    return (keras_reader if framework == "keras" else onnx_reader)(kind)


CASES = (
    *("torch LSTM", "torch biLSTMs", "torch GRU", "torch biRNN"),
    *("keras LSTM", "keras GRU", "keras stacked", "keras both", "keras masked"),
    *("onnx LSTM", "onnx GRU", "onnx RNN"),
)


def same(a: sl.Model, b: sl.Model) -> None:
    np.testing.assert_allclose(a.predict(X), b.predict(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_recurrent_layer_reads_a_product(case: str) -> None:
    model = reader(case)
    plan = sl.plan(model, sl.LowRank(rank=4, layers=("type:recurrent",), undo=False), DATA)
    assert isinstance(plan, LowRankPlan)
    small = plan.apply(model)
    same(small, plan.mask(model))
    assert (small.graph.size, cost.macs(small.graph)) == (plan.parameters, plan.macs)
    assert len(plan.products) == (2 if case == "keras both" else 1) and not plan.dense
    for product in plan.products:
        assert product.parts == (f"{product.name}.0", product.name) and product.ranks == (4,)
        assert product.parameters[1] * INPUTS == product.parameters[0] * 4 + 4 * INPUTS**2
        assert all(4 in array.shape and INPUTS not in array.shape for array in product.kernels.values())


@pytest.mark.parametrize("case", CASES)
def test_the_planned_error_is_what_the_gates_lose(case: str) -> None:
    """Computed anew from what the layer reads and its weights, both directions and all gates together."""
    model = reader(case)
    step = sl.LowRank(rank=4, layers=("type:recurrent",), undo=False, compensate=False, damping=1e-9)
    plan = sl.plan(model, step, DATA)
    rows = X.reshape(-1, INPUTS)
    masked = plan.mask(model).parameters()
    for product, directions in zip(plan.products, recurrences(model.graph), strict=True):
        old, new = (
            np.concatenate([each.matrix(stored[each.weight])[0] for each in directions])
            for stored in (model.parameters(), masked)
        )
        answer = rows @ old.T
        lost = np.square(answer - rows @ new.T).sum() / np.square(answer).sum()
        assert product.error == pytest.approx(lost, rel=1e-3)
        values = np.linalg.svd(answer, compute_uv=False) ** 2
        assert product.error == pytest.approx(values[4:].sum() / values.sum(), rel=1e-3)  # the least of rank 4


@pytest.mark.parametrize("case", CASES)
def test_at_full_rank_nothing_changes(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from slimline.steps.low_rank import plan as module

    monkeypatch.setattr(module, "_smaller", lambda split, rank: rank == split.most)  # it would pay at no other
    model = reader(case)
    plan = sl.plan(model, sl.LowRank(energy=1 - 1e-6, damping=1e-6, layers=("type:recurrent",), undo=False), DATA)
    same(plan.apply(model), model)


@pytest.mark.parametrize("case", ["torch biLSTMs", "keras GRU", "keras stacked", "onnx GRU"])
def test_the_artifact_computes_it_too(case: str, tmp_path: Path) -> None:
    model = reader(case)
    small = sl.apply(model, sl.LowRank(rank=4, layers=("type:recurrent",), undo=False), DATA)
    suffix = {"torch": ".pt2", "keras": ".keras", "onnx": ".onnx"}[case.split()[0]]
    small.save(tmp_path / f"small{suffix}")
    same(sl.load(tmp_path / f"small{suffix}"), small)
    sl.export(small, "onnxruntime", tmp_path / "small-artifact.onnx")
    same(sl.load(tmp_path / "small-artifact.onnx", X[:2]), small)


@pytest.mark.parametrize("case", ["torch GRU", "keras LSTM", "onnx LSTM"])
def test_it_learns_behind(case: str) -> None:
    model = reader(case)
    data = sl.Data(train=X, selection=X, test=X, calibration=(X,), overlap="allow")
    steps = [
        sl.LowRank(rank=2, layers=("type:recurrent",), undo=False),
        sl.Distillation(loss="mse", alpha=1, epochs=3, learning_rate=1e-2),
    ]
    small = sl.apply(model, steps[:1], data)
    taught = sl.apply(model, steps, data)
    changed = {name for name, array in taught.parameters().items() if (array != small.parameters()[name]).any()}
    (product,) = sl.plan(model, steps[0], data).products
    assert any(name.startswith(f"{product.name}.0") for name in changed)

    def distance(other: sl.Model) -> float:
        return float(np.square(other.predict(X) - model.predict(X)).mean())

    assert distance(taught) < distance(small)


def test_compensation_makes_up_for_the_layer_before() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.cells = nn.Linear(INPUTS, 32), nn.GRU(32, WIDTH, batch_first=True)

        def forward(self, x: Any) -> Any:
            return self.cells(self.first(x))[0]

    torch.manual_seed(0)
    model = sl.load(Two().eval(), X[:2])
    answers = {
        compensate: sl.apply(model, sl.LowRank(rank=3, undo=False, compensate=compensate), DATA).predict(X)
        for compensate in (True, False)
    }
    lost = {c: float(np.square(answer - model.predict(X)).mean()) for c, answer in answers.items()}
    assert lost[True] < lost[False]


def test_a_layer_that_reads_maps_stays() -> None:
    keras_reader("LSTM")
    import keras

    inputs = keras.Input((4, 6, 8))
    x = keras.layers.ConvLSTM1D(5, 3, name="maps")(inputs)
    model = sl.load(keras.Model(inputs, keras.layers.Dense(4, name="head")(keras.layers.Flatten()(x))))
    plan = sl.plan(model, sl.LowRank(rank=2, criterion="weight"))
    assert plan.names == ("head",)
    assert plan.dense == {
        "maps": "it is neither a linear layer, nor a convolution, nor a recurrent layer that reads vectors"
    }


def test_what_stays_has_a_reason() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells, self.head = nn.LSTM(INPUTS, WIDTH, batch_first=True), nn.Linear(WIDTH, 12)

        def forward(self, x: Any) -> Any:
            return self.head(self.cells(x)[0] + self.cells(x.flip(1))[0])

    torch.manual_seed(0)
    plan = sl.plan(sl.load(Shared().eval(), X[:2]), sl.LowRank(rank=3), DATA)
    assert plan.dense == {"cells": "it shares its weights with other layers"}
    small = torch_reader("GRU")
    assert sl.plan(small, sl.LowRank(rank=3, layers=("cells",)), DATA).names == ("cells",)
    with pytest.raises(sl.SlimlineError, match="rank 25 is more than its matrix can have"):
        sl.plan(small, sl.LowRank(rank=25, layers=("cells",)), DATA)
