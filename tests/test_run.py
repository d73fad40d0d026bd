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
from typing import Any

import pytest

from slimline.basics.errors import SlimlineError
from slimline.files.atomic import atomic_write, install, sha256
from slimline.recipe import Recipe
from slimline.run.directory import Run
from slimline.run.layout import JOURNAL
from slimline.steps.quantization.step import StaticQuantization

RECIPE = Recipe(steps=(StaticQuantization(),))

JOB = """
import hashlib, sys
from pathlib import Path
from typing import Any
from slimline.files.atomic import atomic_write
from slimline.run.directory import Run
from slimline.recipe import Recipe
from slimline.steps.quantization.step import StaticQuantization
from slimline.run.directory import Run

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
        assert not run.has_stage("bad")


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
    assert Run.open(tmp_path / "r", lock=False).has_stage("one")
    with Run.open(tmp_path / "r") as run:
        run.note("more")
    assert [json.loads(line)["event"] for line in journal.read_text().splitlines()] == ["created", "stage", "more"]


def test_two_processes_do_not_work_on_one_run(tmp_path: Path) -> None:
    script = "import sys, time; from slimline.run.directory import Run; r = Run.open(sys.argv[1]); print(1, flush=True)"
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
        run.check("data", "abc")
        with pytest.raises(SlimlineError, match="other data"):
            run.check("data", "abd")
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


def small(path: Path, recipe: Recipe = RECIPE) -> Path:
    """A finished run with two stages and what they leave for use."""
    with Run.create(path, recipe, data="abc") as run:
        one, _ = run.stage("one", lambda f: (f / "model.pt2").write_bytes(b"one") and None)
        run.write("model.pt2", (one / "model.pt2").read_bytes())
        run.stage("artifact", lambda f: (f / "model.onnx").write_bytes(b"two") and None, "onnxruntime")
        run.finish(["recipe.yaml", "model.pt2", "onnxruntime/model.onnx"])
    return path


ONNX = Recipe(steps=(StaticQuantization(),), target="onnxruntime")


# What a failure removes


@pytest.mark.parametrize("error", [SlimlineError("no"), ValueError("no"), MemoryError()])
def test_a_failed_create_removes_what_it_made_and_nothing_else(tmp_path: Path, error: Exception) -> None:
    def scratches(folder: Path) -> None:
        (run.scratch("s") / "epoch").write_bytes(b"3")
        (folder / "half").write_bytes(b"x")
        raise error

    with pytest.raises(type(error)), Run.create(tmp_path / "a" / "b", RECIPE) as run:
        run.stage("s", scratches)
    assert not list(tmp_path.iterdir())

    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(type(error)), Run.create(empty, RECIPE):
        raise error
    assert not list(empty.iterdir())

    with pytest.raises(type(error)), Run.create(tmp_path / "shared", RECIPE) as run:
        (run.path / "notes.txt").write_text("mine")
        (run.path / "stages").mkdir()
        (run.path / "stages" / "mine").write_text("mine")
        raise error
    assert {f.name for f in (tmp_path / "shared").rglob("*")} == {"notes.txt", "stages", "mine"}


def test_a_failed_resume_removes_nothing(tmp_path: Path) -> None:
    Run.create(tmp_path / "r", RECIPE).close()
    (tmp_path / "r" / "thesis.tex").write_text("years")
    before = files(tmp_path / "r")
    with pytest.raises(SlimlineError, match="no"), Run.open(tmp_path / "r"):
        raise SlimlineError("no")
    assert files(tmp_path / "r") == before


@pytest.mark.parametrize("name", ["journal.jsonl", "recipe.yaml", ".lock", ".work/x", "stages/x", "a"])
def test_a_directory_with_anything_in_it_is_refused_and_left_as_it_is(tmp_path: Path, name: str) -> None:
    path = tmp_path / "r" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    if name == ".lock":
        (tmp_path / "r" / "b").mkdir()
    before = {f: f.is_file() and f.read_text() for f in tmp_path.rglob("*")}
    with pytest.raises(SlimlineError, match=r"not empty|holds another run"):
        Run.create(tmp_path / "r", RECIPE)
    assert {f: f.is_file() and f.read_text() for f in tmp_path.rglob("*")} == before


def test_a_stage_done_again_leaves_other_files_of_its_folder(tmp_path: Path) -> None:
    run = Run.open(small(tmp_path / "r", ONNX))
    for folder in ("stages/one", "onnxruntime"):
        (run.path / folder / "notes.txt").write_text("mine")
    with run:
        run.stage("one", lambda f: (f / "other.pt2").write_bytes(b"new") and None, key="k")
        run.stage("artifact", lambda f: (f / "model.onnx").write_bytes(b"new") and None, "onnxruntime", key="k")
        run.finish(["onnxruntime/model.onnx"])
    assert sorted(f.name for f in (run.path / "stages/one").iterdir()) == ["notes.txt", "other.pt2"]
    assert (run.path / "onnxruntime/notes.txt").read_text() == "mine"
    assert not run.verify()


# Two at once

RACE = """
import sys
from pathlib import Path
from typing import Any
from slimline.basics.errors import SlimlineError
from slimline.recipe import Recipe
from slimline.steps.quantization.step import StaticQuantization
from slimline.run.directory import Run

