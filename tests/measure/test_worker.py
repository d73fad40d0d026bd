"""The measuring process: what it answers, what it loads, and how it dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slimline.basics.errors import SlimlineError
from slimline.measure import Worker, accuracy, file_bytes, measure_memory, outputs
from slimline.measure.process import save


def test_outputs_are_the_artifacts(artifact, monkeypatch):
    rng = np.random.default_rng(0)
    path, matrix = artifact(16)
    x = rng.normal(size=(103, 16)).astype(np.float32)
    assert np.allclose(outputs(path, (x,), batch=8), x @ matrix, atol=1e-5)
    monkeypatch.setattr(accuracy, "_CHUNK_BYTES", 40 * 16 * 4)
    parts = []
    assert np.allclose(outputs(path, (x,), batch=8, progress=parts.append), x @ matrix, atol=1e-5)
    assert parts == [40 / 103, 80 / 103, 1.0]


def test_it_loads_neither_torch_nor_tensorflow(artifact, tmp_path):
    with Worker(artifact(16)[0]) as worker:
        worker.time(save(tmp_path, (np.ones((1, 16), np.float32),)))
        mapped = Path(f"/proc/{worker.pid}/maps").read_text()
    assert "onnxruntime" in mapped
    assert not [name for name in ("libtorch", "libtensorflow", "matplotlib", "sklearn") if name in mapped]


def busy_threads(pid: int) -> int:
    """How many threads of a process have computed for at least a fifth of the busiest one's time."""
    spent = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        spent.append(int(fields[11]) + int(fields[12]))
    return sum(s > max(spent) / 5 for s in spent)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_those_asked_for(artifact, tmp_path, threads):
    files = save(tmp_path, (np.ones((512, 512), np.float32),))
    with Worker(artifact(512, 24)[0], threads) as worker:
        worker.time(files, repeats=10)
        assert busy_threads(worker.pid) == threads


def test_memory_counts_the_weights(artifact):
    x = np.ones((2, 1024), np.float32)
    small, large = (measure_memory(artifact(1024, times, separate=True)[0], (x,)) for times in (1, 11))
    weights = 10 * 1024 * 1024 * 4
    assert weights * 0.9 < large.peak_bytes - small.peak_bytes < weights * 3.5
    assert 0 < small.baseline_bytes < small.peak_bytes
    assert abs(large.baseline_bytes - small.baseline_bytes) < 5e6


def test_noise_on_stdout_does_no_harm(fake):
    assert np.array_equal(outputs(fake("a", "sleeps"), (np.arange(6.0),), batch=4), 2 * np.arange(6.0))


def test_its_death_is_told_with_its_last_line(fake):
    with pytest.raises(SlimlineError, match=r"died \(exit code 7\): last words$"):
        outputs(fake("a", "dies"), (np.ones((2, 3)),))
    with pytest.raises(SlimlineError, match=r"died \(exit code 1\): ValueError: what the runtime says$"):
        outputs(fake("a", "raises"), (np.ones((2, 3)),))


def test_a_killed_process_is_told(artifact, tmp_path):
    files = save(tmp_path, (np.ones((1, 16), np.float32),))
    with Worker(artifact(16)[0]) as worker:
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(SlimlineError, match="killed by signal 9"):
            worker.time(files)
        with pytest.raises(SlimlineError, match="killed by signal 9"):
            worker.time(files)


def test_nothing_is_left_behind(artifact):
    with Worker(artifact(16)[0]) as worker:
        folder, pid = worker.folder, worker.pid
    assert not folder.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_it_leaves_when_its_parent_is_killed(fake):
    artifact = fake("a", "sleeps")
    code = (
        "from slimline.measure.process import Artifact, Worker; from pathlib import Path; import time\n"
        f"w = Worker(Artifact(Path({str(artifact.path)!r}), {artifact.target!r}))\n"
    )
    code += "print(w.pid, flush=True); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    status = Path(f"/proc/{worker}/status")
    for _ in range(100):
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        subprocess.run(["sleep", "0.05"], check=True)
    pytest.fail("the worker outlived its parent")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("absent.onnx", None, "no artifact at"),
        ("broken.onnx", b"not a protobuf", "broken.onnx"),
        ("model.bin", b"", "runtime for files ending in"),
    ],
)
def test_bad_artifacts_are_one_sentence(tmp_path, name, content, said):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SlimlineError, match=said) as caught:
        Worker(path)
    assert "\n" not in str(caught.value)


def test_bad_requests_are_one_sentence(artifact):
    path, _ = artifact(16)
    with pytest.raises(SlimlineError, match="at least 1"):
        Worker(path, threads=0)
    for inputs in [(), (np.ones((0, 16)),), (np.ones((2, 16)), np.ones((3, 16)))]:
        with pytest.raises(SlimlineError, match="same number of rows"):
            outputs(path, inputs)
    with pytest.raises(SlimlineError) as caught:
        outputs(path, (np.ones((2, 17), np.float32),))
    assert "\n" not in str(caught.value)


def test_file_bytes(tmp_path):
    file = tmp_path / "model.onnx"
    file.write_bytes(b"x" * 10)
    assert file_bytes(file) == 10
    (tmp_path / "model.onnx.data").write_bytes(b"x" * 5)
    assert file_bytes(file) == 15
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "more").write_bytes(b"xy")
    assert file_bytes(tmp_path) == 17
    with pytest.raises(SlimlineError, match="no artifact"):
        file_bytes(tmp_path / "absent")
