"""Layers and models written as classes are opened; masked attention, wrappers and further functions are pruned."""

from __future__ import annotations

import numpy as np
import pytest

from slimline.errors import SlimlineError
from slimline.frameworks.base import adapter
from slimline.frameworks.keras import load as loading
from slimline.graph.plan import Plan
from slimline.graph.units import Units
from slimline.model import Model
from slimline.pruning import plan
from slimline.recipe import ChannelPruning
from tests.zoo_keras import shaken

import keras  # isort: skip
from keras import layers as L  # isort: skip
from keras import ops  # isort: skip

KERAS = adapter("keras")


@keras.saving.register_keras_serializable("tests")
class Feed(L.Layer):
    """Two dense layers of a transformer."""

    def __init__(self, wide: int = 24, **more) -> None:
        super().__init__(**more)
        self.up, self.down = L.Dense(wide, activation="gelu", name="up"), L.Dense(16, name="down")

    def build(self, shape) -> None:
        self.up.build(shape)
        self.down.build((*shape[:-1], self.up.units))

    def call(self, x):
        return self.down(self.up(x))


@keras.saving.register_keras_serializable("tests")
class Encoder(L.Layer):
    """Attention and another composite layer, with bare functions between them."""

    def __init__(self, **more) -> None:
        super().__init__(**more)
        self.attention = L.MultiHeadAttention(4, 4, name="attention")
        self.first, self.second = L.LayerNormalization(name="first"), L.LayerNormalization(name="second")
        self.feed = Feed(name="feed")

    def call(self, x, training=None):
        y = x + self.attention(self.first(x), self.first(x), use_causal_mask=True)
        return ops.add(y, self.feed(self.second(y)))


class Scaled(L.Layer):
    """Holds a layer, and a weight of its own."""

    def __init__(self, **more) -> None:
        super().__init__(**more)
        self.inner = L.Dense(16, name="inner")

    def build(self, shape) -> None:
        self.inner.build(shape)
        self.scale = self.add_weight(shape=(16,), initializer="ones", name="own")

    def get_config(self):
        return super().get_config()

    def call(self, x):
        return self.inner(x) * self.scale


def tokens(body) -> keras.Model:
    x = keras.Input((8, 16))
    y = L.GlobalAveragePooling1D(name="pool")(L.LayerNormalization(name="norm")(body(L.Dense(16, name="embed")(x))))
    return keras.Model(x, L.Dense(5, name="head")(y))


def images(body) -> keras.Model:
    x = keras.Input((8, 8, 3))
    y = body(L.Conv2D(16, 3, padding="same", name="stem")(x))
    return keras.Model(x, L.Dense(5, name="head")(L.GlobalAveragePooling2D()(L.Conv2D(12, 1, name="tail")(y))))


def model_of(source: keras.Model, example=None) -> Model:
    return Model(KERAS, *KERAS.load(shaken(source), example))


def exact(model: Model, found: Plan) -> Model:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, *model.example[0].shape[1:])).astype("float32")
    small, masked = found.apply(model), found.mask(model)
    before, removed, zeroed = (m.predict(x) for m in (model, small, masked))
    assert np.abs(removed - zeroed).max() <= 1e-5 * np.abs(zeroed).max()
    assert np.abs(before - zeroed).max() > 1e-3 * np.abs(before).max()
    return small


