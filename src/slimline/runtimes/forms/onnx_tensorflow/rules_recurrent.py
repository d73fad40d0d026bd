"""Recurrent layers, written out step by step: LiteRT's converter takes no loop whose batch is open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from slimline.runtimes.forms.onnx_tensorflow.call import Call, Untranslatable, rule
from slimline.runtimes.forms.onnx_tensorflow.layout import Array, Value, placed

_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {"Tanh": tf.tanh, "Sigmoid": tf.sigmoid, "Relu": tf.nn.relu}
_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_LONGEST = 512
"""Steps that are written out."""


@rule("LSTM", "GRU", "RNN")
def _recurrent(call: Call) -> Sequence[Value]:
    kind = call.node.op_type
    usual = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}[kind]
    weights, recurrent = call.constant(1), call.constant(2)
    directions, hidden = recurrent.shape[0], recurrent.shape[-1]
    names = list(call.attribute("activations") or usual * directions)
    if call.attribute("layout", 0) or call.attribute("clip") or call.attribute("input_forget", 0) or call.has(4):
        raise Untranslatable(f"{kind} with lengths, clipping or another layout")
    if not set(names) <= set(_ACTIVATIONS) or call.has(7):
        raise Untranslatable(f"{kind} with peepholes or the activations {', '.join(names)}")
    x = call.tensor(0)
    steps, batch = x.shape[0], tf.shape(x)[1] if x.shape[1] is None else x.shape[1]
    if steps is None or steps > _LONGEST:
        raise Untranslatable(f"{kind} over an open number of steps, or over more than {_LONGEST}")
    biases = call.constant(3) if call.has(3) else np.zeros((directions, 2 * _GATES[kind] * hidden), np.float32)
    direction = call.attribute("direction", "forward")
    sequences, hs, cs = [], [], []
    for d in range(directions):
        h = call.tensor(5)[d] if call.has(5) else tf.zeros([batch, hidden])
        c = call.tensor(6)[d] if call.has(6) else tf.zeros([batch, hidden])
        functions = [_ACTIVATIONS[name] for name in names[d * len(usual) :][: len(usual)]]
        cell = _Cell(
            kind, weights[d], recurrent[d], biases[d], functions, bool(call.attribute("linear_before_reset", 0))
        )
        inputs = tf.unstack(cell.inputs(x), axis=0)
        backwards = direction == "reverse" or d == 1
        outputs = []
        for step in reversed(inputs) if backwards else inputs:
            h, c = cell.step(step, h, c)
            outputs.append(h)
        sequences.append(tf.stack(outputs[::-1] if backwards else outputs, axis=0))
        hs.append(h)
        cs.append(c)
    return [placed(tf.stack(part, axis=axis)) for part, axis in ((sequences, 1), (hs, 0), (cs, 0))]


class _Cell:
    """One direction of a layer; gates in the order of ONNX."""

    def __init__(
        self,
        kind: str,
        weight: Array,
        recurrent: Array,
        bias: Array,
        functions: Sequence[Callable[[Any], Any]],
        late: bool,
    ) -> None:
        self.kind, self.functions, self.late = kind, functions, late
        self.weight = tf.constant(np.ascontiguousarray(weight.T))
        self.recurrent = tf.constant(np.ascontiguousarray(recurrent.T))
        self.hidden = recurrent.shape[-1]
        own, back = np.split(bias, 2)
        # Where the last gate's bias of the state is scaled by a gate it has to stay apart.
        apart = kind == "GRU" and late
        split = 2 * self.hidden if apart else len(own)
        self.bias = tf.constant(np.concatenate([own[:split] + back[:split], own[split:]]))
        self.last = tf.constant(back[2 * self.hidden :]) if apart else None

    def inputs(self, x: Any) -> Any:
        """What the inputs ``(steps, batch, features)`` give to all gates, in one product."""
        rows = tf.reshape(x, [-1, x.shape[-1]])
        product = tf.nn.bias_add(tf.matmul(rows, self.weight), self.bias)
        return tf.reshape(product, [x.shape[0], -1, product.shape[-1]])

    def step(self, x: Any, h: Any, c: Any) -> tuple[Any, Any]:
        """The next state of hidden and cell."""
        if self.kind == "RNN":
            return self.functions[0](x + tf.matmul(h, self.recurrent)), c
        if self.kind == "LSTM":
            gate, new, out = self.functions
            i, o, f, z = tf.split(x + tf.matmul(h, self.recurrent), 4, axis=-1)
            c = gate(f) * c + gate(i) * new(z)
            return gate(o) * out(c), c
        gate, new = self.functions
        n = self.hidden
        back = tf.matmul(h, self.recurrent[:, : 2 * n])
        z, r = gate(x[:, :n] + back[:, :n]), gate(x[:, n : 2 * n] + back[:, n:])
        if self.last is not None:
            candidate = new(x[:, 2 * n :] + r * (tf.matmul(h, self.recurrent[:, 2 * n :]) + self.last))
        else:
            candidate = new(x[:, 2 * n :] + tf.matmul(r * h, self.recurrent[:, 2 * n :]))
        return (1.0 - z) * candidate + z * h, c
