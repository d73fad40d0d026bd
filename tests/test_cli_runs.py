"""The command line as a user goes through it: a model by its factory, arrays in a file, a stop, and going on."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from slimline import cli

pytest.importorskip("torch")

PACKAGE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )
"""
RECIPE = """
steps:
  - {step: ChannelPruning, ratio: 0.5}
  - {step: Distillation, epochs: 3, batch_size: 128, refresh_batches: 1}
  - {step: StaticQuantization, undo: false, samples: 64}
budget: {max_drop: 0.9}
batch_sizes: [1, 8]
"""


def slimline(*words: str, folder: Path) -> subprocess.Popen[str]:
    # A shell starts what runs in the background with interrupts ignored, and whatever that starts inherits it.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heed}; from slimline.cli import main; main()"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code, *words], cwd=folder, text=True, **streams)  # type: ignore[call-overload, no-any-return]


def done(*words: str, folder: Path) -> tuple[int, str, str]:
    """Exit code, output and errors of ``slimline WORDS`` in `folder`, in this process, which has loaded torch."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["slimline", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
    said = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
    return int(end.value.code or 0), said[0], said[1]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: a package with a factory, arrays, a recipe."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "pack").mkdir()
    (folder / "pack" / "__init__.py").touch()
    (folder / "pack" / "models.py").write_text(PACKAGE)
    (folder / "recipe.yaml").write_text(RECIPE)
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    np.savez(folder / "d.npz", x_train=x[:900], y_train=y[:900], x_test=x[900:], y_test=y[900:])
    return folder


COMPRESS = ("compress", "pack.models:net", "--data", "d.npz", "--recipe", "recipe.yaml", "-o")


@pytest.fixture(scope="module")
def whole(project: Path) -> tuple[Path, str, str]:
    """A run that nobody disturbed, and what the command said."""
    process = slimline(*COMPRESS, "whole", folder=project)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return project / "whole", out, err


def test_what_compress_says(whole: tuple[Path, str, str]) -> None:
    run, out, err = whole
    report = json.loads((run / "report.json").read_text())
    for part in ("Original against compressed, both on onnxruntime", "latency, batch 8", "smaller", "Certified: "):
        assert part in out
    assert f"Artifact: {run / 'onnxruntime' / 'model.onnx'}" in out.replace("\n", "")
    assert "Compressing: done in" in err and "Traceback" not in err
    assert (report["model"], report["run"]) == ("pack.models:net", "whole")
    assert report["created"].endswith("+00:00")
    stages = {row["stage"]: row["seconds"] for row in report["durations"]}
    assert {"original", "baseline", "01-ChannelPruning", "02-Distillation", "artifact", "measurement"} <= set(stages)
    assert all(seconds >= 0 for seconds in stages.values()) and stages["measurement"] > 0.5
    page = (run / "report.html").read_text()
    assert "pack.models:net on onnxruntime" in page and "What took how long" in page


@pytest.mark.parametrize(
    ("how", "stage"),
    [pytest.param(signal.SIGKILL, "01-ChannelPruning", marks=pytest.mark.slow), (signal.SIGINT, "baseline")],
)
def test_stopped_and_resumed_from_its_sources(
    project: Path, whole: tuple[Path, str, str], tmp_path: Path, how: signal.Signals, stage: str
) -> None:
    name = f"stopped-{how.name}"
    process = slimline(*COMPRESS, name, folder=project)
    journal = project / name / "journal.jsonl"
    while not (journal.exists() and f'"name": "{stage}"' in journal.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.kill(process.pid, how)
    _, err = process.communicate()
    if how == signal.SIGINT:
        assert f"Stopped; go on with: slimline resume {name}" in err and "Traceback" not in err
    code, out, err = done("report", name, folder=project)
    assert (code, out) == (2, "") and "has no report yet" in err
    code, out, err = done("resume", str(project / name), folder=tmp_path)  # from elsewhere
    assert code == 0, err
    assert "Certified: " in out and "Traceback" not in err
    for file in ("onnxruntime/model.onnx", "recipe.yaml"):
        assert (project / name / file).read_bytes() == (whole[0] / file).read_bytes()
    found, undisturbed = (json.loads((run / "report.json").read_text()) for run in (project / name, whole[0]))
    assert found["compressed"]["accuracy"] == undisturbed["compressed"]["accuracy"]
    assert found["command"] == ["slimline", *COMPRESS, name]


def test_report_and_measure_of_what_was_made(project: Path, whole: tuple[Path, str, str]) -> None:
    code, out, _ = done("report", "whole", folder=project)
    assert code == 0 and out == whole[1]
    files = [str(path) for path in sorted(whole[0].rglob("*.onnx"))]
    baseline = next(path for path in files if "baseline" in path)
    artifact = str(whole[0] / "onnxruntime" / "model.onnx")
    words = ("measure", artifact, "--data", "d.npz", "--against", baseline, "--max-drop", "0.9", "--batch", "4")
    code, out, err = done(*words, folder=project)
    assert code == 0, err
    report = json.loads((whole[0] / "report.json").read_text())
    for part in ("On onnxruntime", "baseline", "artifact", "latency, batch 4", "peak memory", "Certified: accuracy"):
        assert part in out
    for which in ("original", "compressed"):
        assert f"{100 * report[which]['accuracy']:.4g}" in out
    code, out, err = done("measure", artifact, "--data", "d.npz", "--batch", "1", folder=project)
    assert code == 0 and "gain" not in out and "Certified" not in out


def test_inspect_of_a_factory_and_of_a_saved_model(project: Path, whole: tuple[Path, str, str]) -> None:
    code, out, err = done("inspect", "pack.models:net", "--data", "d.npz", folder=project)
    assert code == 0, err
    for part in ("2,650 parameters", "16 × 16 × 3 × 3", "2,320", "147,456", "Can be pruned", "filters", "16",
                 "Cannot be pruned", "the model's output"):  # fmt: skip
        assert part in out
    code, small, err = done("inspect", str(whole[0] / "model.pt2"), folder=project)
    assert code == 0, err
    report = json.loads((whole[0] / "report.json").read_text())
    assert f"{report['compressed']['parameters']:,} parameters" in small
    code, _, err = done("inspect", "pack.models:net", folder=project)
    assert code == 2
    assert err == "slimline: pack.models:net needs example inputs: give --input-shape, such as 3,224,224, or --data.\n"


def test_plan_of_the_recipe_is_what_the_run_then_did(project: Path, whole: tuple[Path, str, str]) -> None:
    words = ("plan", "pack.models:net", "--data", "d.npz", "--recipe", "recipe.yaml")
    code, out, err = done(*words, folder=project)
    assert code == 0 and err == "", err
    for part in ("What would be left after each step, for onnxruntime", "0: 16 -> 8", "training is skipped here"):
        assert part in out
    code, text, err = done(*words, "--json", folder=project)
    assert code == 0, err
    found, report = json.loads(text), json.loads((whole[0] / "report.json").read_text())
    for figure in ("parameters", "macs"):
        assert found["original"][figure] == report["original"][figure]
        assert found["expected"][figure] == report["compressed"][figure]
    assert found["expected"]["file_bytes"] < report["compressed"]["file_bytes"]


def test_export_writes_what_the_run_did(project: Path, whole: tuple[Path, str, str], tmp_path: Path) -> None:
    words = ("export", str(whole[0] / "model.pt2"), "--target", "onnxruntime", "-o")
    code, out, err = done(*words, str(tmp_path / "out"), folder=project)
    assert (code, out, err) == (0, f"Artifact: {tmp_path / 'out' / 'model.onnx'}\n", "")
    assert (tmp_path / "out" / "model.onnx").read_bytes() == (whole[0] / "onnxruntime" / "model.onnx").read_bytes()
    code, out, err = done(*words, str(tmp_path / "named.onnx"), folder=project)
    assert code == 0 and (tmp_path / "named.onnx").is_file()
    words = ("export", "pack.models:net", "--input-shape", "1,8,8", "-t", "onnxruntime", "-o", str(tmp_path / "f.onnx"))
    code, out, err = done(*words, folder=project)
    assert code == 0, err
    code, out, err = done("export", "pack.models:net", "-t", "onnxruntime", "-o", "not", folder=project)
    assert code == 2 and "needs example inputs" in err and not (project / "not").exists()


def test_json_of_a_run_and_of_its_files(project: Path, whole: tuple[Path, str, str]) -> None:
    run = whole[0]
    report = json.loads((run / "report.json").read_text())
    for command in ("report", "resume"):
        code, out, err = done(command, "whole", "--json", folder=project)
        assert (code, err) == (0, "") and json.loads(out) == report
    code, out, err = done("verify", "whole", "--json", folder=project)
    sound = json.loads(out)
    assert (code, err) == (0, "")
    assert sound.keys() == {"schema", "files", "run", "sound", "differences"}
    assert (sound["sound"], sound["differences"], sound["run"]) == (True, [], "whole")
    hashes = {entry["file"]: entry["sha256"] for entry in sound["files"]}
    assert hashes["report.json"] == hashlib.sha256((run / "report.json").read_bytes()).hexdigest()
    code, out, err = done("inspect", str(run / "model.pt2"), "--json", folder=project)
    inspected = json.loads(out)
    assert code == 0 and inspected["quantized"] and inspected["macs"] == report["compressed"]["macs"]
    artifact = str(run / "onnxruntime" / "model.onnx")
    code, out, err = done("measure", artifact, "--data", "d.npz", "--batch", "1", "--json", folder=project)
    measured = json.loads(out)
    assert code == 0 and measured["figures"]["artifact"]["accuracy"] == report["compressed"]["accuracy"]
    assert measured["certificate"] is None and measured["targets"] == {"artifact": "onnxruntime"}


def test_verify_says_in_json_what_is_wrong(project: Path, whole: tuple[Path, str, str], tmp_path: Path) -> None:
    shutil.copytree(whole[0], tmp_path / "copy")
    (tmp_path / "copy" / "report.html").write_text("other")
    code, out, err = done("verify", "copy", "--json", folder=tmp_path)
    assert code == 2 and "is not whole and sound" in err
    found = json.loads(out)
    assert not found["sound"] and "report.html" in [each["file"] for each in found["differences"]]


@pytest.fixture
def loud(project: Path) -> Path:
    """A project whose factory prints."""
    (project / "loud.py").write_text(
        "from pack.models import net as quiet\ndef net():\n    print('hello')\n    return quiet()\n"
    )
    return project


def test_what_a_factory_prints_is_not_in_the_json(loud: Path) -> None:
    code, out, err = done("inspect", "loud:net", "--input-shape", "1,8,8", "--json", folder=loud)
    assert code == 0 and "hello" in err
    assert json.loads(out)["parameters"] == 2650


@pytest.mark.slow
def test_what_a_factory_prints_is_not_in_the_json_of_a_run(loud: Path) -> None:
    (loud / "small.yaml").write_text("steps:\n  - {step: ChannelPruning, ratio: 0.5}\nbudget: {max_drop: 0.9}\n")
    words = "compress loud:net --data d.npz --recipe small.yaml --batch 1 -o loud --json"
    code, out, err = done(*words.split(), folder=loud)
    assert code == 0 and "hello" in err
    assert json.loads(out) == json.loads((loud / "loud" / "report.json").read_text())
