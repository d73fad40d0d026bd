"""LSTM, GRU and plain RNN of torch as the operators of ONNX, one for each layer.

Both compute the same; gates are in another order, biases of input and state in one row, directions stacked. A
projected LSTM, which ONNX lacks, is a plain one too: with ``h = P u``, where ``u`` is what a plain one gives, the
recurrent weight is ``W P``. Its first state, which has no ``u``, is read as a further input of the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from onnxscript import opset18

op: Any = opset18  # its operators are typed without those that may be left out

_ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
"""ONNX has the gates i, o, f, c and z, r, h; torch i, f, g, o and r, z, n."""


def translations() -> dict[Any, Callable[..., Any]]:
    """The part of a ``custom_translation_table`` of `torch.onnx.export` for recurrent operators."""
    import torch

    aten = torch.ops.aten

    def lstm(
        x: Any, hx: Sequence[Any], params: Sequence[Any], has_biases: bool, num_layers: int, dropout: float,
        train: bool, bidirectional: bool, batch_first: bool,
    ) -> Any:  # fmt: skip
        return _stack("LSTM", {}, x, hx, params, has_biases, num_layers, bidirectional, batch_first)

    def single(kind: str, options: dict[str, Any]) -> Callable[..., Any]:
        def translate(
            x: Any, hx: Any, params: Sequence[Any], has_biases: bool, num_layers: int, dropout: float,
            train: bool, bidirectional: bool, batch_first: bool,
        ) -> Any:  # fmt: skip
            return _stack(kind, options, x, [hx], params, has_biases, num_layers, bidirectional, batch_first)

        return translate

    return {
        aten.lstm.input: lstm,
        aten.gru.input: single("GRU", {"linear_before_reset": 1}),
        aten.rnn_tanh.input: single("RNN", {"activations": ["Tanh"]}),
        aten.rnn_relu.input: single("RNN", {"activations": ["Relu"]}),
    }


def _stack(
    kind: str,
    options: dict[str, Any],
    x: Any,
    states: Sequence[Any],
    params: Sequence[Any],
    biases: bool,
    layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Any, ...]:
    """All layers, as torch's operator: what all steps give, and the last states."""
    directions = 1 + bidirectional
    each = len(params) // (layers * directions)
    projected = each > (4 if biases else 2)
    if batch_first:
        x = op.Transpose(x, perm=[1, 0, 2])
    ends: list[tuple[Any, ...]] = []
    for layer in range(layers):
        first = layer * directions
        cells = [params[each * (first + d) : each * (first + d + 1)] for d in range(directions)]
        if projected:
            results = [
                _projected(x, [_rows(s, first + d, first + d + 1) for s in states], cell, biases, bool(d))
                for d, cell in enumerate(cells)
            ]
            x = results[0][0] if directions == 1 else op.Concat(*(y for y, *_ in results), axis=2)
            ends += [tuple(last) for _, *last in results]
        else:
            own = [_rows(s, first, first + directions) for s in states]
            weights = [_weights(kind, cell, biases) for cell in cells]
            way = "bidirectional" if bidirectional else "forward"
            y, *last = _layer(kind, {**options, "hidden_size": cells[0][1].shape[1], "direction": way}, x, own, weights)
            x = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))
            ends.append(tuple(last))
    stacked = [s[0] if len(s) == 1 else op.Concat(*s, axis=0) for s in zip(*ends, strict=True)]
    return (op.Transpose(x, perm=[1, 0, 2]) if batch_first else x, *stacked)


def _layer(
    kind: str, options: dict[str, Any], x: Any, states: Sequence[Any], weights: Sequence[Sequence[Any]]
) -> Sequence[Any]:
    """One ONNX operator: outputs ``(steps, directions, batch, width)``, and the last states."""
    w, r, b = (_joined(parts) for parts in zip(*weights, strict=True))
    if "activations" in options:
        options = {**options, "activations": options["activations"] * len(weights)}
    outputs: Sequence[Any] = getattr(op, kind)(x, w, r, b, None, *states, **options)
    return outputs


def _weights(kind: str, cell: Sequence[Any], biases: bool) -> tuple[Any, Any, Any]:
    """The weights of one direction, gates in ONNX's order; None for biases that there are not."""
    w, r = (_ordered(kind, p) for p in cell[:2])
    return w, r, op.Concat(*(_ordered(kind, p) for p in cell[2:4]), axis=0) if biases else None


def _projected(x: Any, states: Sequence[Any], cell: Sequence[Any], biases: bool, back: bool) -> tuple[Any, Any, Any]:
    """One direction of a projected LSTM."""
    hidden, inner = states
    *plain, projection = cell
    one = op.Constant(value_ints=[1])
    others = op.Concat(op.Sub(op.Shape(x, start=0, end=1), one), op.Shape(hidden, start=1, end=3), axis=0)
    nothing = op.CastLike(op.ConstantOfShape(others), x)
    seen = op.Concat(x, op.Concat(*((nothing, hidden) if back else (hidden, nothing)), axis=0), axis=2)
    recurrent = op.MatMul(plain[1], projection)
    wide = [op.Concat(*plain[:2], axis=1), recurrent, *plain[2:]]
    none = op.Mul(inner, op.CastLike(op.Constant(value_float=0.0), inner))
    width = projection.shape[1]
    w, r, b = _weights("LSTM", wide, biases)
    parts = [None if p is None else op.Unsqueeze(p, op.Constant(value_ints=[0])) for p in (w, r, b)]
    direction = "reverse" if back else "forward"
    y, h, c = op.LSTM(seen, *parts, None, none, inner, direction=direction, hidden_size=width)
    turned = op.Transpose(projection, perm=[1, 0])
    return op.MatMul(op.Squeeze(y, one), turned), op.MatMul(h, turned), c


def _ordered(kind: str, weight: Any) -> Any:
    """Rows (gate, hidden) in ONNX's order of the gates."""
    order = _ORDER[kind]
    if len(order) == 1:
        return weight
    parts = op.Split(weight, axis=0, num_outputs=len(order))
    return op.Concat(*(parts[gate] for gate in order), axis=0)


def _joined(parts: Sequence[Any]) -> Any:
    """Directions stacked along a new first dimension."""
    if parts[0] is None:
        return None
    zero = op.Constant(value_ints=[0])
    wide = [op.Unsqueeze(p, zero) for p in parts]
    return wide[0] if len(wide) == 1 else op.Concat(*wide, axis=0)


def _rows(state: Any, start: int, stop: int) -> Any:
    """The states of some of the layers and directions."""
    ends = (op.Constant(value_ints=[n]) for n in (start, stop, 0))
    return op.Slice(state, *ends)