recipe = Recipe(steps=(StaticQuantization(),))
for line in sys.stdin:
    try:
        run = Run.create(line.strip(), recipe, data=sys.argv[1])
        print("won", flush=True)
        kept = run
    except SlimlineError as e:
        print(str(e), flush=True)
"""


def test_of_many_processes_that_create_one_run_one_does(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(i)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        for i in range(6)
    ]
    for round_ in range(20):
        path = tmp_path / f"{round_}" / "deep"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(f"{path}\n")
            process.stdin.flush()
        said = [process.stdout.readline().strip() for process in processes if process.stdout is not None]
        assert said.count("won") == 1, said
        assert all(s == "won" or "another process" in s or "holds another run" in s for s in said), said
        assert Run.open(path, lock=False).created["data"] == str(said.index("won"))
    for process in processes:
        process.stdin.close()  # type: ignore[union-attr]
        assert process.wait() == 0


def test_of_many_threads_that_create_one_run_one_does_and_failures_hurt_no_one(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def attempt(path: Path, gives_up: bool) -> str:
        try:
            with Run.create(path, RECIPE) as run:
                if gives_up:
                    raise SlimlineError("gave up")
                (path / "data").write_text("mine")
                run.stage("one", lambda f: None)
                return "won"
        except SlimlineError as e:
            return str(e)

    with ThreadPoolExecutor(8) as pool:
        for round_ in range(40):
            path = tmp_path / str(round_)
            said = list(pool.map(lambda i, path=path, r=round_: attempt(path, (i + r) % 3 == 0), range(8)))
            assert said.count("won") <= 1, said
            known = ("won", "gave up", f"{path} is taken", f"{path} holds", f"{path} is not empty", f"{path} cannot be")
            assert not [s for s in said if not s.startswith(known)]
            if "won" in said:
                assert (path / "data").read_text() == "mine"
                assert Run.open(path, lock=False).has_stage("one")
            else:
                assert not path.exists() or {f.name for f in path.iterdir()} <= {".lock"}  # made by who did not get it


# Symbolic links


@pytest.mark.parametrize(
    "name", [".lock", ".work", "journal.jsonl", "recipe.yaml", "stages", "stages/one", "onnxruntime", "model.pt2"]
)
def test_nothing_is_written_through_a_link(tmp_path: Path, name: str) -> None:
    root = small(tmp_path / "r", ONNX)
    outside = tmp_path / "outside"
    place = root / name
    if place.is_dir() or place.exists():
        place.rename(outside)
    else:
        outside.mkdir()
    place.symlink_to(outside)
    before = {f: f.is_file() and f.read_bytes() for f in (outside, *outside.rglob("*"))}
    with pytest.raises(SlimlineError, match=r"symbolic link"), Run.open(root) as run:
        run.read_recipe()
        run.stage("one", lambda f: (f / "model.pt2").write_bytes(b"new") and None, key="other")
        run.stage("artifact", lambda f: (f / "model.onnx").write_bytes(b"n") and None, "onnxruntime", key="other")
        run.write("model.pt2", b"new")
    assert {f: f.is_file() and f.read_bytes() for f in (outside, *outside.rglob("*"))} == before
    assert place.is_symlink()


def test_a_part_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    root = small(tmp_path / "r", ONNX)
    (root / ".work").mkdir()
    (root / ".work" / "model.pt2.part").symlink_to(outside)
    (root / ".work" / "one.part").symlink_to(tmp_path)
    with Run.open(root) as run:
        with pytest.raises(SlimlineError, match="symbolic link"):
            run.write("model.pt2", b"new")
        with pytest.raises(SlimlineError, match="symbolic link"):
            run.stage("one", lambda f: None, key="other")
    assert outside.read_text() == "mine"


# A finished run


def test_a_finished_run_is_verified_by_every_reader(tmp_path: Path) -> None:
    root = small(tmp_path / "r", ONNX)
    run = Run.open(root, lock=False)
    assert not run.verify()
    assert run.artifact == root / "onnxruntime/model.onnx"
    for name in ("onnxruntime/model.onnx", "model.pt2", "recipe.yaml"):
        good = (root / name).read_bytes()
        (root / name).write_bytes(b"x" + good[1:])
        assert f"{name} was altered" in map(str, run.verify())
        for read in ("artifact", "model"):
            with pytest.raises(SlimlineError, match=f"{name} was altered"):
                getattr(run, read)
        (root / name).unlink()
        with pytest.raises(SlimlineError, match=f"{name} is missing"):
            _ = run.artifact
        (root / name).write_bytes(good)
    assert not run.verify()
    (root / "stages/one/model.pt2").write_bytes(b"ONE")
    assert [str(d) for d in run.verify()] == ["stages/one/model.pt2 was altered"]


def test_what_is_missing_of_a_finished_run_is_copied_or_named(tmp_path: Path) -> None:
    root = small(tmp_path / "r", ONNX)
    whole = files(root)
    for name in ("model.pt2", "stages/one/model.pt2", "recipe.yaml"):
        (root / name).unlink()
        with Run.open(root) as run:
            assert run.finished
            assert run.restore() == []
            run.finish()
        assert files(root) == whole
    (root / "onnxruntime/model.onnx").unlink()
    with Run.open(root) as run:
        assert [str(d) for d in run.restore()] == ["onnxruntime/model.onnx is missing"]
    (root / "recipe.yaml").write_text("steps: []")
    with Run.open(root) as run, pytest.raises(SlimlineError, match="edited after the run had ended"):
        run.restore()
    assert (root / "recipe.yaml").read_text() == "steps: []"


def test_a_run_that_is_not_finished_is_not_verified(tmp_path: Path) -> None:
    with Run.create(tmp_path / "r", RECIPE) as run:
        run.stage("one", lambda f: (f / "a").write_text("x") and None)
        assert [str(d) for d in run.verify()] == ["journal.jsonl does not say that the run was finished"]
        with pytest.raises(SlimlineError, match="has no artifact yet: finish it"):
            _ = run.artifact


# What a stage was made from


def test_a_stage_with_another_key_is_done_again_and_so_is_what_was_decided_for_it(tmp_path: Path) -> None:
    answers = iter(range(10))
    with Run.create(tmp_path / "r", RECIPE) as run:
        for key, expected in (("k", 0), ("k", 0), ("l", 1), ("k", 0)):
            decided: dict[str, int] = run.decide("one/which", lambda: {"n": next(answers)}, key)
            assert decided == {"n": expected}
            _, record = run.stage("one", lambda f, d=decided: dict(d), key=key)
            assert record == {"n": expected}


def test_checkpoints_are_for_one_key_and_one_set_of_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def checkpoints(folder: Path) -> None:
        scratch = run.scratch("one", "k")
        seen.append(sorted(f.name for f in scratch.iterdir()))
        (scratch / f"epoch-{len(seen)}").write_text("x")
        raise ValueError

    seen: list[list[str]] = []
    with Run.create(tmp_path / "r", RECIPE) as run:
        run.stage("zero", lambda f: None)
        for _ in range(2):
            with pytest.raises(ValueError):
                run.stage("one", checkpoints, key="k")
        monkeypatch.setattr("slimline.run.directory.versions", lambda: {"torch": "9"})
        with pytest.raises(ValueError):
            run.stage("one", checkpoints, key="k")
        assert seen == [[], ["epoch-1"], []]
        assert len([entry for entry in (run.path / ".work").iterdir() if "@" in entry.name]) == 1


def test_an_edited_recipe_is_taken_over_and_a_missing_one_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Run.create(tmp_path / "r", ONNX).close()
    path = tmp_path / "r" / "recipe.yaml"
    text = path.read_text()
    path.unlink()
    with Run.open(tmp_path / "r") as run:
        run.read_recipe()
        assert path.read_text() == text
        assert "was missing" in caplog.text
    path.write_text("# a remark\n" + text.replace("seed: 0", "seed: 7"))
    with Run.open(tmp_path / "r") as run:
        assert run.recipe.seed == 0
        base = run.base
        run.read_recipe()
        assert run.recipe.seed == 7
        assert run.base != base
        assert "was edited" in caplog.text
    caplog.clear()
    with Run.open(tmp_path / "r") as run:
        run.read_recipe()
        assert run.recipe.seed == 7
        assert not caplog.text
    for bad in ("steps: [", "a: &a [*a]", "seed: " + "9" * 5000, "\0", "seed: -1\nsteps: []"):
        path.write_text(bad)
        with Run.open(tmp_path / "r") as run, pytest.raises(SlimlineError):
            run.read_recipe()
        assert path.read_text() == bad


def test_a_kill_between_the_fitted_recipe_and_its_file_is_no_edit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fitted = ONNX.model_copy(update={"seed": 5})
    with Run.create(tmp_path / "r", ONNX) as run:
        old = (run.path / "recipe.yaml").read_bytes()
        run.adopt(fitted)
        new = (run.path / "recipe.yaml").read_bytes()
        (run.path / "recipe.yaml").write_bytes(old)
    with Run.open(tmp_path / "r") as run:
        run.read_recipe()
        assert run.recipe == fitted
        assert (run.path / "recipe.yaml").read_bytes() == new
        assert not caplog.text


def test_other_versions_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Run.create(tmp_path / "r", RECIPE) as run:
        run.read_versions()
        assert not caplog.text
    now = {**run.created["versions"], "torch": "99"}
    monkeypatch.setattr("slimline.run.directory.versions", lambda: now)
    with Run.open(tmp_path / "r") as run:
        run.read_versions()
    assert "torch" in caplog.text
    assert "→ 99" in caplog.text


def test_other_models_and_data_are_refused(tmp_path: Path) -> None:
    with Run.create(tmp_path / "r", RECIPE, data="abc", model="m") as run:
        run.check("model", "m")
        with pytest.raises(SlimlineError, match="started with another model"):
            run.check("model", "n")


# A full disk


def test_a_full_disk_anywhere_is_a_sentence_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call of the system that a run makes is the one at which the disk is full, once."""
    whole = files(small(tmp_path / "whole", ONNX))
    calls = refused = 0
    limit = -1
    write, sync, mkdir = os.write, os.fsync, os.mkdir

    def counted(call: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == limit:
                raise OSError(28, os.strerror(28))
            return call(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(os, "write", counted(write))
    monkeypatch.setattr(os, "fsync", counted(sync))
    monkeypatch.setattr(os, "mkdir", counted(mkdir))
    small(tmp_path / "counted", ONNX)
    total = calls
    assert total > 20
    for limit in range(1, total + 1):
        calls = 0
        path = tmp_path / str(limit)
        try:
            small(path, ONNX)  # making a folder that is there already may fail
        except SlimlineError as e:
            assert "the disk is full" in str(e)
        else:
            assert files(path) == whole
            continue
        refused += 1
        limit = -1
        if not path.exists():
            small(path, ONNX)
        else:
            with Run.open(path) as run:
                run.read_recipe()
                one, _ = run.stage("one", lambda f: (f / "model.pt2").write_bytes(b"one") and None)
                run.write("model.pt2", (one / "model.pt2").read_bytes())
                run.stage("artifact", lambda f: (f / "model.onnx").write_bytes(b"two") and None, "onnxruntime")
                run.finish(["recipe.yaml", "model.pt2", "onnxruntime/model.onnx"])
        assert files(path) == whole
    assert refused > 0.6 * total  # seconds that cannot be noted refuse nothing
