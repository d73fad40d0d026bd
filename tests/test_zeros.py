"""The measured table of what zeros buy, and the sentence that is made of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import slimline as sl
from slimline.steps.sparse import zeros


@pytest.fixture
def table(monkeypatch):
    kinds = {"dense": (100, 90, 1.0), "50 % element": (100, 60, 1.0), "90 % element": (100, 20, 1.01)}
    kinds |= {"2:4": (100, 55, 1.0), "80 % 1x4 blocks": (98, 30, 1.2)}
    rows = [
        {"target": "onnxruntime", "kind": k, "file_bytes": f, "gzip_bytes": g, "speedup": s}
        for k, (f, g, s) in kinds.items()
    ]
    monkeypatch.setattr(zeros, "_table", lambda: rows)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"amount": 0.85}, "90 % element sparsity: the file is as large as the dense one (4.5× smaller once"),
        ({"amount": 0.85}, "compressed with gzip), and it runs as fast."),
        ({"amount": 0.3}, "50 % element"),
        ({"pattern": "4:8"}, "with 2:4 sparsity"),
        ({"amount": 0.5, "pattern": "4x4"}, "1x4 blocks sparsity: the file is 1.02× smaller than the dense one (3.0×"),
        ({"amount": 0.5, "pattern": "4x4"}, "and it runs 1.20× as fast."),
    ],
)
def test_the_nearest_row_is_said(table, fields, said):
    assert said in zeros.note(sl.SparsePruning(**fields), "onnxruntime")


def test_what_was_not_measured_is_said(table):
    assert zeros.note(sl.SparsePruning(amount=0.5), "openvino") == "What zeros buy on openvino has not been measured."
    assert "leaves zeros out" in zeros.note(sl.SparsePruning(amount=0.5), "coreml")


def test_the_table_that_ships_is_the_one_that_was_measured():
    shipped = zeros._table()
    measured = Path(__file__).parent.parent / "benchmarks/results/zeros.json"
    assert shipped == json.loads(measured.read_text())["rows"]
    assert {row["target"] for row in shipped} == {"onnxruntime", "litert"}
