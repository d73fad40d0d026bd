"""Recurrent layers, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from slimline.frameworks.onnx.trainable.call import Call, rule

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"Tanh": torch.tanh, "Sigmoid": torch.sigmoid, "Relu": torch.relu}
_USUAL = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}


@rule("LSTM", "GRU", "RNN")
def _recurrent(call: Call) -> Sequence[fx.Node]:
    kind = call.node.op_type
    directions = call.shape(2)[0]
    names = call.attribute("activations") or _USUAL[kind] * directions
    if call.attribute("layout", 0) or call.attribute("clip") or call.attribute("input_forget", 0) or call.has(4):
        raise call.refusal("with lengths, clipping or another layout")
    if not set(names) <= set(_FUNCTIONS) or call.has(7):
        raise call.refusal(f"with peepholes or the activations {', '.join(names)}")
    operands = [call.tensor(0), call.tensor(1), call.tensor(2), call.optional(3), call.optional(5), call.optional(6)]
    backwards = [call.attribute("direction", "forward") == "reverse", True][:directions]
    late = bool(call.attribute("linear_before_reset", 0))
    results = call.emit(recurrent, *operands, kind, names, backwards, late)
    return call.several(results, len(call.node.outputs))


def recurrent(
    x: Tensor,
    weights: Tensor,
    states: Tensor,
    biases: Tensor | None,
    hidden: Tensor | None,
    cell: Tensor | None,
    kind: str,
    names: Sequence[str],
    backwards: Sequence[bool],
    late: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer ``(steps, batch, features)`` to ``(steps, directions, batch, hidden)``, and the last states."""
    size = states.shape[-1]
    functions = [_FUNCTIONS[name] for name in names]
    each = len(functions) // len(backwards)
    sequences, hs, cs = [], [], []
    for d, backward in enumerate(backwards):
        h = x.new_zeros(x.shape[1], size) if hidden is None else hidden[d]
        c = x.new_zeros(x.shape[1], size) if cell is None else cell[d]
        own, back = (None, None) if biases is None else biases[d].chunk(2)
        inputs = torch.nn.functional.linear(x, weights[d], own)
        outputs = []
        for row in reversed(inputs) if backward else inputs:
            h, c = _STEPS[kind](row, h, c, states[d], back, functions[d * each :][:each], late)
            outputs.append(h)
        sequences.append(torch.stack(outputs[::-1] if backward else outputs))
        hs.append(h)
        cs.append(c)
    return torch.stack(sequences, 1), torch.stack(hs), torch.stack(cs)


_Functions = Sequence[Callable[[Tensor], Tensor]]


def _rnn(
    x: Tensor, h: Tensor, c: Tensor, states: Tensor, bias: Tensor | None, functions: _Functions, late: bool
) -> tuple[Tensor, Tensor]:
    return functions[0](x + torch.nn.functional.linear(h, states, bias)), c


def _lstm(
    x: Tensor, h: Tensor, c: Tensor, states: Tensor, bias: Tensor | None, functions: _Functions, late: bool
) -> tuple[Tensor, Tensor]:
    gate, new, out = functions
    i, o, f, z = (x + torch.nn.functional.linear(h, states, bias)).chunk(4, -1)
    c = gate(f) * c + gate(i) * new(z)
    return gate(o) * out(c), c


def _gru(
    x: Tensor, h: Tensor, c: Tensor, states: Tensor, bias: Tensor | None, functions: _Functions, late: bool
) -> tuple[Tensor, Tensor]:
    gate, new = functions
    n = 2 * h.shape[-1]
    first, last = (None, None) if bias is None else (bias[:n], bias[n:])
    z, r = gate(x[:, :n] + torch.nn.functional.linear(h, states[:n], first)).chunk(2, -1)
    if late:
        back = r * torch.nn.functional.linear(h, states[n:], last)
    else:
        back = torch.nn.functional.linear(r * h, states[n:], last)
    return (1 - z) * new(x[:, n:] + back) + z * h, c


_STEPS = {"RNN": _rnn, "LSTM": _lstm, "GRU": _gru}
