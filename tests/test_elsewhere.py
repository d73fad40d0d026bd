"""Targets whose artifacts run elsewhere: a run ends with an artifact, and with nothing that was not measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import slimline as sl
from slimline.basics.errors import SlimlineError
from tests.runtimes import mobile

LABELS = np.arange(96) % 5


def _data() -> sl.Data:
    x = np.random.default_rng(1).normal(size=(192, 3, 8, 8)).astype(np.float32)
    return sl.Data(train=(x[:96], LABELS), test=(x[96:], LABELS))


@pytest.mark.parametrize("target", ["tensorrt", pytest.param("coreml", marks=pytest.mark.slow)])
def test_a_run_tells_what_it_knows_and_no_more(target: str, tmp_path: Path) -> None:
    if target == "coreml":
        pytest.importorskip("coremltools")
    budget = sl.Budget(max_size=1.0 if target == "tensorrt" else None)
    run = sl.compress(
        mobile.model(), _data(), target, budget, sl.StaticQuantization(), tmp_path / "run", progress=False
    )
    report = run.report
    assert run.certificate is None and report.parity is None and report.integers is None
    for figures in (report.original, report.compressed):
        assert figures.accuracy is None and figures.peak_memory_bytes is None and figures.latency == {}
        assert figures.file_bytes and figures.parameters and figures.macs
    assert [limit.outcome for limit in report.limits] == ["met"] * (target == "tensorrt")
    assert any(f"Not run here: {target} artifacts run" in warning for warning in report.warnings)
    assert "no certificate" in str(report) and "not measured" in report._repr_html_()
    assert "No certificate" in (run.path / "report.html").read_text("utf-8")
    written = json.loads((run.path / "report.json").read_text("utf-8"))
    assert written["certificate"] is None and written["compressed"]["latency"] == {}
    assert run.artifact.exists() and run.artifact.parent == run.path / target
    assert sl.resume(run.path).artifact == run.artifact
    with pytest.raises(SlimlineError, match="not here"):
        sl.measure(run.artifact, _data(), target=target)


def test_what_only_measuring_decides_is_refused_before_work(tmp_path: Path) -> None:
    def compress(budget: sl.Budget, recipe: object) -> None:
        sl.compress(mobile.model(), _data(), "tensorrt", budget, recipe, tmp_path / "run", progress=False)  # type: ignore[arg-type]

    with pytest.raises(SlimlineError, match="so max_latency cannot be judged: leave it out"):
        compress(sl.Budget(max_latency=0.5), sl.StaticQuantization())
    with pytest.raises(SlimlineError, match="name the steps of the recipe"):
        compress(sl.Budget(max_drop=0.01), "auto")
    assert not list(tmp_path.iterdir())
