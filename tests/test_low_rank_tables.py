"""Embeddings as shorter rows and a linear layer: done as planned, losing least where rows are looked up most."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.evidence.lookups import frequencies
from slimline.graph.matrix import tables
from slimline.methods.factorization import Factorization
from slimline.steps.low_rank.plan import LowRankPlan

torch = pytest.importorskip("torch")
nn = torch.nn

ROWS, WIDTH, LONG = 40, 16, 7
RNG = np.random.default_rng(3)
OFTEN = RNG.dirichlet(np.full(ROWS - 1, 0.3))  # Zipf-like, and the padding's row 0 beside
TEXTS = np.where(RNG.random((64, LONG)) < 0.2, 0, RNG.choice(np.arange(1, ROWS), (64, LONG), p=OFTEN)).astype(np.int32)
DATA = sl.Data(calibration=(TEXTS,))


class Classifier(nn.Module):
    """Rows with a padding that is zero, and their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(ROWS, WIDTH, padding_idx=0)
        self.mix, self.head = nn.Linear(WIDTH, 20), nn.Linear(20, 3)

    def forward(self, tokens: Any) -> Any:
        return self.head(torch.relu(self.mix(self.words(tokens)).mean(1)))


def torch_texts() -> sl.Model:
    torch.manual_seed(0)
    return sl.load(Classifier().eval(), TEXTS[:2])


def keras_texts() -> sl.Model:
    pytest.importorskip("keras")
    from slimline.frameworks.base import adapter

    adapter("keras")
    import keras

    keras.utils.set_random_seed(0)
    layers = keras.layers
    x = inputs = keras.Input((LONG,), dtype="int32")
    x = layers.Embedding(ROWS, WIDTH, mask_zero=True, name="words")(x)
    x = layers.GlobalAveragePooling1D()(layers.Dense(20, name="mix")(x))  # of what the mask leaves
    return sl.load(keras.Model(inputs, layers.Dense(3, name="head")(x)))


def onnx_texts() -> sl.Model:
    from tests.frameworks.onnx.graphs import ints, model, weights

    body = (
        "a = Gather(words__weight, x) b = MatMul(a, mix__weight) c = ReduceMean<keepdims = 0>(b, axes) "
        "y = Gemm(c, head__weight, head__bias)"
    )
    shapes = {"words__weight": (ROWS, WIDTH), "mix__weight": (WIDTH, 20), "head__weight": (20, 3), "head__bias": (3,)}
    stored = {**weights(**shapes), **ints(axes=[1])}
    return sl.load(model(body, stored, f"int32[N,{LONG}] x"), TEXTS[:2])


@cache
def texts(framework: str) -> sl.Model:
    return {"torch": torch_texts, "keras": keras_texts, "onnx": onnx_texts}[framework]()


def planned(model: sl.Model, **fields: Any) -> LowRankPlan:
    (table,) = tables(model.graph)
    step = sl.LowRank(**{"layers": (table.layer,), "undo": False, **fields})
    plan = sl.plan(model, step, None if step.criterion == "weight" else DATA)
    assert isinstance(plan, LowRankPlan)
    return plan


@pytest.mark.parametrize("criterion", ["output", "weight"])
@pytest.mark.parametrize("framework", ["torch", "keras", "onnx"])
def test_a_table_becomes_shorter_rows_and_a_linear_layer(framework: str, criterion: str) -> None:
    model = texts(framework)
    (table,) = tables(model.graph)
    plan = planned(model, rank=5, criterion=criterion)
    small = plan.apply(model)
    np.testing.assert_allclose(small.predict(TEXTS), plan.mask(model).predict(TEXTS), rtol=1e-4, atol=1e-6)
    assert small.graph.size == plan.parameters == model.graph.size - ROWS * WIDTH + 5 * (ROWS + WIDTH)
    (thin,) = tables(small.graph)
    assert thin.shape == (1, 5, ROWS) and (thin.layer == f"{table.layer}.0" or framework == "onnx")
    assert {thin.weight} < small.graph.trainable

    # The closed form: of the rows, weighed by how often they are looked up, the singular values that go.
    stored = model.parameters()[table.weight].astype(np.float64)
    counts = np.bincount(TEXTS.ravel(), minlength=ROWS) / TEXTS.size
    damped = counts + 1e-3 * counts.mean() if criterion == "output" else np.ones(ROWS)
    values = np.linalg.svd(np.sqrt(damped)[:, None] * stored, compute_uv=False)
    (product,) = plan.products
    assert product.error == pytest.approx((values[5:] ** 2).sum() / (values**2).sum(), rel=1e-6)
    left = stored - plan.mask(model).parameters()[table.weight]
    assert (damped[:, None] * left**2).sum() == pytest.approx((values[5:] ** 2).sum(), rel=1e-4)


@pytest.mark.parametrize("framework", ["torch", "keras", "onnx"])
def test_rows_are_counted_where_they_are_looked_up(framework: str) -> None:
    model = texts(framework)
    (table,) = tables(model.graph)
    counted = frequencies(model, [table], [(TEXTS[:20],), (TEXTS[20:],)])[table.node]
    np.testing.assert_allclose(counted[0] * TEXTS.size, np.bincount(TEXTS.ravel(), minlength=ROWS))


