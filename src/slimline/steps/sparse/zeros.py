"""What zeros buy on a runtime, from the table of ``benchmarks/zeros.py``: said when sparsity is asked for."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

from slimline.methods.sparsity import Pattern
from slimline.runtimes.base import runtime
from slimline.steps.sparse.step import SparsePruning

SAME = 0.005  # file sizes nearer than this to each other
NOISE = 0.05  # and speeds


@cache
def _table() -> list[dict[str, Any]]:
    """The rows; none until the benchmark has been run."""
    file = resources.files("slimline.report") / "zeros.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text("utf-8"))["rows"] if file.is_file() else []
    return rows


def note(step: SparsePruning, target: str) -> str:
    """One sentence: the measured row nearest to what `step` asks for, on the runtime `target`."""
    rows = [row for row in _table() if row["target"] == target]
    dense = next((row for row in rows if row["kind"] == "dense"), None)
    if dense is None and "zeros" in runtime(target).shrinks:
        return f"The file for {target} leaves zeros out where that is smaller; what that does to time is not measured."
    if dense is None:
        return f"What zeros buy on {target} has not been measured."
    pattern = Pattern.parse(step.pattern)
    family = "2:4" if pattern.group else "element" if pattern.block == (1, 1) else "1x4 blocks"
    amount = step.amount if isinstance(step.amount, float) else 0.5
    row = min((r for r in rows if r["kind"].endswith(family)), key=lambda r: abs(_part(r["kind"]) - amount))
    plain, packed = (dense[size] / row[size] for size in ("file_bytes", "gzip_bytes"))
    size = "as large as the dense one" if abs(plain - 1) < SAME else f"{plain:.2f}× smaller than the dense one"
    speed = "as fast" if abs(row["speedup"] - 1) < NOISE else f"{row['speedup']:.2f}× as fast"
    return (
        f"What zeros buy on {target}, measured on a small ResNet with {row['kind']} sparsity: the file is {size} "
        f"({packed:.1f}× smaller once both are compressed with gzip), and it runs {speed}."
    )


def _part(kind: str) -> float:
    """The part of zeros in a row's name."""
    return float(kind.split(" ")[0]) / 100 if "%" in kind else 0.5
