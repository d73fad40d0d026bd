"""The neutral recurrent operators, LSTM, GRU and plain RNN: one equation for all that a call computes.

The attribute ``kernels`` says which inputs are matrices. In calls of one width (`sequence`, `step`), rows of a weight
are (gate, hidden); the columns of the recurrent one and the initial states are hidden; a layer reads (direction,
hidden) of the layer before. One call has one hidden width, so all its layers and directions lose the same positions; so
has one whose directions are `stacked` in every tensor. In a `chain` every layer has a width of its own. A position
whose weights are zero may still hold a state, if it began with one; nothing reads it.
"""

from __future__ import annotations

from collections.abc import Sequence

from slimline.graph.equation import Equation, parse
from slimline.graph.ops import Attributes


def sequence(
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
    weights of each layer and direction follow each other: of the input, of the state, two biases where there
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
    return _attributes(
        parse(f"{', '.join([x, *states, *weights])} -> {', '.join([y, *states])}", sizes, fixed=fixed), states
    )


def step(gates: int, cell_state: bool, biases: bool = True) -> Attributes:
    """One step of one layer; inputs ``(x, *states, *weights)``, all ``(batch, width)``, outputs the new states."""
    states = ["b h"] * (1 + cell_state)
    text = f"{', '.join(['b i', *states, *_cell('i', 'h', gates, biases)])} -> {', '.join(states)}"
    return _attributes(parse(text, {"k": gates} if gates > 1 else {}, fixed={"k": "its gates"}), states)


def stacked(gates: int, outputs: Sequence[int]) -> Attributes:
    """A sequence through one layer whose directions are the first dimension of all its tensors.

    Inputs ``(x, kernel, recurrent kernel, bias, lengths, first hidden state, first cell state, peepholes)``: x is
    ``(steps, batch, width)``; rows of the kernels are (gate, hidden), of the bias (of input or state, gate, hidden), of
    the peepholes (gate, hidden). Outputs are those of all steps ``(steps, direction, batch, hidden)``, the last hidden
    state and the last cell's; `outputs` says which of the three there are.
    """
    rows = "(k h)" if gates > 1 else "h"
    operands = [". b i", f". {rows} i", f". {rows} h", ". (m h)", "b", ". b h", ". b h", ". (p h)"]
    results = [". . b h", ". b h", ". b h"]
    sizes = {**({"k": gates} if gates > 1 else {}), "m": 2 * gates, "p": 3}
    text = f"{', '.join(operands)} -> {', '.join(results[index] for index in outputs)}"
    return {"equation": parse(text, sizes, fixed=dict.fromkeys(sizes, "its gates")), "kernels": (1, 2)}


def chain(
    cells: Sequence[tuple[int, int, int]],
    spatial: int = 0,
    sequences: bool = False,
    masked: bool = False,
    initial_states: bool = False,
    stateful: bool = False,
) -> Attributes:
    """Cells that run over the second dimension of ``(batch, time, *spatial, width)``, each on what the last one gives.

    Inputs ``(x, *(kernel, recurrent kernel, bias or None of each cell), mask of the steps or None, *first states)``; a
    kernel is ``(*k, in, gates * width)``. Every cell is its number of gates, the rank of its bias and its number of
    states. A position of the width is the same one in every gate and every state.

    `sequences` says whether all steps are given or the last; `initial_states`, whether the first states are among the
    inputs; `stateful`, whether the last ones are among the outputs.
    """
    dots = ". " * spatial
    operands, states, sizes = [f"b t {dots}h0"], [], {}
    for k, (gates, rank, state_count) in enumerate(cells):
        produced = f"h{k + 1}"
        if gates > 1:
            sizes[f"g{k}"] = gates
            produced = f"(g{k} h{k + 1})"
        operands += [f"{dots}h{k} {produced}", f"{dots}h{k + 1} {produced}", ". " * (rank - 1) + produced]
        states += [f"b {dots}h{k + 1}"] * state_count
    operands += ["b t" if masked else "", *(states if initial_states else ())]
    last = f"h{len(cells)}"
    outputs = [f"b t {dots}{last}" if sequences else f"b {dots}{last}", *(states if stateful else ())]
    fixed = {"t": "its steps follow one another", **dict.fromkeys(sizes, "it has these gates")}
    text = f"{', '.join(operands)} -> {', '.join(outputs)}"
    return {
        "equation": parse(text, sizes, fixed=fixed),
        "kernels": tuple(i for k in range(len(cells)) for i in (3 * k + 1, 3 * k + 2)),
    }


def _attributes(equation: Equation, states: Sequence[str]) -> Attributes:
    kernels = tuple(i for i, dims in enumerate(equation.inputs) if i > len(states) and len(dims) > 1)
    return {"equation": equation, "kernels": kernels}


def _cell(read: str, state: str, gates: int, biases: bool) -> list[str]:
    """Weights of one layer and direction that reads the axis `read` and its own `state`."""
    rows = "(k h)" if gates > 1 else "h"
    return [f"{rows} {read}", f"{rows} {state}", *[rows] * (2 * biases)]