def test_what_is_looked_up_often_loses_less_than_without_data() -> None:
    model = texts("torch")
    (table,) = tables(model.graph)

    def loss(criterion: str) -> float:
        rows = planned(model, rank=5, criterion=criterion).mask(model).parameters()[table.weight]
        return float(np.square(rows[TEXTS] - model.parameters()[table.weight][TEXTS]).mean())

    assert loss("output") < 0.9 * loss("weight")


def test_the_diagonal_is_the_whole_gram_matrix_of_one_hot_rows() -> None:
    weight, often = RNG.normal(size=(1, 6, 9)), RNG.random((1, 9))
    short, whole = (
        Factorization(weight, often, damping=0.01),
        Factorization(weight, often[:, :, None] * np.eye(9), 1, 0.01),
    )
    np.testing.assert_allclose(short.values, whole.values)
    for rank in (1, 4, 6):
        assert short.error(rank) == pytest.approx(whole.error(rank), abs=1e-12)
        np.testing.assert_allclose(short.product(short.factors(rank)), whole.product(whole.factors(rank)), atol=1e-9)
        assert short.error_of(short.product(short.factors(rank))) == pytest.approx(short.error(rank), abs=1e-12)


@pytest.mark.parametrize("framework", ["torch", "keras", "onnx"])
def test_it_shares_a_budget_with_the_other_layers(framework: str) -> None:
    model = texts(framework)
    plan = sl.plan(model, sl.LowRank(target_parameters=0.6, undo=False), DATA)
    (table,) = tables(model.graph)
    assert table.layer in [p.matrix.layer for p in plan.products]
    assert plan.parameters <= 0.6 * model.graph.size
    small = plan.apply(model)
    np.testing.assert_allclose(small.predict(TEXTS), plan.mask(model).predict(TEXTS), rtol=1e-4, atol=1e-5)


def test_the_padding_stays_zero_while_the_rest_learns(tmp_path: Path) -> None:
    model = texts("torch")
    data = sl.Data(train=(TEXTS, TEXTS.max(1) % 3))
    thin = sl.apply(model, sl.LowRank(rank=5, layers=("words",), undo=False), data)
    small = sl.apply(thin, sl.Distillation(epochs=1), data)
    before, after = (each.parameters()["words.0.weight"] for each in (thin, small))
    assert not after[0].any() and np.abs(after - before).max() > 0
    small.save(tmp_path / "small.pt2")
    np.testing.assert_allclose(
        sl.load(tmp_path / "small.pt2").predict(TEXTS), small.predict(TEXTS), rtol=1e-5, atol=1e-6
    )
    integer = sl.apply(small, sl.DynamicQuantization(undo=False))
    agreement = (integer.predict(TEXTS).argmax(1) == small.predict(TEXTS).argmax(1)).mean()
    assert agreement > 0.9 and integer.quantization is not None
    assert integer.quantization.weights.keys() >= {"words.0.weight", "words.1.weight"}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, ROWS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Any) -> Any:
        return self.head(self.mix(self.words(tokens)))


class Twice(Classifier):
    def forward(self, tokens: Any) -> Any:
        return super().forward(tokens) + self.head(self.mix(self.words(tokens.flip(1)))[:, 0])


def keras_tied() -> sl.Model:
    texts("keras")
    import keras

    inputs = keras.Input((LONG,), dtype="int32")
    table = keras.layers.ReversibleEmbedding(ROWS, WIDTH, name="words")
    x = keras.layers.Dense(WIDTH, name="mix")(table(inputs))
    return sl.load(keras.Model(inputs, table(x, reverse=True)))


def onnx_tied() -> sl.Model:
    from tests.frameworks.onnx.graphs import model, weights

    body = "a = Gather(words__weight, x) b = Transpose<perm = [1, 0]>(words__weight) y = MatMul(a, b)"
    return sl.load(model(body, weights(words__weight=(ROWS, WIDTH)), f"int32[N,{LONG}] x"), TEXTS[:2])


ALONE = {
    "torch": lambda: sl.load(Tied().eval(), TEXTS[:2]),
    "keras": keras_tied,
    "onnx": onnx_tied,
}


@pytest.mark.parametrize("framework", ALONE)
def test_a_table_that_an_output_layer_reads_is_refused(framework: str) -> None:
    with pytest.raises(SlimlineError, match="tied to an output layer"):
        planned(ALONE[framework](), rank=3)


def test_other_tables_are_refused_with_the_reason() -> None:
    with pytest.raises(SlimlineError, match="other embeddings look rows up"):
        model = sl.load(Twice().eval(), TEXTS[:2])
        sl.plan(model, sl.LowRank(rank=3, undo=False, layers=("words",)), DATA)
    model = texts("torch")
    with pytest.raises(SlimlineError, match="with undo=False, for size"):
        planned(model, rank=3, undo=True)
    with pytest.raises(SlimlineError, match="no multiply-accumulates that could go"):
        planned(model, target_macs=0.9)
    with pytest.raises(SlimlineError, match="no fewer parameters"):
        planned(model, rank=13)
