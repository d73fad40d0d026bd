"""The share of the work that a runtime does in integers is read from the artifact, not from what was asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import slimline as sl
from slimline.graph import cost
from slimline.measure.integers import Floating, Integers, integers
from slimline.run.layers import layer_rows
from slimline.runtimes.base import runtime
from slimline.steps.quantization.calibration import calibrate
from slimline.steps.quantization.step import StaticQuantization

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402


class Mixed(nn.Module):
    """A convolution, a recurrent layer over its columns, two linear layers whose names begin alike."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.cells = nn.Conv1d(8, 16, 3, padding=1), nn.LSTM(16, 24, batch_first=True)
        self.head, self.head_2 = nn.Linear(24, 20), nn.Linear(20, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made, _ = self.cells(torch.relu(self.conv(x)).transpose(1, 2))
        return self.head_2(torch.relu(self.head(made[:, -1])))


@pytest.fixture(scope="module")
def quantized() -> sl.Model:
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(64, 8, 10)).astype(np.float32)
    return calibrate(sl.load(Mixed().eval(), x[:2]), StaticQuantization(), [(x,)], "onnxruntime")


def test_recurrent_layers_are_counted_as_what_they_are(quantized: sl.Model, tmp_path: Path) -> None:
    path = sl.export(quantized, "onnxruntime", tmp_path)
    found = integers(quantized.graph, runtime("onnxruntime").integer_layers(path), {}, (), "onnxruntime")
    work = {"conv": 10 * 16 * 8 * 3, "cells": 10 * 4 * 24 * (16 + 24), "head": 24 * 20, "head_2": 20 * 5}
    assert sum(work.values()) == cost.macs(quantized.graph)
    assert [f.layer for f in found.floating] == ["cells"]
    assert found.floating[0].reason == "there is no integer kernel for recurrent layers on onnxruntime"
    assert found.macs == pytest.approx(1 - work["cells"] / sum(work.values()))
    assert "% of the multiply-accumulates run in integers" in found.sentence


def test_layers_are_told_apart_by_their_whole_names(quantized: sl.Model) -> None:
    operators = {"conv": "integer", "cells/LSTM": "float", "head": "float", "head_2": "integer", "head/Relu": "integer"}
    found = integers(quantized.graph, operators, {"head": "it was slower"})
    assert {f.layer: f.reason for f in found.floating}["head"] == "it was slower"
    assert "head_2" not in {f.layer for f in found.floating}


def test_what_the_runtime_does_not_name_is_no_integer(quantized: sl.Model) -> None:
    found = integers(quantized.graph, {}, {})
    assert found.macs == 0 and len(found.floating) == 4 and found.sentence.startswith("none of the")
    parts = [f.macs for f in found.floating]
    assert parts == sorted(parts, reverse=True) and sum(parts) == pytest.approx(1)
    every = integers(quantized.graph, dict.fromkeys(("conv", "cells/LSTM", "head", "head_2"), "integer"), {})
    assert every.macs == 1 and every.sentence.startswith("all of the")


def test_grids_alone_are_no_integers(quantized: sl.Model) -> None:
    found = integers(quantized.graph, {"conv": "float"}, {}, ("conv",))
    assert "the kernel that runs is a float one" in {f.layer: f.reason for f in found.floating}["conv"]


def test_a_run_whose_quantization_did_little_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(128, 10, 8)).astype(np.float32), rng.integers(0, 3, 128)

    class Series(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells, self.head = nn.GRU(8, 24, batch_first=True), nn.Linear(24, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.cells(x)[0][:, -1])

    data = sl.Data(train=(x[:64], y[:64]), test=(x[64:], y[64:]))
    step = StaticQuantization(undo=False, batch_size=16)
    run = sl.compress(Series(), data, recipe=[step], output=tmp_path / "run", batch_sizes=(1,))
    report = run.report
    assert report.integers is not None and report.integers.macs < 0.1
    assert report.compressed.integer_macs == report.integers.macs and report.original.integer_macs == 0
    assert "recurrent" in report.integers.floating[0].reason
    assert any(r.what == "StaticQuantization" and "run in integers" in r.reason for r in report.refused)
    page = (run.path / "report.html").read_text()
    assert "What runs in integers" in page and "no integer kernel for recurrent layers" in page
    assert "asked to" not in page
    assert "MACs in integers" in str(report)


def test_the_table_of_layers_says_what_the_runtime_executes() -> None:
    """And not what was planned: both stand in one report."""
    x = np.random.default_rng(0).standard_normal((64, 6)).astype(np.float32)
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    model = sl.load(network, x[:2])
    step = sl.StaticQuantization(undo=False)
    small = sl.apply(model, step, sl.Data(calibration=x), target="onnxruntime", progress=False)
    share = Integers(macs=0.6, floating=(Floating(layer="2", macs=0.4, reason="its kernel is a float one"),))
    rows = {row.layer: (row.precision, row.note) for row in layer_rows(model, small, {}, share)}
    assert rows == {"0": ("int8", ""), "2": ("float", "its kernel is a float one")}
    assert {row.precision for row in layer_rows(model, small, {}, None)} == {"int8"}, "where nothing runs, the plan"


def test_the_table_of_layers_names_the_parts_that_a_layer_became() -> None:
    x = np.random.default_rng(0).standard_normal((64, 12)).astype(np.float32)
    network = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3)).eval()
    model = sl.load(network, x[:2])
    steps = [
        sl.LowRank(rank=2, layers=("0",), criterion="weight", undo=False),
        sl.StaticQuantization(undo=False, keep=("0.1",)),
    ]
    small = sl.apply(model, steps, sl.Data(calibration=x), target="onnxruntime", progress=False)
    row, other = layer_rows(model, small, {"0.1": "as asked"}, None)
    assert row.layer == "0" and row.parts == ("0.0", "0.1") and other.parts == ()
    assert row.note == "became 0.0 and 0.1; as asked" and row.precision == "int8, float"
    assert row.after is not None
    biases = 20
    assert (row.after.parameters, row.after.macs, row.after.width) == (12 * 2 + 2 * 20 + biases, 12 * 2 + 2 * 20, 20)
