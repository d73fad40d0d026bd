"""Recurrent layers: a hidden position is the same one in every gate, in every state and both ways."""

from __future__ import annotations

import numpy as np
import pytest

from slimline.graph.units import Units
from slimline.plans import Plan
from tests.frameworks.keras.blocks import agree, exact, frozen, model_of, pruned, series, words

import keras  # isort: skip
from keras import layers as L  # isort: skip
from keras import ops  # isort: skip


@keras.saving.register_keras_serializable("tests")
class Cell(L.Layer):
    """A cell of a user's own."""

    def __init__(self, units: int, **more) -> None:
        super().__init__(**more)
        self.units = self.state_size = units

    def build(self, shape) -> None:
        self.kernel = self.add_weight(shape=(shape[-1], self.units), name="kernel")

    def call(self, x, states):
        h = ops.matmul(x, self.kernel) + states[0]
        return h, [h]

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def encoder_decoder() -> keras.Model:
    left, right = keras.Input((7, 6)), keras.Input((5, 6))
    _, *state = L.LSTM(12, return_state=True, name="encoder")(left)
    y = L.LSTM(12, return_sequences=True, name="decoder")(right, initial_state=state)
    return keras.Model([left, right], L.Dense(4)(y))


def convolutional() -> keras.Model:
    x = keras.Input((4, 8, 8, 3))
    y = L.ConvLSTM2D(8, 3, padding="same", return_sequences=True, name="first")(x)
    y = L.ConvLSTM2D(12, 3, strides=2, name="second")(y)
    return keras.Model(x, L.Dense(3)(L.GlobalAveragePooling2D()(y)))


def films() -> keras.Model:
    x = keras.Input((4, 8, 8, 3))
    net = keras.Sequential([L.Input((8, 8, 3)), L.Conv2D(12, 3), L.BatchNormalization(), L.Flatten(), L.Dense(10)])
    y = L.TimeDistributed(net, name="each")(L.TimeDistributed(L.ReLU())(x))
    return keras.Model(x, L.Dense(3)(L.GRU(7)(y)))


MODELS = {
    "lstm": lambda: series(L.LSTM(16)),
    "stacked": lambda: series(lambda y: L.LSTM(9)(L.GRU(16, return_sequences=True)(y))),
    "gru, one bias": lambda: series(L.GRU(16, reset_after=False, go_backwards=True)),
    "simple, no bias": lambda: series(L.SimpleRNN(16, use_bias=False)),
    "states, not zero at zero": lambda: series(
        lambda y: ops.concatenate(L.LSTM(16, return_state=True, activation="sigmoid")(y), axis=-1)
    ),
    "dropout": lambda: series(L.LSTM(16, dropout=0.2, recurrent_dropout=0.1)),
    "cells": lambda: series(L.RNN([L.LSTMCell(16), L.GRUCell(10), L.SimpleRNNCell(8)])),
    "one cell": lambda: series(L.RNN(L.LSTMCell(16))),
    "both ways": lambda: series(L.Bidirectional(L.LSTM(16))),
    "added": lambda: series(L.Bidirectional(L.LSTM(16), merge_mode="sum")),
    "two kinds": lambda: series(L.Bidirectional(L.LSTM(16), backward_layer=L.GRU(16, go_backwards=True))),
    "all steps": lambda: series(
        lambda y: L.GlobalMaxPooling1D()(L.Bidirectional(L.GRU(16, return_sequences=True), merge_mode="ave")(y))
    ),
    "all that they give": lambda: series(
        lambda y: ops.concatenate(L.Bidirectional(L.LSTM(16, return_state=True), merge_mode=None)(y), axis=-1)
    ),
    "padding": lambda: words(lambda y: L.Bidirectional(L.LSTM(8))(L.LSTM(16, return_sequences=True)(y))),
    "encoder and decoder": encoder_decoder,
    "convolutional": convolutional,
    "films": films,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_recurrent_layer_is_pruned_exactly(name):
    source = MODELS[name]()
    model = model_of(source)
    agree(source, model)
    assert not any(node.kind == "unknown" for node in model.graph.nodes)
    pruned(model)


def test_a_hidden_position_takes_its_part_of_every_gate_with_it():
    model = model_of(series(L.LSTM(6, name="lstm")))
    small = exact(model, Plan(Units(model.graph), {"lstm": (1, 4)}))
    stay = [gate * 6 + h for gate in range(4) for h in (0, 2, 3, 5)]
    before, after = model.parameters(), small.parameters()
    kernel, recurrent = "lstm/lstm_cell/kernel", "lstm/lstm_cell/recurrent_kernel"
    np.testing.assert_array_equal(after[kernel], before[kernel][:, stay])
    np.testing.assert_array_equal(after[recurrent], before[recurrent][[0, 2, 3, 5]][:, stay])


def test_stacked_cells_that_read_fewer_numbers_keep_their_names():
    model = model_of(series(lambda y: L.RNN([L.LSTMCell(6), L.GRUCell(5)])(L.Dense(8, name="before")(y))))
    small = exact(model, Plan(Units(model.graph), {"before": (1, 4)}))
    assert list(small.parameters()) == list(model.parameters())


def test_a_layer_called_twice_has_one_width():
    shared = L.GRU(12, return_sequences=True, name="shared")
    model = model_of(series(lambda y: L.GRU(5)(shared(L.Dense(12, name="between")(shared(L.Dense(12)(y)))))))
    pruned(model)


def test_multiply_accumulates_are_those_of_every_step():
    model = model_of(series(L.LSTM(6, name="lstm")))
    (node,) = (n for n in model.graph.nodes if n.kind == "recurrent")
    from slimline.graph.cost import node_macs

    assert node_macs(node, lambda name: model.graph.values[name].shape) == 2 * 8 * 4 * 6 * (16 + 6)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (lambda: L.RNN(Cell(12), name="odd"), "no rule for the cell Cell"),
        (lambda: L.SimpleRNN(12, activation="softmax", name="odd"), "does not know the function 'softmax'"),
    ],
)
def test_what_a_cell_does_that_is_not_known_is_frozen(body, says):
    assert says in frozen(model_of(series(body())))["embed (o)"]
    x = keras.Input(batch_shape=(2, 8, 16))
    kept = L.GRU(4, stateful=True, name="kept")(L.Dense(16, name="embed")(x))
    model = model_of(keras.Model(x, L.Dense(3)(kept)))
    assert "keeps its state from batch to batch" in frozen(model)["embed (o)"]


def test_first_states_that_the_model_is_given_keep_their_width():
    x, state = keras.Input((8, 16)), keras.Input((12,))
    y = L.GRU(12, name="gru")(L.Dense(16, name="embed")(x), initial_state=[state])
    model = model_of(keras.Model([x, state], L.Dense(3)(y)))
    units = {u.name for u in Units(model.graph).units}
    assert units == {"embed"}
