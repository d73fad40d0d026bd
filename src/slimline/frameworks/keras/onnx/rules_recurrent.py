"""Recurrent layers as the operators of ONNX, one for each cell.

Both compute the same; gates are in another order, biases of input and state in one row. Steps come first in ONNX, and
what a layer gives stays so: Keras' order is restored only for a reader that needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from slimline.frameworks.keras.functional import Call
from slimline.frameworks.keras.onnx.rules_elementwise import ALIASES
from slimline.frameworks.keras.onnx.rules_moves import flipped, joined, selected, sliced
from slimline.frameworks.keras.onnx.writer import Array, Operand, Placed, Rule, Stored, Writer, numbers
from slimline.frameworks.keras.reader import NoRule
from slimline.frameworks.keras.rules_recurrent import cells_of

L = keras.layers

_KINDS: Mapping[type, str] = {L.LSTMCell: "LSTM", L.GRUCell: "GRU", L.SimpleRNNCell: "RNN"}
_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (0, 1, 2), "RNN": (0,)}
"""ONNX has the gates i, o, f, c of an LSTM; Keras i, f, c, o."""
_FUNCTIONS: Mapping[str, tuple[str, tuple[float, ...], tuple[float, ...]]] = {
    "tanh": ("Tanh", (), ()),
    "sigmoid": ("Sigmoid", (), ()),
    "relu": ("Relu", (), ()),
    "hard_sigmoid": ("HardSigmoid", (1 / 6,), (0.5,)),
    "softsign": ("Softsign", (), ()),
    "softplus": ("Softplus", (), ()),
    "linear": ("Affine", (1.0,), (0.0,)),
    "elu": ("Elu", (1.0,), ()),
}
"""ONNX' name of a function, and its alpha and beta where it has them: those that have none take none of the list."""


def recurrent(w: Writer, call: Call) -> list[Operand]:
    """A recurrent layer over Keras' own cells."""
    layer, cells = call.operation, cells_of(call.operation)
    if layer.stateful:
        raise NoRule("it keeps its state from batch to batch")
    arguments = dict(zip(("sequences", "initial_state", "mask"), call.args, strict=False)) | dict(call.kwargs)
    mask = None if arguments.get("mask") is None else w.operand(arguments["mask"], "bool")
    states = [t for t in keras.tree.flatten(arguments.get("initial_state")) if t is not None]
    first = [w.operand(t) for t in states]
    x: Operand = w.source(call)
    last: list[Operand] = []
    reverse = layer.go_backwards
    for cell in cells:
        count = len(keras.tree.flatten(cell.state_size))
        own, first = first[:count], first[count:]
        if mask is None:
            x, ends = _cell(w, x, cell, own, reverse)
            final: Operand = ends[0]
        else:
            x, ends, final = _masked(w, x, mask, cell, own, reverse, layer.zero_output_for_mask)
        last += ends
    if layer.return_sequences:
        final = flipped(w, x, [1]) if reverse else x  # Keras gives the steps as it went through them
    return [final, *last] if layer.return_state else [final]


def _masked(
    w: Writer, x: Operand, mask: Operand, cell: Any, states: list[Operand], reverse: bool, zeros: bool
) -> tuple[Placed, list[Operand], Operand]:
    """The same where a mask says which steps count, step by step: at others states, and what is given, stay (or what is
    given is zero). And what it gives at the step that comes last."""
    steps, count = w.size(x, 1), len(keras.tree.flatten(cell.state_size))
    nothing = w.each("Mul", selected(w, sliced(w, x, {2: (0, 1, 1)}), 1, 0), Stored(np.zeros(cell.units, x.dtype)))
    states = states or [nothing] * count
    sequence: list[Operand] = [nothing] * steps
    before: Operand = nothing
    for step in reversed(range(steps)) if reverse else range(steps):
        part = sliced(w, x, {1: (step, step + 1, 1)})
        y, ends = _cell(w, part, cell, states, False)
        counts = sliced(w, mask, {1: (step, step + 1, 1)})
        states = [w.each("Where", counts, new, old, dtype=old.dtype) for new, old in zip(ends, states, strict=True)]
        before = w.each("Where", counts, selected(w, y, 1, 0), nothing if zeros else before, dtype=y.dtype)
        sequence[step] = w.widened(before, [1])
    return joined(w, sequence, 1, (x.shape[0], steps, cell.units)), states, before


def _cell(w: Writer, x: Operand, cell: Any, states: list[Operand], reverse: bool) -> tuple[Placed, list[Operand]]:
    """What one cell gives at all steps, by the time of its input, and its last states."""
    if type(cell) not in _KINDS:
        raise NoRule(f"slimline has no rule for the cell {type(cell).__name__}")
    kind = _KINDS[type(cell)]
    gates, units = _GATES[kind], cell.units
    kernel, recurrent_kernel = w.parameter(cell.kernel), w.parameter(cell.recurrent_kernel)

    def arrange(array: Array) -> Array:
        return np.concatenate([np.split(array.T, len(gates))[g] for g in gates])[None]

    weights = [w.weight(kernel, "kernel", arrange), w.weight(recurrent_kernel, "recurrent_kernel", arrange)]
    options: dict[str, Any] = {"hidden_size": units, "direction": "reverse" if reverse else "forward"}
    options |= _activations(cell, kind)
    if kind == "GRU":
        options["linear_before_reset"] = int(cell.reset_after)
    dtype = kernel.dtype
    starts = [w.op("Unsqueeze", w.plain(s), numbers(0)) for s in states]
    results = w.ops(
        kind,
        w.ordered(w.cast(x, dtype), (1, 0, 2)),
        *weights,
        _bias(w, cell, gates),
        None,
        *starts,
        outputs=3 if kind == "LSTM" else 2,
        **options,
    )
    batch, steps = x.shape[:2]
    sequence = w.op("Squeeze", results[0], numbers(1))
    ends = [w.place(w.op("Squeeze", r, numbers(0)), (0, 1), (batch, units), dtype) for r in results[1:]]
    return w.place(sequence, (1, 0, 2), (batch, steps, units), dtype), list(ends)


def _bias(w: Writer, cell: Any, gates: tuple[int, ...]) -> Any:
    """Biases of the input and of the state, one row."""
    if cell.bias is None:
        return None
    bias = w.parameter(cell.bias)

    def arrange(array: Array) -> Array:
        halves = array if array.ndim == 2 else np.stack([array, np.zeros_like(array)])
        return np.concatenate([np.split(half, len(gates))[g] for half in halves for g in gates])[None]

    return w.weight(Stored(bias.array, bias.name), "bias", arrange)


def _activations(cell: Any, kind: str) -> dict[str, Any]:
    """The functions of a cell, with the numbers of those that have some."""
    own = [cell.activation] if kind == "RNN" else [cell.recurrent_activation, cell.activation]
    functions = []
    for activation in own + own[1:] if kind == "LSTM" else own:
        name = getattr(activation, "__name__", type(activation).__name__)
        name = ALIASES.get(name, name)
        if name not in _FUNCTIONS or getattr(keras.activations, name, None) is not activation:
            raise NoRule(f"ONNX' recurrent operators have no function {name!r}")
        functions.append(_FUNCTIONS[name])
    numbers = {"activation_alpha": [a for f in functions for a in f[1]]}
    numbers["activation_beta"] = [b for f in functions for b in f[2]]
    return {"activations": [f[0] for f in functions]} | {name: held for name, held in numbers.items() if held}


RECURRENT: Mapping[type, Rule] = dict.fromkeys((L.RNN, L.SimpleRNN, L.GRU, L.LSTM), recurrent)
