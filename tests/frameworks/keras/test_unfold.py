"""Layers and models written as classes are opened; masked attention, wrappers and further functions are pruned."""

from __future__ import annotations

import numpy as np
import pytest

from slimline.basics.errors import SlimlineError
from slimline.frameworks.keras import load as loading
from slimline.graph.units import Units
from slimline.model import Model
from slimline.plans import Plan
from slimline.steps.channels.selection import plan
from slimline.steps.channels.step import ChannelPruning
from tests.frameworks.keras.blocks import KERAS, agree, exact, frozen, images, model_of, pruned, tokens

import keras  # isort: skip
from keras import layers as L  # isort: skip
from keras import ops  # isort: skip


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


class Positions(L.Layer):
    """Adds a table of positions, as wide as its input, times a weight."""

    def build(self, shape) -> None:
        self.table = self.add_weight(shape=(12, shape[-1]), name="table")
        self.factors = [self.add_weight(shape=(1,), initializer="ones", name="factor")]

    def call(self, x):
        return x + self.factors[0] * ops.slice(self.table, (0, 0), (x.shape[1], x.shape[-1]))


class Twice(L.Layer):
    """Composite layers in a composite layer, of which the second gives what is no tensor, too."""

    def __init__(self, **more) -> None:
        super().__init__(**more)
        self.one, self.two, self.places = Feed(name="one"), Gated(name="two"), Positions(name="places")

    def call(self, x, training=None):
        y, _ = self.two(self.one(self.places(x)), training=training)
        return x + y


