"""Rules of recurrent layers: sequences of LSTM, GRU and plain RNN, and their single steps."""

from __future__ import annotations

from slimline.frameworks.torch.call import Call
from slimline.frameworks.torch.registry import rule
from slimline.graph.recurrent import sequence, step

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@rule(*(f"{name}.input" for name in _GATES))
def _recurrent(call: Call) -> None:
    name = call.target.removeprefix("aten.")
    states = call["hx"] if name == "lstm" else [call["hx"]]
    layers, directions, biases = call["num_layers"], 1 + call["bidirectional"], call["has_biases"]
    params = call["params"]
    attributes = sequence(
        _GATES[name],
        cell_state=len(states) > 1,
        layers=layers,
        directions=directions,
        biases=biases,
        projected=len(params) > layers * directions * (4 if biases else 2),
        batch_first=call["batch_first"],
    )
    call.emit("recurrent", [call.tensor("input"), *map(call.value, (*states, *params))], attributes)


@rule(*(f"{name}_cell" for name in _GATES))
def _cell(call: Call) -> None:
    name = call.target.removeprefix("aten.").removesuffix("_cell")
    states = call["hx"] if name == "lstm" else [call["hx"]]
    weights = call.tensors("w_ih", "w_hh", "b_ih", "b_hh")
    attributes = step(_GATES[name], cell_state=len(states) > 1)
    call.emit("recurrent", [call.tensor("input"), *map(call.value, states), *weights], attributes)
