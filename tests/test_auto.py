"""Budgets from end to end on small networks and real clocks; where a clock is asked, only generous ratios are."""

from __future__ import annotations

import json

import pytest

import slimline as sl
from slimline.search.attempts import Selection
from slimline.steps import clock
from tests import compress_job

STEPS = (
    sl.ChannelPruning(ratio=0.5),
    sl.Distillation(epochs=1, batch_size=512, refresh_batches=1),
    sl.StaticQuantization(undo=False, samples=64),
)


def compress(tmp_path, budget, steps=STEPS, fit=True, **settings):
    recipe = sl.Recipe(steps=steps, budget=budget, fit=fit, batch_sizes=(1, 4), **settings)
    return sl.compress(
        compress_job.model("torch"), compress_job.data("torch"), recipe=recipe, output=tmp_path / "run", progress=False
    )


def losing(monkeypatch, drops):
    """Attempts that lose, one after the other, what `drops` says (the last ever after); how many were measured."""
    asked = []

    def drop(self, artifact):
        asked.append(artifact)
        return drops[min(len(asked), len(drops)) - 1]

    monkeypatch.setattr(Selection, "drop", drop)
    return asked


def attempts(run):
    return [(t.settings["strength"], t.chosen) for t in run.report.trials if t.stage == "attempt"]


@pytest.mark.slow
def test_as_much_is_compressed_as_accuracy_lets_also_after_an_interruption(tmp_path, monkeypatch):
    losing(monkeypatch, [0.0, 0.0, 0.9])

    def stop(self, artifact, real=Selection.drop):
        if "try-3-" in str(artifact):
            raise KeyboardInterrupt
        return real(self, artifact)

    with monkeypatch.context() as patch:
        patch.setattr(Selection, "drop", stop)
        with pytest.raises(KeyboardInterrupt):
            compress(tmp_path, sl.Budget(max_drop=0.1))
    asked = losing(monkeypatch, [0.9])
    run = sl.resume(tmp_path / "run", compress_job.model("torch"), compress_job.data("torch"), progress=False)
    tried = attempts(run)
    assert [strength for strength, _ in tried[:3]] == ["no pruning", "50 % pruned", "75 % pruned"]
    assert [strength for strength, chosen in tried if chosen] == ["50 % pruned"]
    assert len(asked) == len(tried) - 2, "what was measured is not measured again"
    assert run.report.compressed.macs < 0.35 * run.report.original.macs
    assert (
        "fit: false" in (run.path / "recipe.yaml").read_text()
        and "ratio: 0.5\n" in (run.path / "recipe.yaml").read_text()
    )
    page = (run.path / "report.html").read_text()
    assert "What was tried" in page and "75 % pruned" in page
    assert sl.resume(run.path, progress=False).report == run.report


def test_where_even_rounding_loses_too_much_nothing_is_done(tmp_path, monkeypatch):
    losing(monkeypatch, [0.5, 0.0])
    run = compress(tmp_path, sl.Budget(max_drop=0.01))
    assert attempts(run) == [("no pruning", False), ("nothing", True)]
    assert run.report.certificate.observed_drop == 0
    assert run.report.compressed.file_bytes == run.report.original.file_bytes
    assert run.model.history == ()


def test_limits_that_conflict_are_said_in_the_report(tmp_path, monkeypatch):
    losing(monkeypatch, [0.5])
    run = compress(tmp_path, sl.Budget(max_drop=0.0, max_macs=0.9))
    assert len(attempts(run)) == 1
    (said,) = run.report.unmet
    assert said.startswith("the limits conflict") and "0.5 lost and the budget allows 0" in said
    assert "the limits conflict" in (run.path / "report.html").read_text()
    assert run.artifact.is_file()


def test_a_recipe_that_fits_is_done_and_its_layers_are_timed_once(tmp_path, monkeypatch):
    timed = []
    real = clock.by_the_clock
    monkeypatch.setattr(clock, "by_the_clock", lambda *a: timed.append(1) or real(*a))
    steps = (sl.ChannelPruning(ratio=0.75), sl.StaticQuantization(samples=64, batch_size=32))
    run = compress(tmp_path, sl.Budget(max_drop=None, max_latency=1.0, max_size=0.9), steps, fit=False)
    assert len(timed) == 1, "the estimate's decision is the run's"
    latency, size = run.report.limits
    assert (latency.what, size.what, size.outcome) == ("latency", "size", "met")
    assert latency.part.low <= latency.part.value <= latency.part.high
    assert run.report.trials[0].stage == "estimate" and run.report.trials[0].chosen
    assert {t.stage for t in run.report.trials[1:]} == {"undo"}
    (step,) = (s for s in run.report.steps if s["step"] == "StaticQuantization")
    assert step["undoing"]["batch"] <= 4 and step["undoing"]["seconds"] > 0
    assert set(json.loads((run.path / "report.json").read_text())["trials"][0]["cost"]["latency"]) == {"1", "4"}


def test_a_latency_that_cannot_be_met_is_refused_before_training_with_the_best_figure(tmp_path, monkeypatch):
    monkeypatch.setattr("slimline.training.loop.recover", lambda *_: pytest.fail("it was trained"))
    said = r"latency reaches \d+\.\d+ of the original's \(.* with 95 % confidence\), the budget is 0\.001; allow more"
    with pytest.raises(sl.SlimlineError, match=said):
        compress(tmp_path, sl.Budget(max_latency=0.001), fit=False)
    assert not (tmp_path / "run").exists()