class WithClass(L.Layer):
    """A token in front of every sequence, which is then cut off again."""

    def build(self, shape) -> None:
        self.token = self.add_weight(shape=(1, 1, shape[-1]), initializer="normal", name="token")

    def call(self, x):
        batch, length, width = ops.shape(x)
        token = ops.broadcast_to(self.token, (batch, 1, width))
        y = ops.concatenate([token, x, ops.tile(self.token, (batch, 1, 1))], axis=1)
        y = ops.reshape(y, (batch, length + 2, 2, width // 2))
        return ops.reshape(ops.softmax(y, axis=1), (batch, length + 2, width))[:, 1:-1]


class Noisy(L.Layer):
    """Does something else in training."""

    def call(self, x, training=None):
        return x * 2 + ops.sum(x, axis=-1, keepdims=True) if training else x * 2


class Mixed(L.Layer):
    """Leaves Keras."""

    def call(self, x):
        import tensorflow as tf

        return tf.nn.relu(x)


class Random(L.Layer):
    """Keeps a random state."""

    def __init__(self, **more) -> None:
        super().__init__(**more)
        self.seeds = keras.random.SeedGenerator(0)

    def call(self, x):
        return x * 2


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
    pruned(model_of(FUNCTIONS[name]()))


def test_an_opened_layer_gives_its_weights_their_place_in_the_users_model(tmp_path):
    model = model_of(FUNCTIONS["composite layers"]())
    again = model_of(FUNCTIONS["composite layers"]())
    assert model.graph.values["one.feed.up/kernel"].shape == (16, 24)
    assert [n.name for n in model.graph.nodes] == [n.name for n in again.graph.nodes]
    small = exact(model, Plan(Units(model.graph), {"one.feed.up": (1, 2), "two.feed.up": (0,)}))
    path = small.save(tmp_path / "small.keras")
    plain = keras.models.load_model(path)  # nothing of the user's classes is left in it
    assert plain.get_layer("one.feed.up").units == 22


def test_weights_of_a_layers_own_are_parameters_under_their_names(tmp_path):
    source = tokens(lambda y: Scaled(name="scaled")(y))
    model = model_of(source)
    assert model.graph.values["scaled.scale/value"].shape == (16,)
    assert "scaled.scale/value" in model.graph.trainable
    found = plan(model, ChannelPruning(ratio=0.4))
    small = exact(model, found)
    assert small.graph.values["scaled.scale/value"].shape == small.graph.values["scaled.inner/bias"].shape != (16,)
    again, _, _ = KERAS.open(small.save(tmp_path / "small.keras"), False)
    np.testing.assert_array_equal(KERAS.outputs(again, model.example)[0], small.predict(*model.example))
    assert source.get_layer("scaled").scale.shape == (16,)  # its attributes are variables again


@pytest.mark.parametrize("kind", [Noisy, Mixed, Random])
def test_a_layer_that_is_more_than_it_computes_stays_whole(kind):
    model = model_of(tokens(lambda y: kind(name="odd")(y)))
    reason = next(f.reason for f in Units(model.graph).frozen if f.name == "embed (o)")
    assert reason.startswith(f"{kind.__name__} in odd")


@keras.saving.register_keras_serializable("tests")
class DropPath(L.Layer):
    """Stochastic depth, as the examples of Keras have it; with `width` its noise has a size of its own."""

    def __init__(self, width: int | None = None, **more) -> None:
        super().__init__(**more)
        self.width, self.seeds = width, keras.random.SeedGenerator(0)

    def get_config(self):
        return {**super().get_config(), "width": self.width}

    def call(self, x, training=None):
        if not training:
            return x
        shape = (ops.shape(x)[0], 1, self.width or 1)
        return x * ops.floor(0.8 + keras.random.uniform(shape, seed=self.seeds)) / 0.8


def test_a_layer_that_only_acts_in_training_passes_axes():
    model = model_of(tokens(lambda y: y + DropPath(name="drop")(L.Dense(16)(y))))
    small = pruned(model)
    x, y = np.random.default_rng(0).normal(size=(12, 8, 16)).astype("float32"), np.arange(12) % 5
    trained = small.native
    trained.compile(optimizer="sgd", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    before = trained.get_layer("embed").kernel.numpy()
    trained.fit(x, y, verbose=0)
    assert not np.array_equal(before, trained.get_layer("embed").kernel.numpy())


def test_one_whose_noise_has_a_size_of_its_own_stays_whole():
    reasons = frozen(model_of(tokens(lambda y: y + DropPath(16, name="drop")(L.Dense(16)(y)))))
    assert "DropPath in drop" in reasons["embed (o)"]


def test_layers_inside_layers_are_followed_with_their_paths():
    model = model_of(tokens(lambda y: Twice(name="twice")(y)))
    assert {"twice.one.up/kernel", "twice.two.up/kernel", "twice.two.scale/value"} <= set(model.graph.parameters)
    pruned(model)


def test_a_batch_that_a_layer_asks_for_stays_open():
    source = tokens(lambda y: WithClass(name="with_class")(y))
    model = model_of(source)
    agree(source, model)
    assert model.native.inputs[0].shape[0] is None
    pruned(model)


def test_a_layer_that_asks_for_open_sizes_gets_those_of_the_example():
    x = keras.Input((None, 16))
    y = WithClass(name="with_class")(L.Dense(16, name="embed")(x))
    source = keras.Model(x, L.Dense(5)(L.GlobalAveragePooling1D()(y)))
    model = model_of(source, (np.random.default_rng(0).normal(size=(2, 8, 16)).astype("float32"),))
    assert model.native.inputs[0].shape == (None, 8, 16)
    pruned(model, 0.2)
    plain = keras.Model(x, L.Dense(5)(L.GlobalAveragePooling1D()(L.Dense(16)(x))))
    assert model_of(plain, model.example).native.inputs[0].shape == (None, None, 16)


def test_an_activation_of_a_users_own_is_what_it_calls():
    def squared(x):
        return ops.square(ops.relu(x)) + 0.1

    source = tokens(lambda y: L.Activation(squared)(L.Dense(24, activation=squared, name="wide")(y)))
    model = model_of(source)
    agree(source, model)
    pruned(model)


def test_a_shared_composite_layer_is_called_twice():
    feed = Feed(name="feed")
    model = model_of(tokens(lambda y: feed(ops.relu(feed(y)))))
    exact(model, Plan(Units(model.graph), {"feed.up": (0, 5, 7)}))


class Gated(L.Layer):
    """A composite layer with a weight of its own, which gives more than a tensor."""

    def __init__(self, **more) -> None:
        super().__init__(**more)
        self.up, self.drop = L.Dense(16, name="up"), L.Dropout(0.1, name="drop")

    def build(self, shape) -> None:
        self.up.build(shape)
        self.scale = self.add_weight(shape=(16,), initializer="ones", name="scale")

    def call(self, x, training=None):
        return self.drop(self.scale * ops.sigmoid(self.up(x)), training=training), None


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
