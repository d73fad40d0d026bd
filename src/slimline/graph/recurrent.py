"""The neutral recurrent operators, LSTM, GRU and plain RNN: one equation for all layers and directions of a call.

Rows of a weight are (gate, hidden); the columns of the recurrent one and the initial states are hidden; a layer reads
(direction, hidden) of the layer before. One call has one hidden width, so all its layers and directions lose the same
positions. A position whose rows are zero may still hold a state, if it began with one; nothing reads it.
"""

from __future__ import annotations

from slimline.graph.ops import Attributes, parse


def recurrent(
    gates: int,
    cell_state: bool,
    layers: int = 1,
    directions: int = 1,
    biases: bool = True,
    projected: bool = False,
    batch_first: bool = False,
) -> Attributes:
    """A whole sequence; inputs ``(x, *states, *weights)``, outputs ``(y, *last states)``.

    The states are the hidden one and, with `cell_state`, the cell's, each ``(layers x directions, batch, width)``; the
    weights of each layer and direction are as torch lays them out: of the input, of the state, two biases where there
    are `biases`, and where the hidden state is `projected` that matrix.
    """
    out = "p" if projected else "h"
    wide = f"(d {out})" if directions > 1 else out
    states = [f". b {out}", *[". b h"] * cell_state]
    weights = []
    for layer in range(layers):
        cell = _cell("i" if layer == 0 else wide, out, gates, biases)
        weights += [*cell, *[f"{out} h"] * projected] * directions
    x, y = (f"b . {w}" if batch_first else f". b {w}" for w in ("i", wide))
    sizes = {**({"k": gates} if gates > 1 else {}), **({"d": directions} if directions > 1 else {})}
    fixed = {"k": "its gates", "d": "its directions"}
    equation = parse(f"{', '.join([x, *states, *weights])} -> {', '.join([y, *states])}", sizes, fixed=fixed)
    return {"equation": equation, "weights": 1 + len(states)}


def recurrent_cell(gates: int, cell_state: bool, biases: bool = True) -> Attributes:
    """One step of one layer; inputs ``(x, *states, *weights)``, all ``(batch, width)``, outputs the new states."""
    states = ["b h"] * (1 + cell_state)
    text = f"{', '.join(['b i', *states, *_cell('i', 'h', gates, biases)])} -> {', '.join(states)}"
    equation = parse(text, {"k": gates} if gates > 1 else {}, fixed={"k": "its gates"})
    return {"equation": equation, "weights": 1 + len(states)}


def _cell(read: str, state: str, gates: int, biases: bool) -> list[str]:
    """Weights of one layer and direction that reads the axis `read` and its own `state`."""
    rows = "(k h)" if gates > 1 else "h"
    return [f"{rows} {read}", f"{rows} {state}", *[rows] * (2 * biases)]
