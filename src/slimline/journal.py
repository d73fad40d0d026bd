"""The run directory: everything a compression did, so that it can be killed anywhere and go on.

A run is a list of stages. A stage works in a folder of its own that is renamed into place when it is whole, and
then noted in ``journal.jsonl``; a stage that is noted and whose files are unchanged is not done again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from slimline.errors import SlimlineError
from slimline.recipe.recipe import Recipe, parse

if TYPE_CHECKING:
    from slimline.measure.certificate import Certificate
    from slimline.measure.results import Report
    from slimline.model import Model

log = logging.getLogger(__name__)

JOURNAL = "journal.jsonl"
RECIPE = "recipe.yaml"
REPORT = "report.json"
WORK = ".work"
Record = dict[str, Any]


class Run:
    """One compression on disk. Made by `Run.create`, taken up again by `Run.open`; use it in a ``with`` block.

    Attributes
    ----------
    path : the directory.
    recipe : what it does, fully resolved.
    finished : whether all is done.
    created : the journal's first record: ``version``, ``command``, ``sources``, fingerprints ``data``, ``teacher``.
    """

    def __init__(self, path: Path, records: list[Record], lock: int | None) -> None:
        self.path = path
        self.created: Record = records[0]
        self.recipe: Recipe = parse((path / RECIPE).read_text("utf-8"), str(path / RECIPE))
        self._stages = {r["name"]: r for r in records if r.get("event") == "stage"}
        self._decisions = {r["name"]: r["record"] for r in records if r.get("event") == "decision"}
        self.finished = any(r.get("event") == "finished" for r in records)
        self._lock = lock

    @classmethod
    def create(
        cls,
        path: str | Path,
        recipe: Recipe,
        *,
        command: list[str] | None = None,
        sources: Mapping[str, Any] | None = None,
        data: str | None = None,
        teacher: str | None = None,
    ) -> Run:
        """Start a run in a new or empty directory, all or nothing.

        Parameters
        ----------
        command : the words that reproduce it.
        sources : JSON records from which model and data can be loaded again (`slimline.sources`).
        data : `slimline.Data.fingerprint`, so that other data is refused when the run goes on.
        teacher : `slimline.teacher.fingerprint` of the teacher, where it is not the model that is compressed.
        """
        from slimline import __version__

        path = Path(path).resolve()
        with writing(path):
            if path.exists() and not path.is_dir():
                raise SlimlineError(f"{path} is a file: name a directory that does not exist yet.")
            if (path / JOURNAL).exists():
                raise SlimlineError(f"{path} holds another run: go on with slimline resume, or name another directory.")
            if path.exists() and any(path.iterdir()):
                raise SlimlineError(f"{path} is not empty: name a new directory.")
            first = {"event": "created", "schema": 1, "version": __version__}
            first |= {"command": command, "sources": sources, "data": data, "teacher": teacher}
            with atomic_folder(path) as folder:
                write_synced(folder / RECIPE, recipe.dump().encode())
                write_synced(folder / JOURNAL, _line(first))
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path, lock: bool = True) -> Run:
        """Take up the run in `path`; ``lock=False`` only reads it, also while another process works on it."""
        path = Path(path).resolve()
        if not (path / JOURNAL).is_file():
            raise SlimlineError(f"{path} holds no run: name the directory that slimline compress wrote.")
        with writing(path):
            held = _take_lock(path) if lock else None
            try:
                return cls(path, _read_journal(path / JOURNAL, mend=lock), held)
            except BaseException:
                if held is not None:
                    os.close(held)
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, SlimlineError) and not self._stages:
            shutil.rmtree(self.path, ignore_errors=True)  # nothing to go on from: leave nothing half-written
        self.close()

    def close(self) -> None:
        """Let other processes take up the run."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def check_data(self, fingerprint: str) -> None:
        """Refuse data other than the run was started with."""
        if self.created.get("data") not in (None, fingerprint):
            raise SlimlineError(f"{self.path} was started with other data: give the same, or start a new run.")

    def stage(
        self, name: str, work: Callable[[Path], Record | None], place: str | Path | None = None
    ) -> tuple[Path, Record]:
        """Do a stage unless the journal says it is done; its folder and its record.

        Parameters
        ----------
        name : unique in the run; letters, digits, ``-``, ``_`` and ``.``.
        work : called with an empty folder to write its files to; returns what the journal should keep, as JSON.
        place : where the folder goes in the run, ``stages/NAME`` by default.

        A stage must depend on nothing but the recipe, the sources and earlier stages; then a run that is killed
        and goes on ends with the same bytes.
        """
        final = self.path / (place or Path("stages") / name)
        done = self._stages.get(name)
        if done is not None:
            if all((self.path / f).is_file() and sha256(self.path / f) == s for f, s in done["files"].items()):
                return final, dict(done["record"])
            log.warning("The files of stage %s have changed since it was done: doing it again.", name)
        with writing(self.path):
            with atomic_folder(final, self.path / WORK / f"{name}.part") as folder:
                record = json.loads(json.dumps(work(folder) or {}))
            files = {str(f.relative_to(self.path)): sha256(f) for f in sorted(final.rglob("*")) if f.is_file()}
            self._append({"event": "stage", "name": name, "files": files, "record": record})
            shutil.rmtree(self.path / WORK / name, ignore_errors=True)
        return final, dict(record)

    def scratch(self, name: str) -> Path:
        """A folder for the checkpoints of stage `name`: survives a kill, and goes when the stage is done."""
        folder = self.path / WORK / name
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def done(self, name: str) -> bool:
        """Whether the journal says that stage `name` is done."""
        return name in self._stages

    def decide(self, name: str, choose: Callable[[], Record]) -> Record:
        """What `choose` answers, asked once in the life of a run: the journal holds the answer before it is used.

        For whatever a clock decides. `name` is unique in the run; the answer is JSON.
        """
        if name not in self._decisions:
            self.note("decision", name=name, record=json.loads(json.dumps(choose())))
        return dict(self._decisions[name])

    def note(self, event: str, **record: Any) -> None:
        """Append something worth knowing to the journal."""
        with writing(self.path):
            self._append({"event": event, **record})

    def write(self, name: str, data: bytes) -> Path:
        """Write the file `name` of the run, whole or not at all."""
        return atomic_write(self.path / name, data)

    def finish(self) -> None:
        """Note that the run is whole, and clear away what only served to go on."""
        if not self.finished:
            self.note("finished")
            self.finished = True
        shutil.rmtree(self.path / WORK, ignore_errors=True)

    @cached_property
    def report(self) -> Report:
        """What was measured."""
        from slimline.measure.results import Report

        file = self.path / REPORT
        if not file.is_file():
            raise SlimlineError(f"{self.path} has no report yet: finish it with slimline resume {self.path}.")
        return Report.from_json(file.read_text("utf-8"))

    @property
    def certificate(self) -> Certificate:
        """What is proved about the accuracy lost."""
        return self.report.certificate

    @property
    def artifact(self) -> Path:
        """The compressed file that the target runtime loads."""
        return self._the("artifact", [f for f in (self.path / str(self.recipe.target)).glob("model.*") if f.is_file()])

    @cached_property
    def model(self) -> Model:
        """The compressed network in its framework."""
        from slimline.compress import load

        return load(self._the("model", [f for s in (".pt2", ".keras") for f in self.path.glob(f"model{s}")]))

    def _the(self, what: str, found: list[Path]) -> Path:
        if len(found) != 1:
            raise SlimlineError(f"{self.path} has no {what} yet: finish it with slimline resume {self.path}.")
        return found[0]

    def _append(self, record: Record) -> None:
        with (self.path / JOURNAL).open("ab") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())
        if record["event"] == "stage":
            self._stages[record["name"]] = record
        if record["event"] == "decision":
            self._decisions[record["name"]] = record["record"]


