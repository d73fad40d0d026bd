"""Low rank of weights that an einsum reads: projections to and from heads, and heads with weights of their own."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import slimline as sl
from slimline.graph import cost
from slimline.graph.matrix import matrices
from slimline.steps.low_rank.plan import LowRankPlan

TOKENS, WIDTH, HEADS = 9, 32, 4
RNG = np.random.default_rng(0)
X = (
    RNG.normal(size=(64, TOKENS, 6)) @ RNG.normal(size=(6, WIDTH)) + 0.1 * RNG.normal(size=(64, TOKENS, WIDTH))
).astype(np.float32)
DATA = sl.Data(calibration=(X,))
SPLIT, OWN, JOIN = "bld,dhk->blhk", "blhk,hkj->blhj", "blhk,hkd->bld"
"""To heads, within each head, and back."""


class Heads(nn.Module):
    """As einsums of torch."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"split": (WIDTH, HEADS, 12), "own": (HEADS, 12, 16), "join": (HEADS, 16, WIDTH)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(0.2 * torch.randn(shape)))

    def forward(self, x: Any) -> Any:
        x = torch.einsum(SPLIT, x, self.split)
        x = torch.einsum(OWN, x, self.own).tanh()
        return torch.einsum(JOIN, x, self.join)


def keras_heads() -> sl.Model:
    pytest.importorskip("keras")
    from slimline.frameworks.base import adapter

    adapter("keras")
    import keras

    keras.utils.set_random_seed(0)
    layers = keras.layers
    x = inputs = keras.Input((TOKENS, WIDTH))
    x = layers.MultiHeadAttention(HEADS, 8, name="mha")(x, x)
    x = layers.EinsumDense(SPLIT.replace("b", "B"), (None, HEADS, 12), bias_axes="hk", activation="tanh", name="split")(
        x
    )
    x = layers.EinsumDense(OWN, (None, HEADS, 16), bias_axes="hj", name="own")(x)
    x = layers.EinsumDense(JOIN, (None, WIDTH), bias_axes="d", name="join")(x)
    return sl.load(keras.Model(inputs, x))


def onnx_heads() -> sl.Model:
    from tests.frameworks.onnx.graphs import model, weights

    shapes = {"split_w": (WIDTH, HEADS, 12), "own_w": (HEADS, 12, 16), "join_w": (HEADS, 16, WIDTH)}
    body = (
        f'a = Einsum<equation = "{SPLIT}">(x, split_w) b = Einsum<equation = "{OWN}">(a, own_w) c = Tanh(b) '
        f'y = Einsum<equation = "{JOIN}">(c, join_w)'
    )
    return sl.load(model(body, weights(**shapes), f"float[N,{TOKENS},{WIDTH}] x", "float[N,L,D] y"), X[:2])


@cache
def heads(framework: str) -> sl.Model:
    if framework == "torch":
        torch.manual_seed(0)
        return sl.load(Heads().eval(), X[:2])
    return keras_heads() if framework == "keras" else onnx_heads()


FRAMEWORKS = ("torch", "keras", "onnx")


def same(a: sl.Model, b: sl.Model, part: float = 2e-5) -> None:
    answer = b.predict(X)
    np.testing.assert_allclose(a.predict(X), answer, rtol=1e-4, atol=part * np.abs(answer).max())


@pytest.mark.parametrize("criterion", ["output", "weight"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_plan_is_what_is_done(framework: str, criterion: Any) -> None:
    model = heads(framework)
    plan = sl.plan(model, sl.LowRank(ratio=0.4, scope="local", criterion=criterion), DATA)
    assert isinstance(plan, LowRankPlan)
    small = plan.apply(model)
    same(small, plan.mask(model))
    assert (small.graph.size, cost.macs(small.graph)) == (plan.parameters, plan.macs)
    assert len(plan.products) == (7 if framework == "keras" else 3) and not plan.dense
    parts = {part for product in plan.products for part in product.parts}
    assert parts <= {matrix.layer for matrix in matrices(small.graph)}
    if framework == "keras":  # what only changes the last dimension is a linear layer
        kinds = {node.layer: node.kind for node in small.graph.nodes}
        assert {kinds[part] for part in ("mha.query.0", "mha.attention_output.1", "join.1")} == {"linear"}
        assert {kinds[part] for part in ("mha.query.1", "mha.attention_output.0", "own.0", "own.1")} == {"einsum"}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_planned_error_is_that_of_the_layer(framework: str) -> None:
    """Each factorised alone, by what its own answers lose in the model."""
    model = heads(framework)
    for matrix in matrices(model.graph):
        step = sl.LowRank(rank=3, layers=(matrix.layer,), compensate=False, damping=1e-9)
        plan = sl.plan(model, step, DATA)
        (product,) = plan.products
        answers = []
        for each in (model, plan.mask(model)):
            values: list[np.ndarray] = []
            each.adapter.observe(
                each.native, [(X,)], [matrix.output], lambda _, array, v=values: v.append(array.copy())
            )
            answers.append(matrix.results(values[0]))
        before, after = answers
        mean = before.mean(1, keepdims=True) if matrix.bias is not None else 0
        lost = np.square(before - after).sum() / np.square(before - mean).sum()
        assert product.error == pytest.approx(lost, rel=2e-3), matrix.layer


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_at_full_rank_nothing_changes(framework: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from slimline.steps.low_rank import plan as module

    monkeypatch.setattr(module, "_smaller", lambda split, rank: rank == split.most)  # it would pay at no other
    model = heads(framework)
    plan = sl.plan(model, sl.LowRank(energy=1 - 1e-6, damping=1e-6), DATA)
    assert not plan.dense
    same(plan.apply(model), model, 5e-4)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_artifact_computes_it_too(framework: str, tmp_path: Path) -> None:
    small = sl.apply(heads(framework), sl.LowRank(ratio=0.3, scope="local", undo=False), DATA)
    suffix = {"torch": ".pt2", "keras": ".keras", "onnx": ".onnx"}[framework]
    small.save(tmp_path / f"small{suffix}")
    same(sl.load(tmp_path / f"small{suffix}"), small)
    sl.export(small, "onnxruntime", tmp_path / "small-artifact.onnx")
    same(sl.load(tmp_path / "small-artifact.onnx", X[:2]), small)


@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_factors_are_quantized_pruned_and_taught(framework: str) -> None:
    model = heads(framework)
    data = sl.Data(train=X, selection=X, test=X, calibration=(X,), overlap="allow")
    low = sl.LowRank(ratio=0.5, scope="local", undo=False)
    taught = sl.apply(model, [low, sl.Distillation(loss="mse", alpha=1, epochs=2, learning_rate=1e-3)], data)

    def distance(other: sl.Model) -> float:
        return float(np.square(other.predict(X) - model.predict(X)).mean())

    assert distance(taught) < distance(sl.apply(model, low, data))
    rounded = sl.apply(taught, sl.WeightQuantization(dtype="int8"), data)
    assert 0 < float(np.square(rounded.predict(X) - taught.predict(X)).mean()) < 0.01 * float(np.square(X).mean())


def test_a_bias_that_outputs_share_keeps_the_layer() -> None:
    keras_heads()
    import keras

    inputs = keras.Input((TOKENS, WIDTH))
    odd = keras.layers.EinsumDense("abc,cde->aebd", (5, None, 12), bias_axes="e", name="odd")(inputs)
    model = sl.load(keras.Model(inputs, keras.layers.Dense(4, name="head")(odd)))
    plan = sl.plan(model, sl.LowRank(rank=2, criterion="weight"))
    assert plan.dense == {"odd": "its bias is not one number for every output"} and plan.names == ("head",)
