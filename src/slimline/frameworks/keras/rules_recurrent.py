"""Recurrent layers: one rule for all, from the cells that they run.

A position of the hidden width is the same one in every gate, in the output and in every state. Where its weights are
gone it feeds nothing, whatever the masked model computes there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras.src.layers.rnn.conv_lstm import ConvLSTM, ConvLSTMCell  # they have no public name

from slimline.frameworks.keras.functional import Call
from slimline.frameworks.keras.reader import NoRule, Reader
from slimline.frameworks.keras.rules_layers import ELEMENTWISE_ACTIVATIONS, Rule, last_channels
from slimline.graph.recurrent import chain

L = keras.layers

GATES: Mapping[type, int] = {L.SimpleRNNCell: 1, L.GRUCell: 3, L.LSTMCell: 4, ConvLSTMCell: 4}
LAYERS = (L.RNN, L.SimpleRNN, L.GRU, L.LSTM, L.ConvLSTM1D, L.ConvLSTM2D, L.ConvLSTM3D)


def cells_of(layer: Any) -> list[Any]:
    """The cells of a recurrent layer, the one that reads its input first."""
    return list(layer.cell.cells) if type(layer.cell) is L.StackedRNNCells else [layer.cell]


def recurrent(reader: Reader, call: Call) -> None:
    """A recurrent layer over Keras' own cells."""
    layer = call.operation
    cells = cells_of(layer)
    if layer.stateful:
        raise NoRule("it keeps its state from batch to batch")
    for cell in cells:
        if type(cell) not in GATES:
            raise NoRule(f"slimline has no rule for the cell {type(cell).__name__}")
        for function in (cell.activation, getattr(cell, "recurrent_activation", cell.activation)):
            name = getattr(function, "__name__", type(function).__name__)
            if name not in ELEMENTWISE_ACTIVATIONS or getattr(keras.activations, name, None) is not function:
                raise NoRule(f"slimline does not know the function {name!r}")
    if isinstance(layer, ConvLSTM):
        last_channels(layer)
    arguments = dict(zip(("sequences", "initial_state", "mask"), call.args, strict=False)) | dict(call.kwargs)
    mask = arguments.get("mask")
    states = [t for t in keras.tree.flatten(arguments.get("initial_state")) if t is not None]
    if any(not isinstance(t, keras.KerasTensor) for t in states) or isinstance(mask, np.ndarray):
        raise NoRule("slimline has no rule for constant first states or a constant mask")
    stored: list[str | None] = []
    for cell in cells:
        stored += [reader.parameter(v) for v in (cell.kernel, cell.recurrent_kernel, cell.bias)]
    attributes = chain(
        [(GATES[type(c)], 1 if c.bias is None else len(c.bias.shape), _states(c)) for c in cells],
        spatial=len(reader.shape(call.inputs[0])) - 3,
        sequences=layer.return_sequences,
        masked=mask is not None,
        initial_states=bool(states),
        stateful=layer.return_state,
    )
    inputs = [reader.name(call.inputs[0]), *stored, None if mask is None else reader.name(mask)]
    reader.node(call, "recurrent", [*inputs, *map(reader.name, states)], attributes)


def _states(cell: Any) -> int:
    return len(keras.tree.flatten(cell.state_size))


RECURRENT: Mapping[type, Rule] = dict.fromkeys(LAYERS, recurrent)
