"""A name in a file is data until the user says that very name to the command that uses it."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slimline as sl
from slimline import cli
from slimline.files.state import state_folder
from slimline.recipe.named_code import function_of, granted
from slimline.recipe.recipe import load_recipe, parse
from slimline.run import seal
from slimline.run.compress import resume
from slimline.run.directory import Run
from tests import compress_job

MODULE = """
from pathlib import Path
Path({mark!r}).touch()
def score(weight): return (weight ** 2).sum(-1)
def model():
    from tests import compress_job
    return compress_job.model("torch")
def data():
    from tests import compress_job
    return compress_job.data("torch")
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> tuple[Path, str, Path]:
    """A folder with a module of a name of its own, that name, and the file that shows that it was imported."""
    folder, mark = tmp_path / "project", tmp_path / "imported"
    name = f"project_{abs(hash(request.node.name)) % 10**9}"
    folder.mkdir()
    (folder / f"{name}.py").write_text(MODULE.format(mark=str(mark)))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(folder)])
    monkeypatch.setenv("SLIMLINE_STATE", str(tmp_path / "state"))
    return folder, name, mark


class Killed(BaseException):
    """As a signal would, at a known place."""


def killer(progress: Any) -> None:
    raise Killed


def begun(output: Path, name: str, **settings: Any) -> Path:
    """A run of a named model, data and criterion that was killed before its first stage."""
    folder = str(Path.cwd())
    sources = {
        "model": {"name": f"{name}:model", "weights": None, "input_shape": None, "allow_pickle": False},
        "data": {"name": f"{name}:data", "seed": 0},
    }
    sources = {what: {**record, "folder": folder} for what, record in sources.items()}
    step = sl.ChannelPruning(ratio=0.5, criterion=f"{name}:score")
    with pytest.raises(Killed):
        sl.compress(
            compress_job.model("torch"),
            compress_job.data("torch"),
            recipe=[step],
            output=output,
            progress=killer,
            sources=sources,
            allow_code=f"{name}:score",
            budget=sl.Budget(max_drop=None),
            batch_sizes=(1,),
            **settings,
        )
    return output


def forget(name: str, mark: Path) -> None:
    sys.modules.pop(name, None)
    mark.unlink(missing_ok=True)


def rewritten(run: Path, change: Any) -> None:
    """The first line of the journal as an attacker writes it, checksum and all."""
    from slimline.run.journal import Created, dump

    path = run / "journal.jsonl"
    first, *rest = path.read_bytes().splitlines(keepends=True)
    record = json.loads(first)
    record.pop("check", None)
    change(record)
    path.write_bytes(dump(Created.model_validate(record)) + b"".join(rest))


def test_a_recipe_is_read_and_shown_without_importing(project: Any, capsys: Any, monkeypatch: Any) -> None:
    folder, name, mark = project
    (folder / "r.yaml").write_text(f"steps: [{{step: ChannelPruning, ratio: 0.5, criterion: '{name}:score'}}]")
    assert load_recipe("r.yaml", "onnxruntime").steps[0].criterion == f"{name}:score"  # type: ignore[union-attr]
    monkeypatch.setattr(sys, "argv", ["slimline", "recipes", "show", "r.yaml"])
    with pytest.raises(SystemExit):
        cli.main()
    assert f"{name}:score" in capsys.readouterr().out
    assert not mark.exists()


@pytest.mark.parametrize("source", ["path", "recipe", "steps", "step"])
def test_a_recipe_that_names_code_is_refused_with_all_its_names(project: Any, source: str, tmp_path: Path) -> None:
    folder, name, mark = project
    text = (
        f"steps: [{{step: ChannelPruning, ratio: 0.5, criterion: '{name}:score'}}, "
        "{step: SparsePruning, amount: 0.5, criterion: 'os:system'}]"
    )
    (folder / "r.yaml").write_text(text)
    steps = parse(text).steps
    recipe: Any = {"path": "r.yaml", "recipe": parse(text), "steps": steps, "step": steps[1]}[source]
    named = [name + ":score", "os:system"] if source != "step" else ["os:system"]
    for allowed in ((), named[:-1], ["os:system2", "os:"[:2] + ":path"]):
        with pytest.raises(sl.SlimlineError) as said:
            sl.compress(
                compress_job.model("torch"), compress_job.data("torch"), recipe=recipe, output=tmp_path / "run",
                allow_code=allowed,
            )  # fmt: skip
        missing = [n for n in named if n not in allowed]
        assert all(f"--allow-code {n}" in str(said.value) for n in missing)
        assert not mark.exists()
        assert not (tmp_path / "run").exists()


