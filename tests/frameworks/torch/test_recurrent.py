"""Recurrent layers: input and hidden widths are removed exactly; a state that the user gives stays whole."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import slimline as sl
from slimline.graph.cost import macs
from slimline.graph.units import Units
from tests.frameworks.torch.test_rules import exact, model_of

SERIES = np.random.default_rng(0).standard_normal((2, 6, 5)).astype(np.float32)
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


class Tagger(nn.Module):
    """A linear layer, a recurrent one, a norm over its output, a linear layer for every place."""

    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        wide = (recurrent.proj_size or recurrent.hidden_size) * (1 + recurrent.bidirectional)
        self.first, self.norm, self.last = nn.Linear(5, recurrent.input_size), nn.LayerNorm(wide), nn.Linear(wide, 3)
        self.cells = recurrent

    def forward(self, x):
        x = self.first(x)
        y, _ = self.cells(x if self.cells.batch_first else x.transpose(0, 1))
        return self.last(self.norm(y))


def sizes(model) -> dict[str, int]:
    return {u.name: u.size for u in Units(model.graph).units}


@pytest.mark.parametrize(
    ("kind", "layers", "both", "bias", "first"),
    [
        *itertools.product(GATES, (1, 2), (False, True), (True,), (True,)),
        ("LSTM", 2, True, False, False),
        ("GRU", 1, False, False, False),
    ],
)
def test_input_and_hidden_width(kind, layers, both, bias, first):
    cells = getattr(nn, kind)(8, 6, layers, bias=bias, batch_first=first, bidirectional=both)
    model = model_of(Tagger(cells), SERIES)
    assert sizes(model) == {"first": 8, "cells": 6}
    plan = exact(model, {"first": (0, 7), "cells": (1, 4)})
    g, d, h = GATES[kind], 1 + both, 4
    read = [6] + [d * h] * (layers - 1)
    weights = sum(d * g * h * (i + h) for i in read)
    assert plan.parameters == (5 + 1) * 6 + weights + 2 * bias * layers * d * g * h + 2 * d * h + (d * h + 1) * 3
    small = plan.apply(model)
    assert macs(small.graph) == plan.macs == 6 * (5 * 6 + weights + d * h * 3)


@pytest.mark.parametrize("relu", [True, False])
def test_plain_cells_of_either_function(relu):
    cells = nn.RNN(8, 6, nonlinearity="relu" if relu else "tanh", batch_first=True)
    exact(model_of(Tagger(cells), SERIES), {"cells": (0, 3)})


@pytest.mark.parametrize(("layers", "both"), [(1, False), (2, True)])
def test_a_projection_makes_the_cell_and_its_output_two_widths(layers, both):
    model = model_of(Tagger(nn.LSTM(8, 7, layers, batch_first=True, bidirectional=both, proj_size=4)), SERIES)
    assert sorted(sizes(model).values()) == [4, 7, 8]
    by_size = {size: name for name, size in sizes(model).items()}
    exact(model, {by_size[4]: (1,), by_size[7]: (2, 6), by_size[8]: (3,)})


class Started(nn.Module):
    """An LSTM that begins with a state: a stored one, one computed from the input, or one that the user gives."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.cells, self.last = how, nn.LSTM(5, 6, batch_first=True), nn.Linear(6, 3)
        self.hidden, self.cell = (nn.Parameter(torch.zeros(1, 1, 6)) for _ in range(2))
        self.to_hidden, self.to_cell = nn.Linear(5, 6), nn.Linear(5, 6)

    def forward(self, x, *states):
        if self.how == "stored":
            states = (s.expand(-1, x.shape[0], -1).contiguous() for s in (self.hidden, self.cell))
        elif self.how == "computed":
            states = (f(x.mean(1))[None] for f in (self.to_hidden, self.to_cell))
        return self.last(self.cells(x, tuple(states))[0])


@pytest.mark.parametrize("how", ["stored", "computed"])
def test_a_state_of_the_network_shrinks_with_it(how):
    model = model_of(Started(how), SERIES)
    (name,) = sizes(model)
    plan = exact(model, {name: (0, 5)})
    held = {"stored": 2 * 4, "computed": 2 * (5 + 1) * 4}[how]
    assert plan.parameters == 16 * (5 + 4 + 2) + (4 + 1) * 3 + held


def test_a_state_that_the_user_gives_keeps_its_width():
    class Given(Started):
        def forward(self, x, hidden, cell):
            return super().forward(x, hidden.transpose(0, 1), cell.transpose(0, 1))

    states = np.random.default_rng(1).standard_normal((2, 2, 1, 6)).astype(np.float32)
    model = model_of(Given("given"), SERIES, *states)
    assert sizes(model) == {}
    frozen = {f.name: f.reason for f in Units(model.graph).frozen}
    assert frozen["cells (h)"] == "the model's input"
    with pytest.raises(sl.SlimlineError, match=r"cells \(h\) cannot be pruned: the model's input"):
        sl.plan(model, sl.ChannelPruning(ratio=0.5, layers=("cells",)))


def test_a_last_state_that_is_given_away_keeps_its_width():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells, self.last = nn.GRU(5, 6, batch_first=True), nn.Linear(6, 3)

        def forward(self, x):
            y, state = self.cells(x)
            return self.last(y), state

    units = Units(model_of(Both(), SERIES).graph)
    assert units.units == () and {f.reason for f in units.frozen} >= {"the model's output"}


def test_from_one_sequence_to_another():
    class Translator(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.write = nn.LSTM(5, 6, batch_first=True), nn.LSTM(5, 6, batch_first=True)
            self.last = nn.Linear(6, 3)

        def forward(self, x):
            return self.last(self.write(x.flip(1), self.read(x)[1])[0])

    model = model_of(Translator(), SERIES)
    assert sizes(model) == {"read": 6}
    exact(model, {"read": (2, 3)})


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_steps_of_a_loop(kind):
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.last = getattr(nn, kind)(5, 6), nn.Linear(6, 3)

        def forward(self, x):
            state = None
            for step in x.unbind(1)[:3]:
                state = self.cell(step, state)
            return self.last(state[0] if isinstance(state, tuple) else state)

    model = model_of(Loop(), SERIES)
    assert sizes(model) == {"cell": 6}
    assert exact(model, {"cell": (1, 4)}).shape("cell.weight_hh") == (4 * GATES[kind[:-4]], 4)
