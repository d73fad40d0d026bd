"""The lines of a journal: each whole or not there, and data whatever they hold."""

from __future__ import annotations

import errno
import json
import os
import random
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from slimline.basics.errors import SlimlineError
from slimline.recipe import Recipe
from slimline.run.directory import Run
from slimline.run.journal import Created, Decision, Journal, Note, Stage, dump
from slimline.run.layout import JOURNAL
from slimline.steps.quantization.step import StaticQuantization

RECIPE = Recipe(steps=(StaticQuantization(),))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    with Run.create(tmp_path / "r", RECIPE, data="abc") as run:
        for name in ("a", "b", "c"):
            run.stage(name, lambda f: (f / "x").write_text("x") and None)
            run.decide(f"{name}/which", lambda: {"which": 1})
        run.finish(["recipe.yaml"])
    return tmp_path / "r"


def line(**record: Any) -> bytes:
    """As whoever edits a journal by hand, and knows how its checksums are made, would write it."""
    body = json.dumps(record).encode()
    return body[:-1] + f', "check": "{sha256(body).hexdigest()[:16]}"}}\n'.encode()


def test_every_flipped_bit_is_noticed(root: Path) -> None:
    path = root / JOURNAL
    good = path.read_bytes()
    assert not Run.open(root, lock=False).verify()
    rng = random.Random(0)
    for _ in range(200):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        try:
            assert Run.open(root, lock=False).verify()
        except SlimlineError as e:
            assert "first line" in str(e)


def test_a_line_taken_out_doubled_or_moved_is_noticed(root: Path) -> None:
    path = root / JOURNAL
    lines = path.read_bytes().splitlines(keepends=True)
    for position in range(1, len(lines) - 1):
        for changed in (
            lines[:position] + lines[position + 1 :],
            lines[: position + 1] + lines[position:],
            [lines[0], lines[position], *(x for i, x in enumerate(lines[1:], 1) if i != position)],
        ):
            if changed != lines:
                path.write_bytes(b"".join(changed))
                assert Run.open(root, lock=False).verify()
    path.write_bytes(b"".join(lines[:-1]))
    assert not Run.open(root, lock=False).finished


@pytest.mark.parametrize(
    "bad",
    [
        {"event": "stage", "name": "../../x", "key": "", "files": {}, "record": {}},
        {"event": "stage", "name": "x", "key": "", "files": {"/etc/passwd": "0" * 64}, "record": {}},
        {"event": "stage", "name": "x", "key": "", "files": {"a/../../y": "0" * 64}, "record": {}},
        {"event": "stage", "name": "x", "key": "", "files": {"a\0b": "0" * 64}, "record": {}},
        {"event": "stage", "name": "x", "key": "", "files": {"\ud800": "0" * 64}, "record": {}},
        {"event": "stage", "name": "x", "key": "", "files": {"": "0" * 64}, "record": {}},
        {"event": "stage", "name": "x", "key": "", "files": {"y": "00"}, "record": {}},
        {"event": "stage", "name": "x", "key": "", "files": ["y"], "record": {}},
        {"event": "stage", "name": 5, "key": "", "files": {}, "record": {}},
        {"event": "stage", "name": "x", "key": "", "files": {}, "record": 7},
        {"event": "decision", "name": "x", "key": "", "record": [1]},
        {"event": "recipe", "recipe": "steps", "edited": False},
        {"event": "finished", "files": {"../x": "0" * 64}, "stages": [], "journal": "0" * 64},
        {"event": ["stage"]},
        {"event": "created", "schema": 2},
        {},
    ],
)
def test_a_line_of_the_wrong_shape_counts_as_damaged_even_with_its_checksum(root: Path, bad: Any) -> None:
    path = root / JOURNAL
    path.write_bytes(path.read_bytes() + line(**bad))
    journal = Journal(root)
    assert journal.damaged == [9]
    assert len(journal.events) == 8


@pytest.mark.parametrize("body", [b'{"event": ' + b"9" * 5000, b'{"event": ' + b"[" * 100_000, b'{"event": nul', b"{"])
def test_what_no_parser_takes_is_a_damaged_line(root: Path, body: bytes) -> None:
    path = root / JOURNAL
    check = sha256(body + b"}").hexdigest()[:16].encode()
    path.write_bytes(path.read_bytes() + body + b', "check": "' + check + b'"}\n')
    assert Journal(root).damaged == [9]


def test_only_the_first_line_cannot_be_done_without(root: Path) -> None:
    path = root / JOURNAL
    lines = path.read_bytes().splitlines(keepends=True)
    for bad in (b"", b"\n", lines[0][:-1], b"{}\n", b"".join(lines[1:]), b"\0" * 100, os.urandom(1000)):
        path.write_bytes(bad)
        with pytest.raises(SlimlineError, match="damaged in its first line"):
            Run.open(root)


def test_damaged_lines_are_taken_out_and_what_they_noted_is_done_again(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = root / JOURNAL
    lines = path.read_bytes().splitlines(keepends=True)
    lines[3] = lines[3].replace(b'"b"', b'"d"')
    path.write_bytes(b"".join(lines))
    with Run.open(root) as run:
        assert "Lines 4 of" in caplog.text
        assert run.has_stage("a")
        assert not run.has_stage("b")
        assert not run.has_stage("d")
        run.stage("b", lambda f: (f / "x").write_text("x") and None)
    assert Journal(root).damaged == []
    assert len(path.read_bytes().splitlines()) == len(lines)


def test_a_failed_append_leaves_no_part_of_a_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = root / JOURNAL
    before = path.read_bytes()
    with Run.open(root) as run:
        whole = os.write

        def short(handle: int, data: bytes) -> int:
            if len(data) < 20:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return whole(handle, data[: len(data) // 2])

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", short)
            with pytest.raises(SlimlineError, match="the disk is full"):
                run.decide("x", lambda: {"a": 1})
        assert path.read_bytes() == before
        assert run.decide("x", lambda: {"a": 2}) == {"a": 2}
    assert Journal(root).damaged == []


def test_no_journal_is_read_from_a_pipe_a_link_or_an_endless_device(root: Path, tmp_path: Path) -> None:
    path = root / JOURNAL
    path.rename(tmp_path / "elsewhere")
    for make in (
        lambda: path.symlink_to(tmp_path / "elsewhere"),
        lambda: path.symlink_to("/dev/zero"),
        lambda: os.mkfifo(path),
        path.mkdir,
    ):
        make()
        for lock in (True, False):
            with pytest.raises(SlimlineError, match=r"symbolic link|no regular file"):
                Run.open(root, lock=lock)
        path.rmdir() if path.is_dir() else path.unlink()


def test_what_is_noted_is_read_back(root: Path) -> None:
    events = Journal(root).events
    created = events[0]
    assert isinstance(created, Created)
    assert created.data == "abc"
    assert [e.name for e in events if isinstance(e, Stage)] == ["a", "b", "c"]
    assert all(e.record == {"which": 1} for e in events if isinstance(e, Decision))
    assert dump(Note.model_validate({"event": "x", "what": "ü\n"})).count(b"\n") == 1
