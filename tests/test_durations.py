"""How long the stages of a run took: told, never in the way, and never in what two runs share."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from slimline.recipe import Recipe
from slimline.run.directory import Run
from slimline.run.durations import Durations
from slimline.run.layout import JOURNAL
from slimline.steps.quantization.step import StaticQuantization

RECIPE = Recipe(steps=(StaticQuantization(),))


def test_stages_have_seconds_also_after_a_restart(tmp_path: Path) -> None:
    with Run.create(tmp_path / "r", RECIPE, title="net") as run:
        run.stage("one", lambda folder: None)
        assert run.timed("fit", lambda: 3) == 3
    with Run.open(tmp_path / "r") as run:
        run.stage("one", lambda folder: None)
        run.stage("two", lambda folder: None)
        assert list(run.durations.seconds) == ["one", "fit", "two"]
        assert all(seconds >= 0 for seconds in run.durations.seconds.values())
        assert datetime.fromisoformat(str(run.durations.at)).utcoffset() is not None
        assert run.created["title"] == "net"
        assert "seconds" not in (run.path / JOURNAL).read_text(), "the journal has the same bytes in every run"
        run.finish()
        assert not (run.path / ".work").exists()


def test_what_is_damaged_is_left_out(tmp_path: Path) -> None:
    noted = Durations(tmp_path / "d.jsonl")
    assert (noted.at, noted.seconds) == (None, {})
    lines = (b"\xff{", b"[1]", b'{"name": 3, "seconds": 1}', b'{"name": "a", "seconds": "x"}', b"[" * 10**5, b"")
    noted.path.write_bytes(b"\n".join(lines))
    noted.note("b", 1.23456)
    assert noted.seconds == {"b": 1.235}


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    target = tmp_path / "mine.txt"
    target.write_text("mine")
    (tmp_path / "d.jsonl").symlink_to(target)
    Durations(tmp_path / "d.jsonl").note("a", 1)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    Durations(tmp_path / "link" / "d.jsonl").note("a", 1)
    assert target.read_text() == "mine" and not list((tmp_path / "elsewhere").iterdir())
