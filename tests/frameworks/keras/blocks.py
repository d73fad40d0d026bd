"""Small models around a body, and the test that a plan does what it says."""

from __future__ import annotations

import numpy as np

from slimline.frameworks.base import adapter
from slimline.graph.units import Units
from slimline.model import Model
from slimline.plans import Plan
from slimline.steps.channels.selection import plan
from slimline.steps.channels.step import ChannelPruning
from tests.zoo_keras import shaken

import keras  # isort: skip
from keras import layers as L  # isort: skip

KERAS = adapter("keras")


def tokens(body) -> keras.Model:
    """Sequences of eight vectors; `body` keeps the rank."""
    return series(lambda y: L.GlobalAveragePooling1D(name="pool")(L.LayerNormalization(name="norm")(body(y))))


def series(body) -> keras.Model:
    """Sequences of eight vectors; `body` gives one."""
    x = keras.Input((8, 16))
    return keras.Model(x, L.Dense(5, name="head")(body(L.Dense(16, name="embed")(x))))


def words(body) -> keras.Model:
    """Eight words, of which 0 is padding; `body` gives one vector."""
    x = keras.Input((8,), dtype="int32")
    return keras.Model(x, L.Dense(5, name="head")(body(L.Embedding(30, 16, mask_zero=True, name="embed")(x))))


def images(body) -> keras.Model:
    """Images of 8 x 8 with 16 channels; `body` keeps the rank."""
    x = keras.Input((8, 8, 3))
    y = body(L.Conv2D(16, 3, padding="same", name="stem")(x))
    return keras.Model(x, L.Dense(5, name="head")(L.GlobalAveragePooling2D()(L.Conv2D(12, 1, name="tail")(y))))


def model_of(source: keras.Model, example=None) -> Model:
    """The model, taken in."""
    return Model(KERAS, *KERAS.load(shaken(source), example))


def inputs(model: Model) -> tuple[np.ndarray, ...]:
    """Three samples that are not the example; integers end in padding."""
    rng = np.random.default_rng(0)
    made = []
    for x in model.example:
        shape = (3, *x.shape[1:])
        number = rng.integers(1, 30, shape) * (np.arange(shape[-1]) < [[4], [8], [6]]) if x.dtype.kind == "i" else None
        made.append((rng.normal(size=shape) if number is None else number).astype(x.dtype))
    return tuple(made)


def exact(model: Model, found: Plan) -> Model:
    """What is left, which computes what the masked model does and has the parameters that the plan says."""
    x = inputs(model)
    small, masked = found.apply(model), found.mask(model)
    before, removed, zeroed = (m.predict(*x) for m in (model, small, masked))
    assert np.abs(removed - zeroed).max() <= 1e-5 * np.abs(zeroed).max()
    assert np.abs(before - zeroed).max() > 1e-3 * np.abs(before).max()
    assert small.graph.size == found.parameters < model.graph.size
    return small


def pruned(model: Model, less: float = 0.25) -> Model:
    """The model pruned at 40 % of every unit, exactly, and by at least `less` of its parameters."""
    found = plan(model, ChannelPruning(ratio=0.4, factors="all"))
    assert found.parameters <= (1 - less) * model.graph.size, str(found)
    return exact(model, found)


def frozen(model: Model) -> dict[str, str]:
    """Axes of weights that cannot go, with the reason."""
    return {f.name: f.reason for f in Units(model.graph).frozen}


def agree(source: keras.Model, model: Model) -> None:
    """The model taken in computes what its source does, padding and all."""
    x = inputs(model)
    np.testing.assert_allclose(model.predict(*x), source(list(x) if len(x) > 1 else x[0]), rtol=1e-4, atol=1e-5)
