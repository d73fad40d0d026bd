"""Taking a Keras model in: canonical form, no change to the user's model, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from slimline.basics.errors import SlimlineError
from slimline.frameworks.keras import adapter
from slimline.frameworks.keras.functional import calls
from tests import zoo_keras

import keras  # isort: skip
from keras import layers as L  # isort: skip


def names(model: keras.Model) -> list[str]:
    return [call.name for call in calls(model)]


def test_nested_models_activations_and_shared_layers_are_unfolded() -> None:
    native, _ = adapter.load(zoo_keras.nested(), None)
    expected = {"stem", "inner.conv", "inner.conv.activation", "inner.conv@1", "inner.conv.activation@1"}
    assert expected <= set(names(native))
    assert not any(isinstance(call.operation, keras.Model) for call in calls(native))


def test_canonical_form_of_a_canonical_model_is_itself() -> None:
    native, example = adapter.load(zoo_keras.vit(), None)
    again, _ = adapter.load(native, example)
    assert names(native) == names(again)
    assert list(adapter.parameters(native)) == list(adapter.parameters(again))


def test_attention_is_decomposed_and_computes_the_same() -> None:
    model = zoo_keras.shaken(zoo_keras.vit())
    native, example = adapter.load(model, None)
    assert "attention0.scores" in names(native)
    assert not any(isinstance(call.operation, L.MultiHeadAttention) for call in calls(native))
    np.testing.assert_allclose(adapter.outputs(native, example)[0], model(example[0]), atol=1e-5)


def test_attention_that_gives_its_scores_is_opened() -> None:
    x = keras.Input((6, 8))
    y, scores = L.MultiHeadAttention(2, 4, name="attention")(x, x, return_attention_scores=True)
    model = keras.Model(x, [L.Dense(3)(y), scores])
    native, example = adapter.load(model, None)
    assert not [n.label for n in adapter.read(native, example).nodes if n.kind == "unknown"]
    for found, wanted in zip(native(example[0]), model(example[0]), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_masks_of_embeddings_are_kept() -> None:
    words = keras.Input((5,), dtype="int32")
    x = L.LSTM(4)(L.Embedding(9, 6, mask_zero=True)(words))
    model = keras.Model(words, L.Dense(2)(x))
    native, _ = adapter.load(model, None)
    some = np.array([[1, 2, 0, 0, 0], [3, 4, 5, 0, 0]], "int32")
    np.testing.assert_allclose(adapter.outputs(native, (some,))[0], model(some), atol=1e-6)


def test_the_users_model_is_not_touched() -> None:
    model = zoo_keras.shaken(zoo_keras.nested())
    weights = [np.array(w) for w in model.get_weights()]
    nodes = [(layer.name, len(layer._inbound_nodes)) for layer in model.layers]
    adapter.load(model, None)
    assert [(layer.name, len(layer._inbound_nodes)) for layer in model.layers] == nodes
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


def test_frozen_layers_stay_frozen() -> None:
    model = zoo_keras.sequential()
    model.get_layer("first").trainable = False
    native, example = adapter.load(model, None)
    graph = adapter.read(native, example)
    assert "first/kernel" in graph.frozen
    assert "second/kernel" in graph.trainable - graph.frozen
    assert "first/kernel" not in {v.path for v in native.trainable_variables}


def test_examples_are_made_from_the_input_shapes() -> None:
    _, example = adapter.load(zoo_keras.lstm(), None)
    assert [(a.shape, a.dtype) for a in example] == [((2, 7), np.dtype("int32"))]


class Subclassed(keras.Model):
    """A model whose graph cannot be read."""

    def call(self, x: object) -> object:
        return x


class Forgetful(L.Layer):
    """A layer whose config leaves out what it computes."""

    def __init__(self, factor: float = 1.0, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.factor = factor

    def call(self, x: object) -> object:
        return tf.multiply(x, self.factor)

    def get_config(self) -> dict[str, object]:
        return {"name": self.name}


class Uncopyable(L.Layer):
    """A layer that cannot be made without an argument that its config does not give."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def call(self, x: object) -> object:
        return tf.multiply(x, self.factor)

    def get_config(self) -> dict[str, object]:
        return {"other": 1}


def one_layer(layer: L.Layer) -> keras.Model:
    x = keras.Input((4,))
    return keras.Model(x, L.Dense(2)(layer(x)))


def with_nan() -> keras.Model:
    model = zoo_keras.sequential()
    variable = model.get_layer("second").kernel
    variable.assign(np.full(variable.shape, np.nan))
    return model


@pytest.mark.parametrize(
    ("make", "example", "says"),
    [
        (Subclassed, None, "functional API"),
        (lambda: keras.Sequential([L.Dense(2)]), None, "has not been built"),
        (with_nan, None, "second/kernel"),
        (lambda: one_layer(Forgetful(3.0)), None, "get_config"),
        (lambda: one_layer(Uncopyable(3.0)), None, "get_config"),
        (lambda: keras.Sequential([L.Input((None, None, 3)), L.Conv2D(2, 3)]), None, "unknown sizes"),
        (zoo_keras.sequential, (np.zeros((2, 12, 12, 1), "float32"),), "(2, 12, 12, 1)"),
        (zoo_keras.shared, (np.zeros((2, 10), "float32"),), "takes 2 inputs"),
        (zoo_keras.lstm, (np.zeros((2, 7), "float32"),), "int32"),
    ],
)
def test_what_is_refused_is_refused_in_one_sentence(make: object, example: object, says: str) -> None:
    with pytest.raises(SlimlineError) as error:
        adapter.load(make(), example)  # type: ignore[operator]
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_that_cannot_be_called_is_a_sentence() -> None:
    words = keras.Input((5,), dtype="int32")
    model = keras.Model(words, L.Softmax()(L.Embedding(9, 6, mask_zero=True)(words)))
    with pytest.raises(SlimlineError, match="cannot be called with its example inputs") as refused:
        adapter.load(model, (np.ones((2, 5), "int32"),))
    assert str(refused.value).isprintable()


def test_what_is_not_finite_for_the_example_is_no_hidden_state() -> None:
    x = keras.Input((4,))
    model = keras.Model(x, keras.ops.log(L.Dense(3, bias_initializer=keras.initializers.Constant(-9.0))(x)))
    native, example = adapter.load(model, None)
    assert np.isnan(model(example[0])).any()
    np.testing.assert_array_equal(adapter.outputs(native, example)[0], model(example[0]))
