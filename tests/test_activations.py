"""FATReLU: thresholds against brute force, the truncated model against numpy, the artifact against the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import slimline as sl
from slimline.measure import outputs
from slimline.methods.activations import sparsity, threshold_for_error, threshold_for_sparsity
from slimline.steps.activations.plan import ActivationPlan

rng = np.random.default_rng(0)
X = rng.normal(size=(64, 6)).astype(np.float32)
VALUES = st.lists(st.integers(0, 5).map(float), min_size=1, max_size=12).map(np.array)


@given(VALUES, st.floats(0.05, 0.95))
def test_the_least_threshold_of_a_sparsity(values, wanted):
    found = threshold_for_sparsity(values, wanted)
    legal = [t for t in [0.0, *values] if sparsity(values, t) >= wanted - 1e-9]
    assert found == min(legal)


@given(VALUES, st.floats(0.05, 0.95))
def test_the_largest_threshold_of_an_error(values, wanted):
    found = threshold_for_error(values, wanted)
    total = np.square(values).sum()
    legal = [t for t in [0.0, *values] if np.square(values[values <= t]).sum() <= wanted * total]
    assert found == max(legal)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.act, self.two, self.head = nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(nn.functional.relu6(self.two(self.act(self.one(x)))))


def torch_model() -> sl.Model:
    torch.manual_seed(0)
    return sl.load(Net(), X[:2])


def keras_model() -> sl.Model:
    import slimline.frameworks.keras  # noqa: F401  # isort: skip
    import keras

    L = keras.layers
    keras.utils.set_random_seed(0)
    layers = [L.Input((6,)), L.Dense(16, activation="relu"), L.Dense(8), L.ReLU(6.0), L.Dense(3)]
    return sl.load(keras.Sequential(layers))


@pytest.fixture(scope="module", params=[torch_model, keras_model], ids=["torch", "keras"])
def model(request) -> sl.Model:
    return request.param()


DATA = sl.Data(calibration=(X, None), test=(X, None))


def test_the_sparsity_asked_for_is_measured(model):
    step = sl.ActivationPruning(sparsity=0.8)
    small = sl.apply(model, step, DATA)
    found = sl.plan(model, step, DATA)
    held: dict[str, np.ndarray] = {}
    raised = [t.value for t in found.thresholds]
    graph = small.graph
    after = [n.outputs[0] for n in graph.nodes if n.inputs[0] in raised and n.attributes.get("function") == "threshold"]
    assert len(after) == len(raised) == 2
    small.adapter.observe(small.native, [(X,)], after, lambda name, a: held.update({name: a.copy()}))
    first = held[after[0]]
    assert np.mean(first == 0) == pytest.approx(0.8, abs=0.01)
    assert found.thresholds[0].after == pytest.approx(0.8, abs=0.01)
    assert found.thresholds[1].after == pytest.approx(np.mean(held[after[1]] == 0), abs=1e-6)
    assert all(t.before < 0.8 for t in found.thresholds)
    assert np.abs(small.predict(X) - model.predict(X)).max() > 1e-3
    assert "skipped by none of the runtimes" in str(found)


def test_truncation_is_what_numpy_says(model):
    plan = sl.plan(model, sl.ActivationPruning(error=0.1), DATA)
    stored = list(model.parameters().values())
    w1, b1, w2, b2, w3, b3 = (a.T if a.ndim == 2 and model.framework == "torch" else a for a in stored)
    t1, t2 = (t.threshold for t in plan.thresholds)
    y = np.maximum(X @ w1 + b1, 0)
    y = np.clip(np.where(y > t1, y, 0) @ w2 + b2, 0, 6)
    expected = np.where(y > t2, y, 0) @ w3 + b3
    np.testing.assert_allclose(plan.apply(model).predict(X), expected, atol=1e-5)
    assert all(0 < t.error <= 0.1 for t in plan.thresholds)
    assert ActivationPlan.from_json(plan.to_json(), model).summary() == plan.summary()


def test_the_artifact_truncates_and_so_does_a_saved_model(model, tmp_path):
    small = sl.apply(model, sl.ActivationPruning(sparsity=0.7), DATA)
    target = {"torch": "onnxruntime", "keras": "litert"}[model.framework]
    np.testing.assert_allclose(outputs(sl.export(small, target, tmp_path), (X,)), small.predict(X), atol=1e-5)
    again = sl.load(small.save(tmp_path / f"small{model.adapter.suffix}"))
    np.testing.assert_allclose(again.predict(X), small.predict(X), atol=1e-6)


def test_layers_are_named_and_kept(model):
    every = sl.plan(model, sl.ActivationPruning(sparsity=0.9), DATA).thresholds
    kept = sl.plan(model, sl.ActivationPruning(sparsity=0.9, keep=(every[0].value,)), DATA).thresholds
    assert [(t.value, t.threshold) for t in kept] == [(t.value, t.threshold) for t in every[1:]]


def test_bad_requests_are_one_sentence(model):
    for bad in ({}, {"sparsity": 0.5, "error": 0.1}, {"sparsity": 1.5}):
        with pytest.raises(sl.SlimlineError, match="ActivationPruning"):
            sl.ActivationPruning(**bad)
    with pytest.raises(sl.SlimlineError, match="needs data"):
        sl.plan(model, sl.ActivationPruning(sparsity=0.5))
    with pytest.raises(sl.SlimlineError, match="no ReLU"):
        sl.plan(sl.load(nn.Linear(6, 3), X[:2]), sl.ActivationPruning(sparsity=0.5), DATA)
    with pytest.raises(sl.SlimlineError, match="nowhere"):
        sl.plan(model, sl.ActivationPruning(sparsity=0.5, layers=("nowhere",)), DATA)