FUNCTIONS = {
    "composite layers": lambda: tokens(lambda y: Encoder(name="two")(Encoder(name="one")(y))),
    "a causal mask": lambda: tokens(lambda y: y + L.MultiHeadAttention(4, 4)(y, y, use_causal_mask=True)),
    "a constant mask": lambda: tokens(
        lambda y: y + L.MultiHeadAttention(4, 4)(y, y, attention_mask=np.eye(8, dtype=bool)[None])
    ),
    "a mask that is computed": lambda: tokens(
        lambda y: y + L.MultiHeadAttention(4, 4)(y, y, attention_mask=ops.expand_dims(y[..., 0] < 9, 1))
    ),
    "time steps": lambda: tokens(lambda y: L.TimeDistributed(L.Dense(16, activation="relu", name="step"))(y)),
    "moments": lambda: tokens(
        lambda y: (y - ops.moments(y, [-1], keepdims=True)[0]) / ops.sqrt(ops.moments(y, [-1], keepdims=True)[1] + 1e-3)
    ),
    "repeated vectors": lambda: tokens(
        lambda y: (
            L.RepeatVector(6)(L.GlobalAveragePooling1D()(y))
            + ops.swapaxes(L.Dense(6, name="steps")(ops.swapaxes(y, 1, 2)), 1, 2)
        )
    ),
    "gated halves": lambda: tokens(lambda y: L.Dense(16)(ops.glu(L.Dense(48)(y)))),
    "lengths": lambda: images(lambda y: y / (ops.norm(y, axis=-1, keepdims=True) + 1.0)),
    "unit length": lambda: images(lambda y: L.UnitNormalization()(y) + ops.normalize(y)),
    "spectral norm": lambda: images(lambda y: L.SpectralNormalization(L.Conv2D(16, 1, name="inner"))(y)),
    "resizing": lambda: images(lambda y: L.Resizing(4, 4)(y) + ops.image.resize(ops.max_pool(y, 2), (4, 4))),
    "copies": lambda: images(lambda y: ops.tile(ops.repeat(y, 2, axis=-1), (1, 1, 1, 2))),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_block_is_pruned_exactly(name):
    model = model_of(FUNCTIONS[name]())
    found = plan(model, ChannelPruning(ratio=0.4, factors="all"))
    assert found.parameters <= 0.75 * model.graph.size
    exact(model, found)


def test_an_opened_layer_gives_its_weights_their_place_in_the_users_model(tmp_path):
    model = model_of(FUNCTIONS["composite layers"]())
    again = model_of(FUNCTIONS["composite layers"]())
    assert model.graph.values["one.feed.up/kernel"].shape == (16, 24)
    assert [n.name for n in model.graph.nodes] == [n.name for n in again.graph.nodes]
    small = exact(model, Plan(Units(model.graph), {"one.feed.up": (1, 2), "two.feed.up": (0,)}))
    path = small.save(tmp_path / "small.keras")
    plain = keras.models.load_model(path)  # nothing of the user's classes is left in it
    assert plain.get_layer("one.feed.up").units == 22


def test_a_layer_with_a_weight_of_its_own_stays_whole():
    frozen = {f.name: f.reason for f in Units(model_of(tokens(lambda y: Scaled(name="scaled")(y))).graph).frozen}
    assert frozen["embed (o)"].startswith("Scaled in scaled")


def test_a_shared_composite_layer_is_called_twice():
    feed = Feed(name="feed")
    model = model_of(tokens(lambda y: feed(ops.relu(feed(y)))))
    exact(model, Plan(Units(model.graph), {"feed.up": (0, 5, 7)}))


class Net(keras.Model):
    """A subclassed model."""

    def __init__(self) -> None:
        super().__init__(name="net")
        self.stem, self.norm = L.Conv2D(16, 3, name="stem"), L.BatchNormalization(name="norm")
        self.tail, self.head = L.Conv2D(24, 3, activation="relu", name="tail"), L.Dense(5, name="head")

    def call(self, x, training=None):
        return self.head(ops.mean(self.tail(ops.relu(self.norm(self.stem(x), training=training))), (1, 2)))


def test_a_subclassed_model_is_read_with_its_example():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 8, 8, 3)).astype("float32")
    net = Net()
    wanted = np.asarray(net(x))
    model = Model(KERAS, *KERAS.load(net, (x,)))
    np.testing.assert_allclose(model.predict(x), wanted, rtol=1e-5, atol=1e-6)
    exact(model, Plan(Units(model.graph), {"stem": (1, 2), "tail": (0, 9)}))
    with pytest.raises(SlimlineError, match=r"subclassed keras.Model, .* give example_inputs"):
        loading.load(net, None)
