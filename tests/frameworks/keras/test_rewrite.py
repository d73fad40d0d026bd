"""Plans carried out on Keras models: the smaller model computes what the masked one does."""

from __future__ import annotations

import numpy as np
import pytest

from slimline.basics.errors import SlimlineError
from slimline.frameworks.keras import adapter
from slimline.graph.edits import PutTensors
from slimline.graph.units import Units
from slimline.model import Model
from slimline.plans import Plan
from slimline.steps.channels.selection import plan
from slimline.steps.channels.step import ChannelPruning
from tests import zoo_keras

import keras  # isort: skip
from keras import layers as L  # isort: skip
from keras import ops  # isort: skip

SLOW = {"ResNet50", "ResNet50V2", "DenseNet121", "EfficientNetB0", "VGG16"}


def load(native: keras.Model) -> Model:
    return Model(adapter, *adapter.load(zoo_keras.shaken(native), None))


def inputs(model: Model) -> tuple[np.ndarray, ...]:
    """Inputs that are not the example."""
    random = np.random.default_rng(1)
    return tuple(
        random.integers(0, 20, a.shape).astype(a.dtype)
        if a.dtype.kind == "i"
        else random.normal(size=a.shape).astype(a.dtype)
        for a in model.example
    )


def assert_exact(model: Model, plan: Plan) -> Model:
    """`apply` equals `mask`, both differ from the original, and the plan's sizes are the model's."""
    small, masked, x = plan.apply(model), plan.mask(model), inputs(model)
    before, wanted, found = model.predict(*x), masked.predict(*x), small.predict(*x)
    scale = np.abs(wanted).max()
    assert scale > 0
    assert np.abs(wanted - found).max() <= 1e-4 * scale
    assert np.abs(wanted - before).max() > 1e-4 * scale
    assert small.graph.size == plan.parameters < model.graph.size
    for name in small.graph.parameters:
        assert small.graph.values[name].shape == plan.shape(name), name
    return small


def assert_useful(small: Model, tmp_path: object) -> None:
    """It saves, loads equal, and every weight still learns."""
    path = small.save(tmp_path / "small.keras")  # type: ignore[operator]
    again, _, metadata = adapter.open(path, False)
    x = inputs(small)
    np.testing.assert_array_equal(adapter.outputs(again, x)[0], small.predict(*x))
    assert metadata["history"][-1]["step"] == "prune"
    native = small.native
    before = [np.array(v) for v in native.trainable_variables]
    target = np.random.default_rng(2).normal(size=small.predict(*x).shape)
    native.compile("sgd", "mse", run_eagerly=True)
    native.train_on_batch(list(x) if len(x) > 1 else x[0], target)
    moved = [not np.array_equal(a, b) for a, b in zip(before, native.trainable_variables, strict=True)]
    assert all(np.isfinite(v).all() for v in map(np.array, native.trainable_variables))
    assert np.mean(moved) > 0.7  # a bias before a normalisation has no gradient


@pytest.mark.parametrize("factors", ["largest", "all"])
@pytest.mark.parametrize("name", zoo_keras.SMALL)
def test_small_models(name: str, factors: str, tmp_path: object) -> None:
    model = load(zoo_keras.SMALL[name]())
    for ratio in (0.3, 0.6):
        step = ChannelPruning(ratio=ratio, criterion="random", factors=factors)  # type: ignore[arg-type]
        small = assert_exact(model, plan(model, step, seed=int(10 * ratio)))
    if factors == "all":
        assert_useful(small, tmp_path)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in zoo_keras.APPLICATIONS]
)
def test_applications(name: str, tmp_path: object) -> None:
    model = load(zoo_keras.APPLICATIONS[name]())
    for ratio in (0.3, 0.6):
        small = assert_exact(model, plan(model, ChannelPruning(ratio=ratio, criterion="random")))
    assert_useful(small, tmp_path)


def by_hand(model: Model, **removed: tuple[int, ...]) -> Plan:
    return Plan(Units(model.graph), {name.replace("__", "."): gone for name, gone in removed.items()})