def test_apply_and_plan_take_functions_not_names(project: Any) -> None:
    _, name, mark = project
    model = sl.load(compress_job.model("torch"), compress_job.data("torch").example())
    for step in (
        sl.ChannelPruning(ratio=0.5, criterion=f"{name}:score"),
        sl.SparsePruning(amount=0.5, criterion="os:system"),
    ):
        with pytest.raises(sl.SlimlineError, match="name of code, which is not imported here: give the function"):
            sl.apply(model, step, compress_job.data("torch"))
    with pytest.raises(sl.SlimlineError, match="name of code"):
        sl.plan(model, sl.ChannelPruning(ratio=0.5, criterion=f"{name}:score"), compress_job.data("torch"))
    assert not mark.exists()
    by_function = sl.apply(model, sl.ChannelPruning(ratio=0.5, criterion=lambda weight: (weight**2).sum(-1)))
    assert by_function.graph.size < model.graph.size


def test_a_word_holds_for_one_call(project: Any) -> None:
    _, name, mark = project
    step = sl.ChannelPruning(ratio=0.5, criterion=f"{name}:score")
    with granted([step], f"{name}:score"):
        assert function_of(f"{name}:score")(np.ones((1, 2, 3))).shape == (1, 2)
    assert mark.exists()
    with pytest.raises(sl.SlimlineError, match="name of code"):
        function_of(f"{name}:score")
    with pytest.raises(sl.SlimlineError, match=r"write package\.module:function"), granted([step], "score"):
        pass


def test_what_lies_in_the_working_directory_shadows_nothing(project: Any) -> None:
    folder, name, _ = project
    (folder / "colorsys.py").write_text("raise SystemError('shadowed')")
    sys.modules.pop("colorsys", None)
    from slimline.files.code import find

    find(f"{name}:score", "criterion")
    import colorsys

    assert Path(str(colorsys.__file__)).parent != folder
    assert sys.path[-1] == str(folder)


def test_a_criterion_that_is_no_criterion_is_a_sentence(project: Any) -> None:
    model = sl.load(compress_job.model("torch"), compress_job.data("torch").example())
    for criterion in (lambda: 0, lambda a, b, c, d: 0, lambda w: 1 / 0, os.system, max):
        with pytest.raises(sl.SlimlineError, match="The criterion"):
            sl.apply(model, sl.ChannelPruning(ratio=0.5, criterion=criterion), compress_job.data("torch"))


def test_ones_own_run_goes_on_without_asking_from_anywhere(project: Any, tmp_path: Path, monkeypatch: Any) -> None:
    _, name, mark = project
    run = begun(tmp_path / "run", name)
    key = tmp_path / "state/key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    forget(name, mark)
    monkeypatch.chdir(tmp_path)
    assert resume(run, progress=False).report.compressed.parameters > 0
    assert mark.exists()


def test_a_strangers_run_names_all_that_it_would_import(project: Any, tmp_path: Path, monkeypatch: Any) -> None:
    folder, name, mark = project
    run = begun(tmp_path / "run", name)
    forget(name, mark)
    names = [f"{name}:{what}" for what in ("model", "data", "score")]
    original = (run / "journal.jsonl").read_bytes()

    def check(match: str = "was not started by you", **allowed: Any) -> None:
        with pytest.raises(sl.SlimlineError, match=match) as said:
            resume(run, progress=False, **allowed)
        missing = [n for n in names if n not in allowed.get("allow_code", ())]
        assert all(f"--allow-code {n}" in str(said.value) for n in missing)
        assert not mark.exists()

    # Another key, none, one that others can read, a link to one, and one that is cut off.
    key = tmp_path / "state/key"
    whole = key.read_bytes()
    key.write_bytes(bytes(32))
    check()
    key.write_bytes(whole[:-1])
    check()
    key.write_bytes(whole)
    key.chmod(0o644)
    check()
    key.chmod(0o600)
    key.rename(tmp_path / "elsewhere")
    key.symlink_to(tmp_path / "elsewhere")
    check()
    key.unlink()
    check()
    (tmp_path / "elsewhere").rename(key)
    # What an attacker changes: where code is looked for, what it is, the recipe, the mark itself.
    evil = str(tmp_path)
    changes = [
        lambda r: r["sources"]["model"].update(folder=evil),
        lambda r: r["sources"]["data"].update(folder=evil, name=f"{name}:data"),
        lambda r: r.pop("seal"),
        lambda r: r.update(seal=None),
        lambda r: r.update(seal="é" * 64),
        lambda r: r.update(seal=r["seal"][:-1]),
        lambda r: r.update(version="9.9"),
    ]
    for change in changes:
        (run / "journal.jsonl").write_bytes(original)
        rewritten(run, change)
        check()
        check(allow_code=names[:2])
    (run / "journal.jsonl").write_bytes(original)
    rewritten(run, lambda r: r["sources"].update(model={"name": "x.pt", "allow_pickle": True, "folder": evil}))
    names = names[1:]
    check(match="unpickle x.pt.*--allow-pickle")
    # The user's word, given from the folder of their own module.
    (run / "journal.jsonl").write_bytes(original)
    rewritten(run, lambda r: (r["sources"]["model"].update(folder=evil), r["sources"]["data"].update(folder=evil)))
    (tmp_path / f"{name}.py").write_text("raise SystemError('from the folder that the journal names')")
    monkeypatch.chdir(folder)
    names = [f"{name}:{what}" for what in ("model", "data", "score")]
    assert resume(run, progress=False, allow_code=names).report.compressed.parameters > 0


