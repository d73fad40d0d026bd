"""The main job end to end, and what kill -9 may not change."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import slimline as sl
from slimline.measure import Report, file_bytes, outputs
from tests import compress_job

FRAMEWORKS = ("torch", "keras")
ARTIFACT = {"torch": "onnxruntime/model.onnx", "keras": "litert/model.tflite"}


@pytest.fixture(scope="module", params=FRAMEWORKS)
def finished(request, tmp_path_factory):
    """A run that nobody disturbed."""
    path = tmp_path_factory.mktemp("run") / request.param
    start(request.param, path).wait()
    return request.param, path


def start(framework: str, path: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.compress_job", framework, str(path)]
    return subprocess.Popen(command, cwd=Path(__file__).parent.parent, stderr=subprocess.DEVNULL)


def test_a_run_leaves_what_it_promises(finished):
    framework, path = finished
    report = json.loads((path / "report.json").read_text())
    assert report["schema"] == 1
    for name in ("recipe.yaml", "journal.jsonl", "report.html", "environment.json"):
        assert (path / name).stat().st_size > 0
    before, after = report["original"], report["compressed"]
    artifact = path / ARTIFACT[framework]
    assert after["file_bytes"] == artifact.stat().st_size < before["file_bytes"] / 3
    assert after["parameters"] < 0.35 * before["parameters"]
    assert after["macs"] < 0.35 * before["macs"]
    assert set(after["latency"]) == {"1", "8"}
    assert len(after["latency"]["8"]["samples_ms"]) >= 30
    assert report["parity"]["passed"]
    assert report["certificate"]["n"] == 599
    assert {row["precision"] for row in report["layers"]} == {"int8"}


def test_the_report_counts_what_the_artifact_answers(finished):
    framework, path = finished
    report = json.loads((path / "report.json").read_text())
    split = compress_job.data(framework).split("certification")
    answer = outputs(path / ARTIFACT[framework], split.inputs)
    assert report["compressed"]["accuracy"] == pytest.approx(np.mean(answer.argmax(1) == split.labels))


@pytest.mark.usefixtures("no_clock")
@pytest.mark.parametrize(
    "stage",
    [
        *(pytest.param(s, marks=pytest.mark.slow) for s in ("baseline", "01-ChannelPruning", "02-Distillation")),
        "recovery",
        "artifact",
    ],
)
def test_killed_and_resumed_ends_with_the_same_bytes(finished, tmp_path, stage):
    framework, whole = finished
    path = tmp_path / "run"
    process = start(framework, path)
    wait_for(path, stage, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(sl.SlimlineError, match="started from Python"):
        sl.resume(path)
    run = sl.resume(path, compress_job.model(framework), compress_job.data(framework))
    assert run.artifact.read_bytes() == (whole / ARTIFACT[framework]).read_bytes()
    assert run.report.compressed.accuracy == json.loads((whole / "report.json").read_text())["compressed"]["accuracy"]


def test_killed_after_the_last_stage_it_ends_without_the_model_and_the_data(finished, tmp_path):
    """All that is missing are copies: of a file of the report, and the line that says that the run is finished."""
    _, whole = finished
    path = tmp_path / "run"
    shutil.copytree(whole, path)
    lines = (path / "journal.jsonl").read_text().splitlines(keepends=True)
    assert '"event": "finished"' in lines[-1]
    (path / "journal.jsonl").write_text("".join(lines[:-1]))
    (path / "report.json").unlink()
    run = sl.resume(path)
    assert run.finished and not run.verify()
    assert (path / "report.json").read_bytes() == (whole / "report.json").read_bytes()


def wait_for(path: Path, stage: str, process: subprocess.Popen) -> None:
    """Until the journal notes the stage, or the recovery has left the state of an epoch."""
    for _ in range(6000):
        if process.poll() is not None:
            raise AssertionError("the job ended before it could be killed")
        if stage == "recovery" and list(path.glob(".work/*/recovery.safetensors")):
            return
        journal = path / "journal.jsonl"
        if journal.exists() and f'"name": "{stage}"' in journal.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"stage {stage} never came")


def test_apply_composes_and_leaves_the_model_alone(tmp_path):
    data = compress_job.data("torch")
    model = sl.load(compress_job.model("torch"), data.example())
    before = {k: v.copy() for k, v in model.parameters().items()}
    small = sl.apply(model, [sl.ChannelPruning(ratio=0.5), sl.StaticQuantization(undo=False)], data)
    assert [h["step"] for h in small.history] == ["ChannelPruning", "StaticQuantization"]
    for name, array in model.parameters().items():
        np.testing.assert_array_equal(array, before[name])
    artifact = sl.export(small, "onnxruntime", tmp_path)
    again = sl.load(small.save(tmp_path / "small.pt2"))
    x = data.split("certification").inputs[0][:16]
    np.testing.assert_array_equal(again.predict(x), small.predict(x))
    assert artifact.suffix == ".onnx"
    with pytest.raises(sl.SlimlineError, match="cannot follow StaticQuantization"):
        sl.apply(again, sl.ChannelPruning(ratio=0.5), data)


def test_iterative_pruning_reaches_the_same_width_as_one_shot():
    data = compress_job.data("torch")
    model = sl.load(compress_job.model("torch"), data.example())
    recovery = sl.Distillation(epochs=1, batch_size=512, refresh_batches=1)
    steps = [sl.ChannelPruning(ratio=0.5, schedule="iterative", rounds=2), recovery]
    small = sl.apply(model, steps, data)
    assert small.graph.values["stem.weight"].shape[0] == model.graph.values["stem.weight"].shape[0] / 2


def test_fit_prunes_as_little_as_the_budget_allows(tmp_path):
    data = compress_job.data("torch")
    recipe = sl.Recipe(
        steps=(sl.DepthPruning(blocks=("stages.1.*",)), sl.ChannelPruning(ratio=0.9)),
        budget=sl.Budget(max_drop=None, max_macs=0.4),
        fit=True,
    )
    run = sl.compress(compress_job.model("torch"), data, recipe=recipe, output=tmp_path / "run")
    found = run.report.compressed.macs / run.report.original.macs
    assert 0.1 < found <= 0.4
    assert "fit: false" in (tmp_path / "run" / "recipe.yaml").read_text()
    assert "DepthPruning" in (tmp_path / "run" / "report.html").read_text()


def test_an_impossible_budget_is_refused_with_the_best_and_leaves_nothing(tmp_path):
    data = compress_job.data("torch")
    with pytest.raises(sl.SlimlineError, match=r"size reaches 0\.\d+ of the original's, the budget is 0.001"):
        sl.compress(
            compress_job.model("torch"),
            data,
            recipe=[sl.ChannelPruning(ratio=0.5)],
            budget=sl.Budget(max_size=0.001),
            output=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"max_size": "1 kB"}, r"size is [\d.]+ kB, the budget is 1 kB; allow more"),
        (
            {"max_latency": "1 us"},
            r"latency is [\d.]+ ms \(.* confidence\) at batch 32, the budget is 0.001 ms",
        ),
        ({"max_memory": "1 MB"}, r"peak memory is [\d.]+ MB, the budget is 1 MB; allow more"),
    ],
)
def test_an_impossible_absolute_budget_is_refused_in_a_sentence_before_training(tmp_path, monkeypatch, limits, said):
    monkeypatch.setattr("slimline.training.loop.recover", lambda *_: pytest.fail("it was trained"))
    with pytest.raises(sl.SlimlineError, match=f"^The budget cannot be met on onnxruntime: {said}") as error:
        sl.compress(
            compress_job.model("torch"),
            compress_job.data("torch"),
            recipe=[sl.ChannelPruning(ratio=0.5), sl.Distillation(epochs=1)],
            budget=sl.Budget(**limits),
            output=tmp_path / "run",
        )
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_an_absolute_size_decides_how_much_is_pruned(tmp_path):
    """The artifact fits, and the strength before it on the ladder, which was measured too, does not."""
    model, data = compress_job.model("torch"), compress_job.data("torch")
    whole = sl.export(sl.load(model, data.example()), "onnxruntime", tmp_path / "whole")
    most = round(0.4 * file_bytes(whole))
    recipe = sl.Recipe(
        steps=(sl.ChannelPruning(ratio=0.9),),
        budget=sl.Budget(max_drop=None, max_size=f"{most} B", max_latency="10 s", max_memory="100 GB"),
        fit=True,
        batch_sizes=(4,),
    )
    run = sl.compress(model, data, recipe=recipe, output=tmp_path / "run", progress=False)
    report = run.report
    assert report.compressed.file_bytes <= most < report.original.file_bytes
    tried = [(t.cost.size.amount.value, t.chosen) for t in report.trials]
    assert min(size for size, _ in tried if size > most), "a milder one was tried"
    (chosen,) = (size for size, chosen in tried if chosen)
    assert chosen == max(size for size, _ in tried if size <= most)
    assert [(limit.what, limit.outcome, limit.unit) for limit in report.limits] == [
        ("latency", "met", "ms"),
        ("size", "met", "B"),
        ("peak memory", "met", "B"),
    ]
    latency = report.limits[0]
    assert latency.batch == 4 and latency.judged.low <= report.compressed.latency[4].median_ms <= latency.judged.high
    assert report.limits[2].judged.value == report.compressed.peak_memory_bytes
    said = [limit.sentence() for limit in report.limits]
    page = (run.path / "report.html").read_text()
    assert all(f"Within budget: {sentence}." in str(report) and sentence in page for sentence in said)
    assert Report.from_json(report.to_json()) == report
    assert f"max_size: {sl.Budget(max_size=f'{most} B').max_size}\n" in (run.path / "recipe.yaml").read_text()
    assert sl.resume(run.path, progress=False).report == report