def test_layer_norm_takes_its_statistics_over_what_stays() -> None:
    x = keras.Input((6,))
    y = L.Dense(8, name="wide")(x)
    model = load(keras.Model(x, L.Dense(3, name="out")(L.LayerNormalization(name="norm", epsilon=1e-3)(y))))
    plan = by_hand(model, wide=(1, 4, 5))
    w = model.parameters()
    (data,) = inputs(model)
    stay = [0, 2, 3, 6, 7]
    hidden = (data @ w["wide/kernel"] + w["wide/bias"])[:, stay]
    normal = (hidden - hidden.mean(1, keepdims=True)) / np.sqrt(hidden.var(1, keepdims=True) + 1e-3)
    normal = normal * w["norm/gamma"][stay] + w["norm/beta"][stay]
    wanted = normal @ w["out/kernel"][stay] + w["out/bias"]
    np.testing.assert_allclose(plan.mask(model).predict(data), wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(plan.apply(model).predict(data), wanted, rtol=1e-4, atol=1e-5)


def test_attention_keeps_its_scale_when_the_head_width_shrinks() -> None:
    x = keras.Input((5, 6))
    model = load(keras.Model(x, L.MultiHeadAttention(2, 8, name="attention")(x, x)))
    units = Units(model.graph).units
    unit = next(u for u in units if ("attention.query/kernel", 2) in u.carriers)
    gone = (0, 3, 4)
    plan = Plan(Units(model.graph), {unit.name: gone})
    w = model.parameters()
    stay = [d for d in range(8) if d not in gone]
    (data,) = inputs(model)

    def project(name: str, part: object = slice(None)) -> np.ndarray:
        kernel, bias = w[f"attention.{name}/kernel"], w[f"attention.{name}/bias"]
        return (np.einsum("btc,chd->bthd", data, kernel) + bias)[..., part]

    q, k, v = project("query", stay), project("key", stay), project("value")
    scores = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(8)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("bhts,bshd->bthd", weights, v)
    wanted = np.einsum("bthd,hdc->btc", mixed, w["attention.attention_output/kernel"])
    wanted += w["attention.attention_output/bias"]
    np.testing.assert_allclose(plan.apply(model).predict(data), wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(plan.mask(model).predict(data), wanted, rtol=1e-4, atol=1e-5)


def test_indices_of_slices_and_takes_are_counted_anew() -> None:
    x = keras.Input((4,))
    y = L.Dense(12, name="wide")(x)
    y = ops.concatenate([y[:, 1:9:3], ops.take(y, [11, 2, 5], axis=-1), y[:, -2:]], axis=-1)
    model = load(keras.Model(x, L.Dense(2, name="out")(y)))
    units = Units(model.graph)
    plan = Plan(units, {units.units[0].name: tuple(range(0, units.units[0].size, 2))})
    assert_exact(model, plan)


def test_a_dense_layer_is_pruned_as_its_matrices_say() -> None:
    x = keras.Input((4,))
    model = load(keras.Model(x, L.Dense(2, name="out")(L.Dense(6, activation="relu", name="wide")(x))))
    small = by_hand(model, wide=(0, 5)).apply(model)
    w = model.parameters()
    np.testing.assert_array_equal(small.parameters()["wide/kernel"], w["wide/kernel"][:, 1:5])
    np.testing.assert_array_equal(small.parameters()["wide/bias"], w["wide/bias"][1:5])
    np.testing.assert_array_equal(small.parameters()["out/kernel"], w["out/kernel"][1:5])


def test_replace_puts_arrays_in_a_copy() -> None:
    model = load(zoo_keras.vit())
    before = model.parameters()
    new = {name: before[name] * 2 for name in ("mlp0a/kernel", "add/constant") if name in before}
    constant = next(name for name in before if name.endswith("/constant"))
    new[constant] = before[constant] + 1
    copy = model.edit(PutTensors(new))
    after = adapter.parameters(copy)
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], new.get(name, array))
        np.testing.assert_array_equal(model.parameters()[name], array)


@pytest.mark.parametrize(
    ("name", "shape", "says"), [("first/kernl", (1,), "first/kernel"), ("first/bias", (3,), "(12,)")]
)
def test_replace_refuses_strangers(name: str, shape: tuple[int, ...], says: str) -> None:
    native, _ = adapter.load(zoo_keras.sequential(), None)
    with pytest.raises(SlimlineError, match=says.replace("(", r"\(").replace(")", r"\)")):
        adapter.edit(native, (PutTensors({name: np.zeros(shape, "float32")}),), ())
