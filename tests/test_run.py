"""The run directory: all or nothing, killed anywhere, alone on its files."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slimline.atomic import atomic_write, install, sha256
from slimline.errors import SlimlineError
from slimline.journal import JOURNAL
from slimline.recipe import Recipe, StaticQuantization
from slimline.run import Run

RECIPE = Recipe(steps=(StaticQuantization(),))

JOB = """
import hashlib, sys
from pathlib import Path
from slimline.atomic import atomic_write
from slimline.run import Run
from slimline.recipe import Recipe, StaticQuantization
from slimline.run import Run

path = Path(sys.argv[1])
if (path / "journal.jsonl").exists():
    run = Run.open(path)
else:
    run = Run.create(path, Recipe(steps=(StaticQuantization(),)), data="abc")
print("started", flush=True)
with run:
    before = b"start"
    for i in range(4):
        def work(folder, before=before, i=i):
            saved = run.scratch(f"s{i}") / "count"
            count = int(saved.read_text()) if saved.exists() else 0
            while count < 5:
                count += 1
                print("counts", flush=True)
                atomic_write(saved, str(count).encode())
            for j in range(3):
                (folder / f"{j}.bin").write_bytes(hashlib.sha256(before + bytes([i, j])).digest() * 2000)
            return {"i": i, "count": count}
        folder, record = run.stage(f"s{i}", work, "target" if i == 3 else None)
        assert record == {"i": i, "count": 5}
        before = (folder / "2.bin").read_bytes()
    run.write("report.json", before)
    run.finish()
"""


def files(path: Path) -> dict[str, str]:
    return {str(f.relative_to(path)): sha256(f) for f in sorted(path.rglob("*")) if f.is_file()}


def test_killed_anywhere_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    job = tmp_path / "job.py"
    job.write_text(JOB)

    def start(path: Path) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, job, path], stdout=subprocess.PIPE, text=True)

    whole = tmp_path / "whole"
    assert start(whole).wait() == 0
    rng = random.Random(0)
    broken = tmp_path / "broken"
    for _ in range(6):  # of 20 counts in all, at most 18 are over when the last is killed
        process = start(broken)
        assert process.stdout is not None
        for _ in range(rng.randint(1, 4)):
            process.stdout.readline()
        time.sleep(rng.uniform(0, 0.002))
        process.kill()
        assert process.wait() == -signal.SIGKILL or process.returncode == 0
    assert start(broken).wait() == 0
    assert files(whole) == files(broken)
    assert not (broken / ".work").exists()


def test_a_stage_is_done_once_and_again_when_its_files_changed(tmp_path: Path) -> None:
    calls = []

    def work(folder: Path) -> dict[str, int]:
        calls.append(folder)
        (folder / "a").write_text("same")
        return {"calls": len(calls)}

    with Run.create(tmp_path / "r", RECIPE) as run:
        folder, record = run.stage("one", work)
        assert record == {"calls": 1}
        assert run.stage("one", work) == (folder, {"calls": 1})
    with Run.open(tmp_path / "r") as run:
        assert run.stage("one", work) == (folder, {"calls": 1})
        (folder / "a").write_text("changed")
        assert run.stage("one", work) == (folder, {"calls": 2})
        assert (folder / "a").read_text() == "same"


def test_a_stage_that_fails_leaves_nothing_but_its_checkpoints(tmp_path: Path) -> None:
    def work(folder: Path) -> None:
        (folder / "half").write_text("x")
        atomic_write(run.scratch("bad") / "epoch", b"3")
        raise ValueError("no")

    with Run.create(tmp_path / "r", RECIPE) as run:
        with pytest.raises(ValueError, match="no"):
            run.stage("bad", work)
        left = {str(f.relative_to(run.path)) for f in run.path.rglob("*") if f.is_file()}
        assert left == {
            "recipe.yaml",
            JOURNAL,
            ".lock",
            ".work/durations.jsonl",
            next(f for f in left if f.startswith(".work/bad@")),
        }
        assert not run.done("bad")


def test_a_mistake_before_the_first_stage_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(SlimlineError), Run.create(tmp_path / "r", RECIPE):
        raise SlimlineError("The model does not fit.")
    assert not list(tmp_path.iterdir())


def test_a_torn_last_line_is_dropped_and_mended(tmp_path: Path) -> None:
    with Run.create(tmp_path / "r", RECIPE) as run:
        run.stage("one", lambda folder: None)
    journal = tmp_path / "r" / JOURNAL
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"event": "stage", "name": "tw')
    assert Run.open(tmp_path / "r", lock=False).done("one")
    with Run.open(tmp_path / "r") as run:
        run.note("more")
    assert [json.loads(line)["event"] for line in journal.read_text().splitlines()] == ["created", "stage", "more"]


def test_two_processes_do_not_work_on_one_run(tmp_path: Path) -> None:
    script = "import sys, time; from slimline.run import Run; r = Run.open(sys.argv[1]); print(1, flush=True)"
    with Run.create(tmp_path / "r", RECIPE) as run:
        with pytest.raises(SlimlineError, match="Another process"):
            Run.open(tmp_path / "r")
        assert Run.open(tmp_path / "r", lock=False).recipe == run.recipe
    process = subprocess.Popen(
        [sys.executable, "-c", script + "; time.sleep(60)", tmp_path / "r"], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(SlimlineError, match="Another process"):
        Run.open(tmp_path / "r")
    process.kill()
    process.wait()
    for _ in range(50):  # the lock goes with the process
        try:
            Run.open(tmp_path / "r").close()
            return
        except SlimlineError:
            time.sleep(0.1)
    pytest.fail("a killed process kept the lock")


def test_what_created_the_run_is_kept(tmp_path: Path) -> None:
    sources = {"model": {"name": "m:f"}, "data": {"name": "digits"}}
    Run.create(tmp_path / "r", RECIPE, command=["slimline", "x"], sources=sources, data="abc").close()
    with Run.open(tmp_path / "r") as run:
        assert run.created["sources"] == sources
        assert run.created["command"] == ["slimline", "x"]
        assert run.recipe == RECIPE
        run.check_data("abc")
        with pytest.raises(SlimlineError, match="other data"):
            run.check_data("abd")
        with pytest.raises(SlimlineError, match="no report yet"):
            _ = run.report


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = atomic_write(tmp_path / "f", b"old")

    def full(handle: int) -> None:
        raise OSError(28, os.strerror(28), str(tmp_path / "f"))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SlimlineError, match="the disk is full: free some space"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_install_leaves_other_files_of_a_folder_alone(tmp_path: Path) -> None:
    for text in ("old", "new"):
        part = tmp_path / "part"
        (part / "sub").mkdir(parents=True)
        (part / "a").write_text(text)
        (part / "sub" / text).write_text(text)
        install(part, tmp_path / "d")
        (tmp_path / "d" / "mine").write_text("mine")
    assert {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file()} == {
        "d/a", "d/sub/old", "d/sub/new", "d/mine"
    }  # fmt: skip
    assert (tmp_path / "d" / "a").read_text() == "new"