def _line(record: Record) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _read_journal(path: Path, mend: bool) -> list[Record]:
    """The records of a journal; a last line that was cut off by a kill is dropped (and, to `mend`, removed)."""
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if mend and len(whole) < len(raw):
        os.truncate(path, len(whole))
    try:
        records = [json.loads(line) for line in whole.splitlines()]
        if records[0]["event"] != "created":
            raise ValueError("no first record")
    except (ValueError, IndexError, KeyError, TypeError) as e:
        raise SlimlineError(f"{path} is damaged: start a new run in another directory.") from e
    return records


def _take_lock(path: Path) -> int:
    """Hold the run until the process ends, however it ends."""
    handle = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        os.close(handle)
        raise SlimlineError(f"Another process is working on {path}: wait until it ends.") from e
    return handle


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an operating system's refusal to write below `path` into a sentence."""
    try:
        yield
    except OSError as e:
        elsewhere = e.filename is not None and not Path(os.fsdecode(e.filename)).is_relative_to(path.parent)
        why = {
            errno.ENOSPC: "the disk is full: free some space",
            errno.EDQUOT: "the disk quota is used up: free some space",
            errno.EROFS: "the file system is read-only: name another directory",
            errno.EACCES: "permission is denied: name another directory",
            errno.EPERM: "permission is denied: name another directory",
            errno.ENOTDIR: "a part of the path is a file: name another directory",
        }
        if e.errno not in why or elsewhere:
            raise
        raise SlimlineError(f"{path} cannot be written, {why[e.errno]}.") from e


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def atomic_write(path: str | Path, data: bytes) -> Path:
    """Write `data` to `path` so that a reader, or a restart, sees the old file or the new one and nothing between."""
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_synced(part, data)
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    return path


@contextmanager
def atomic_folder(path: str | Path, part: Path | None = None) -> Iterator[Path]:
    """A fresh folder to fill, which takes the place of `path` when the block ends well and vanishes when not.

    `part` is where it is filled, on the same file system; by default a hidden neighbour of `path`.
    """
    path = Path(path)
    part = part or path.with_name(f".{path.name}.part")
    with writing(path):
        _remove(part)
        part.mkdir(parents=True)
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        _remove(path)
        part.rename(path)
        _sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            _remove(part)
        raise


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
