"""What SIGKILL may not change, at any point of a run.

A small run without a framework dies at every single call that writes. Whole compressions, in both frameworks, die at
random ones and at random times.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest

from slimline.recipe import Recipe
from slimline.run.directory import Run
from slimline.steps.quantization.step import StaticQuantization
from tests import kill_job

RECIPE = Recipe(steps=(StaticQuantization(),), target="onnxruntime")
ROOT = Path(__file__).parent.parent


def files(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


def decisions(path: Path) -> dict[str, object]:
    """What the whole lines of a journal say was decided."""
    raw = (path / "journal.jsonl").read_bytes() if (path / "journal.jsonl").exists() else b""
    lines = [json.loads(line) for line in raw[: raw.rfind(b"\n") + 1].splitlines()]
    return {r["name"]: r["record"] for r in lines if r["event"] == "decision"}


def work(path: Path, clock: int) -> None:
    """A run whose stages depend on each other, on what a clock decided and on checkpoints."""

    def timed(name: str, which: int) -> float:
        return random.Random(f"{clock} {name} {which}").random()

    run = Run.open(path) if (path / "journal.jsonl").exists() else Run.create(path, RECIPE, data="abc")
    with run:
        run.read_recipe()
        before = b"start"
        for name in ("s0", "s1"):
            key = sha256(before).hexdigest()

            def stage(folder: Path, name: str = name, before: bytes = before, key: str = key) -> dict[str, object]:
                first = run.decide(f"{name}/first", lambda: {"ms": timed(name, 1)}, key)
                saved = run.scratch(name, key) / "epochs"
                second = run.decide(f"{name}/second", lambda: {"ms": timed(name, 2)}, key)
                if not saved.exists():
                    saved.write_bytes(before + repr(first).encode())
                (folder / "sub").mkdir()
                (folder / "model.pt2").write_bytes(saved.read_bytes() + repr(second).encode())
                (folder / "sub" / "x").write_bytes(before)
                return {"first": first, "second": second}

            folder, _ = run.stage(name, stage, None if name == "s0" else "onnxruntime", key)
            before = (folder / "model.pt2").read_bytes()
        run.write("model.pt2", before)
        run.finish(["recipe.yaml", "model.pt2", *run.files_of("s1")])


def in_child(path: Path, clock: int, die_at: int | None) -> int:
    """Work in a process that dies at a call; -9, or how many calls there were."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        count = kill_job.counted(die_at)
        work(path, clock)
        total = count[0]
        os.write(writes, str(total).encode())
        os._exit(0)
    _, status = os.waitpid(child, 0)
    os.close(writes)
    said = os.read(reads, 20)
    os.close(reads)
    return int(said) if status == 0 else -os.WTERMSIG(status)


@pytest.mark.parametrize("part", [0, *(pytest.param(p, marks=pytest.mark.slow) for p in range(1, 8))])
def test_killed_at_every_call_that_writes(tmp_path: Path, part: int) -> None:
    whole = tmp_path / "whole"
    total = in_child(whole, 0, None)
    assert total > 40
    assert not Run.open(whole, lock=False).verify()
    reference = files(whole)
    for call in range(1 + part, total + 1, 8):
        path, copy, other = (tmp_path / f"{call}{kind}" for kind in ("", "copy", "other"))
        assert in_child(path, 0, call) == -signal.SIGKILL
        decided = decisions(path)
        if path.exists():
            shutil.copytree(path, copy)
            shutil.copytree(path, other)
        # With a clock that says the same, all is the same as if nothing had happened; also when killed again.
        in_child(path, 0, max(1, call // 2))
        assert in_child(path, 0, None) > 0
        assert in_child(copy, 0, None) > 0
        assert files(path) == files(copy) == reference
        # With another clock, what was decided stays.
        assert in_child(other, 99, None) > 0
        assert decided.items() <= decisions(other).items()
        assert not Run.open(other, lock=False).verify()
        assert (files(other) == reference) == (len(decided) == 4)


@pytest.fixture(scope="module", params=["torch", "keras"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, int, float]:
    """A compression that nobody disturbed: its framework, its directory, its calls that write, its seconds."""
    path = tmp_path_factory.mktemp("whole") / "run"
    start = time.monotonic()
    process = job(request.param, path)
    said, _ = process.communicate()
    assert process.returncode == 0
    return request.param, path, int(said.split()[-1]), time.monotonic() - start


def job(framework: str, path: Path, *call: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.kill_job", framework, str(path), *map(str, call)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def dies(framework: str, path: Path, rng: random.Random, calls: int, seconds: float) -> None:
    """Work on a run until SIGKILL at a random call that writes, or at a random time; it may end before."""
    if rng.random() < 0.5:
        process = job(framework, path, rng.randint(1, calls))
    else:
        process = job(framework, path)
        try:
            process.wait(rng.uniform(0.1, 1) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
    process.communicate()
    assert process.returncode in (0, -signal.SIGKILL)


def left_for_use(path: Path) -> dict[str, bytes]:
    """The files whose bytes no clock decides."""
    return {f: b for f, b in files(path).items() if Path(f).name.startswith(("model.", "recipe.yaml"))}


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 20))])
def test_a_compression_killed_anywhere_ends_with_the_same_bytes(
    whole: tuple[str, Path, int, float], tmp_path: Path, seed: int
) -> None:
    framework, reference, calls, seconds = whole
    rng = random.Random(f"{framework} {seed}")
    path, copy = tmp_path / "run", tmp_path / "copy"
    for _ in range(rng.randint(1, 2)):
        dies(framework, path, rng, calls, seconds)
    if path.exists():
        shutil.copytree(path, copy)
    decided = decisions(path)
    for last in (path, copy):
        process = job(framework, last)
        process.communicate()
        assert process.returncode == 0
        assert decided.items() <= decisions(last).items()
        assert not Run.open(last, lock=False).verify()
        assert left_for_use(last) == left_for_use(reference)
        assert not (last / ".work").exists()