def test_an_edited_recipe_is_asked_about_in_ones_own_run(project: Any, tmp_path: Path) -> None:
    _, name, mark = project
    run = begun(tmp_path / "run", name)
    forget(name, mark)
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace(f"{name}:score", "os:system"))
    with pytest.raises(sl.SlimlineError, match=r"names other code than it was started with.*--allow-code os:system"):
        resume(run, progress=False)
    assert not mark.exists()


def test_objects_in_hand_are_not_imported_again(project: Any, tmp_path: Path) -> None:
    _, name, mark = project
    run = begun(tmp_path / "run", name)
    forget(name, mark)
    rewritten(run, lambda r: r.pop("seal"))
    done = resume(
        run, compress_job.model("torch"), compress_job.data("torch"), progress=False, allow_code=[f"{name}:score"]
    )
    assert done.report.compressed.parameters > 0


@pytest.mark.parametrize(
    "record", [{"name": 3}, {"name": "a:b", "more": 1}, "a:b", None, {"name": "a:b", "folder": 1}, {}, {"seed": "x"}]
)
def test_damaged_sources_are_a_sentence(project: Any, tmp_path: Path, record: Any) -> None:
    _, name, _ = project
    run = begun(tmp_path / "run", name)
    rewritten(run, lambda r: r["sources"].update(model=record))
    with pytest.raises(sl.SlimlineError, match="damaged"):
        resume(run, progress=False)


def test_without_a_home_a_run_is_started_and_asks(project: Any, tmp_path: Path, monkeypatch: Any) -> None:
    _, name, mark = project
    (tmp_path / "file").touch()
    monkeypatch.setenv("SLIMLINE_STATE", str(tmp_path / "file/below"))
    run = begun(tmp_path / "run", name)
    forget(name, mark)
    assert Run.open(run, lock=False).created["seal"] is None
    with pytest.raises(sl.SlimlineError, match="--allow-code"):
        resume(run, progress=False)
    assert not mark.exists()


def test_the_state_folder_depends_on_no_working_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLIMLINE_STATE", "here")
    monkeypatch.setenv("XDG_STATE_HOME", "there")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert state_folder() == tmp_path / ".local/state/slimline"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "x"))
    assert state_folder() == tmp_path / "x/slimline"
    monkeypatch.setenv("SLIMLINE_STATE", str(tmp_path / "y"))
    assert state_folder() == tmp_path / "y"
    assert seal.seal({"a": 1.5}) == seal.seal({"a": 1.5, "seal": "old"}) != seal.seal({"a": 2})
    assert seal.is_own({"a": 1, "seal": seal.seal({"a": 1})})
    assert not seal.is_own({"a": 1})


@pytest.mark.parametrize("words", [("resume", "RUN"), ("compress", "M", "--data", "D", "-o", "O", "-r", "r.yaml")])
def test_the_command_line_refuses_in_one_line(project: Any, tmp_path: Path, capsys: Any, monkeypatch: Any,
                                              words: tuple[str, ...]) -> None:  # fmt: skip
    folder, name, mark = project
    run = begun(tmp_path / "run", name)
    forget(name, mark)
    rewritten(run, lambda r: r.pop("seal"))
    (folder / "r.yaml").write_text("steps: [{step: ChannelPruning, ratio: 0.5, criterion: 'os:system'}]")
    places = {"RUN": str(run), "M": f"{name}:model", "D": f"{name}:data", "O": str(tmp_path / "o")}
    monkeypatch.setattr(sys, "argv", ["slimline", *(places.get(w, w) for w in words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "--allow-code" in capsys.readouterr().err
    assert not mark.exists()
    assert not (tmp_path / "o").exists()
