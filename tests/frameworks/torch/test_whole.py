"""Recurrent operators stay whole from capture to artifact: in time, in operators, and in what they compute."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import slimline as sl
from slimline.frameworks.torch.whole import _SHAPES, whole
from slimline.runtimes.base import runtime


class Net(nn.Module):
    """A recurrent layer, with or without initial states, between linear ones; its last state is read too."""

    def __init__(self, kind: type[nn.RNNBase], stated: bool = False, **options: Any) -> None:
        super().__init__()
        self.first, self.cells = nn.Linear(6, 8), kind(8, 10, **options)
        wide = self.cells.proj_size or 10
        self.head = nn.Linear(wide * (1 + self.cells.bidirectional), 4)
        self.stated = stated

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states = None
        if self.stated:
            rows = x.shape[0 if self.cells.batch_first else 1]
            count = self.cells.num_layers * (1 + self.cells.bidirectional)
            hidden = x.new_full((count, rows, self.cells.proj_size or 10), 0.3)
            states = (hidden, x.new_full((count, rows, 10), -0.2)) if isinstance(self.cells, nn.LSTM) else hidden
        made, last = self.cells(self.first(x), states)
        return self.head(made), (last[1] if isinstance(last, tuple) else last).square().sum(-1)


VARIANTS: dict[str, tuple[type[nn.RNNBase], dict[str, Any]]] = {
    "lstm": (nn.LSTM, {"batch_first": True}),
    "lstm, no biases": (nn.LSTM, {"batch_first": True, "bias": False}),
    "lstm, both ways, stacked": (nn.LSTM, {"batch_first": True, "num_layers": 2, "bidirectional": True}),
    "lstm, dropout": (nn.LSTM, {"batch_first": True, "num_layers": 3, "dropout": 0.5}),
    "lstm, projected": (nn.LSTM, {"batch_first": True, "proj_size": 3, "num_layers": 2, "bidirectional": True}),
    "lstm, states": (nn.LSTM, {"batch_first": True, "stated": True, "num_layers": 2}),
    "gru": (nn.GRU, {"batch_first": True}),
    "gru, both ways, stacked": (nn.GRU, {"batch_first": True, "num_layers": 2, "bidirectional": True, "dropout": 0.1}),
    "gru, states, no biases": (nn.GRU, {"batch_first": True, "stated": True, "bias": False}),
    "tanh": (nn.RNN, {"batch_first": True, "num_layers": 2, "bidirectional": True}),
    "relu": (nn.RNN, {"batch_first": True, "nonlinearity": "relu", "stated": True}),
}


def _batch(rows: int, steps: int = 5, width: int = 6) -> np.ndarray:
    return np.random.default_rng(rows).normal(size=(rows, steps, width)).astype(np.float32)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_equal_in_the_runtime_pruned_and_not(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    kind, options = VARIANTS[name]
    module = Net(kind, **options).eval()
    model = sl.load(module, _batch(2))
    pruned = sl.apply(model, sl.ChannelPruning(ratio=0.3))
    assert pruned.graph.size < model.graph.size
    for stage, current in (("whole", model), ("pruned", pruned)):
        session = runtime("onnxruntime").load(sl.export(current, "onnxruntime", tmp_path / f"{stage}.onnx"))
        kinds = [n.op_type for n in onnx.load(tmp_path / f"{stage}.onnx").graph.node]
        assert sum(k in ("LSTM", "GRU", "RNN", "Scan", "Loop") for k in kinds) >= options.get("num_layers", 1)
        for rows in (1, 7):
            x = _batch(rows)
            answers = session.outputs((x,))
            for mine, theirs in zip(current.outputs(x), answers, strict=True):
                np.testing.assert_allclose(theirs, mine, atol=2e-6)
            if current is model:
                with torch.no_grad():
                    for wish, got in zip(module(torch.from_numpy(x)), answers, strict=True):
                        np.testing.assert_allclose(got, wish.numpy(), atol=2e-6)


def test_neither_time_nor_operators_depend_on_the_steps(tmp_path: Path) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells, self.head = nn.LSTM(16, 256, 3, batch_first=True), nn.Linear(256, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.cells(x)[0][:, -1])

    spent, operators = {}, {}
    sl.export(sl.load(Head(), _batch(2, 3, 16)), "onnxruntime", tmp_path / "warm")
    for steps in (10, 160):
        start = time.process_time()
        model = sl.load(Head(), _batch(2, steps, 16))
        path = sl.export(sl.load(model.save(tmp_path / "model.pt2")), "onnxruntime", tmp_path / str(steps))
        spent[steps] = time.process_time() - start
        operators[steps] = [n.op_type for n in onnx.load(path).graph.node]
    assert spent[160] < 3 * spent[10]
    assert operators[160] == operators[10] and operators[10].count("LSTM") == 3


def test_shapes_are_those_that_the_operators_give_and_numbers_are_computed() -> None:
    kernels = {operator: dict(operator.py_kernels) for operator in _SHAPES}
    x = torch.randn(4, 3, 6)
    for kind, options in VARIANTS.values():
        cells = kind(6, 10, **{k: v for k, v in options.items() if k != "stated"}).eval()
        with torch.no_grad():
            wish = cells(x)
            with whole():
                got = cells(x)
                made = [n.meta["val"] for n in torch.export.export(cells, (x,)).graph.output_node().args[0]]
        flat = [t for part in wish for t in (part if isinstance(part, tuple) else (part,))]
        same = [t for part in got for t in (part if isinstance(part, tuple) else (part,))]
        assert all(torch.equal(a, b) for a, b in zip(flat, same, strict=True))
        assert [tuple(t.shape) for t in made] == [tuple(t.shape) for t in flat]
    assert {operator: dict(operator.py_kernels) for operator in _SHAPES} == kernels
