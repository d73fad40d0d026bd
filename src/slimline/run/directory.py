"""The run directory: everything a compression did, so that it can be killed anywhere and go on.

A run is a list of stages. A stage works in a folder of its own that is moved into place when it is whole, and then
noted in ``journal.jsonl`` with a key, which is a hash of all that it was made from, and the hashes of its files. A
stage whose key and files are as noted is not done again; a stage with another key (an edited recipe, an earlier stage
that came out differently) is.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from slimline.basics import arguments
from slimline.basics.arguments import takes
from slimline.basics.errors import SlimlineError
from slimline.basics.plugins import installed
from slimline.files.atomic import atomic_write, below, install, is_plain, read_plain, sha256, writing
from slimline.frameworks.base import written
from slimline.measure.results import deciding
from slimline.recipe.recipe import LONGEST, Recipe, parse
from slimline.run.durations import Durations
from slimline.run.journal import (
    JOURNAL,
    Computed,
    Created,
    Decision,
    Event,
    Finished,
    Journal,
    Note,
    Resolved,
    Stage,
    dump,
    fingerprint,
)
from slimline.run.seal import is_own, seal

if TYPE_CHECKING:
    from slimline.measure.certificate import Certificate
    from slimline.measure.results import Report
    from slimline.model import Model

log = logging.getLogger(__name__)

RECIPE = "recipe.yaml"
REPORT = "report.json"
LOCK = ".lock"
WORK = ".work"
DURATIONS = f"{WORK}/durations.jsonl"
STAGES = "stages"
Record = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Difference:
    """A file of a run that is not as the run left it: its path in the run, and what is wrong with it."""

    path: str
    what: str

    def __str__(self) -> str:
        return f"{self.path} {self.what}"


class Run:
    """One compression on disk. Made by `Run.create`, taken up again by `Run.open`; use it in a ``with`` block.

    Attributes
    ----------
    path : the directory.
    recipe : what it does, fully resolved.
    finished : whether all is done.
    created : the journal's first record: ``version``, ``versions``, ``recipe``, ``command``, ``sources``, ``data``,
        ``model`` and ``teacher`` (fingerprints), ``title``.
    devices : on which training, calibration and gradients were computed, in their order; more than one where it went on
        elsewhere.
    durations : when the run was started and how long its stages took, until it is finished.
    """

    def __init__(self, path: Path, journal: Journal, lock: int | None, made: Iterable[Path] = ()) -> None:
        self.path = path
        self._journal, self._lock, self._made = journal, lock, list(made)
        self.durations = Durations(path / DURATIONS)
        self.created: Record = journal.created.model_dump(mode="json", by_alias=True)
        self._recipes = [(journal.created.recipe, True)]
        self._stages: dict[str, Stage] = {}
        self._decisions: dict[tuple[str, str], Record] = {}
        self._used: list[str] = []
        self.devices: list[str] = []
        self.finished = False
        for event in journal.events[1:]:
            self._take(event)
        self.recipe = self._parsed(self._recipes[-1][0])
        self._trusted: dict[str, tuple[Any, ...]] = {}

    def __repr__(self) -> str:
        return f"<Run {str(self.path)!r}, {'finished' if self.finished else 'not finished'}>"

    @classmethod
    def create(
        cls,
        path: str | Path,
        recipe: Recipe,
        *,
        command: list[str] | None = None,
        sources: Mapping[str, Any] | None = None,
        data: str | None = None,
        model: str | None = None,
        teacher: str | None = None,
        title: str | None = None,
    ) -> Run:
        """Start a run in a new or empty directory, all or nothing; of many who try at once, one does.

        Parameters
        ----------
        command : the words that reproduce it.
        sources : JSON records from which model and data can be loaded again (`slimline.run.sources`).
        data : `slimline.Data.fingerprint`, so that other data is refused when the run goes on.
        model, teacher : fingerprints, so that other models are.
        title : what is compressed, for people.
        """
        from slimline.basics.version import __version__

        path = Path(path).resolve()
        text = recipe.dump()
        first = Created(
            event="created",
            schema_=2,
            version=__version__,
            versions=versions(),
            recipe=recipe.model_dump(mode="json", by_alias=True),
            command=command,
            sources=None if sources is None else json.loads(json.dumps(dict(sources))),
            data=data,
            model=model,
            teacher=teacher,
            title=title,
        )
        first = first.model_copy(update={"seal": seal(first.model_dump(mode="json", by_alias=True))})
        with writing(path):
            made, lock = _claim(path)
            try:
                _check_free(path)
                made += [f for f in (path / WORK,) if not f.exists()]
                made += [path / STAGES, path / JOURNAL, path / RECIPE]
                atomic_write(path / JOURNAL, dump(first), below(path, WORK, f"{JOURNAL}.part"))
                run = cls(path, Journal(path), lock, made)
                run.write(RECIPE, text.encode())
                run.durations.start()
            except BaseException:
                _undo(path, made)
                os.close(lock)
                raise
        return run

    @classmethod
    @takes(path=arguments.path)
    def open(cls, path: str | Path, lock: bool = True) -> Run:
        """Take up the run in `path`; ``lock=False`` only reads it, also while another process works on it."""
        path = Path(path).resolve()
        if not os.path.lexists(path / JOURNAL):
            raise SlimlineError(f"{path} holds no run: name the directory that slimline compress wrote.")
        with writing(path):
            held = _locked(path)[0] if lock else None
            try:
                journal = Journal(path)
                if journal.damaged:
                    lines = ", ".join(map(str, journal.damaged))
                    log.warning("Lines %s of %s are damaged: what they noted counts as not done.", lines, journal.path)
                if lock:
                    journal.mend()
                return cls(path, journal, held)
            except BaseException:
                if held is not None:
                    os.close(held)
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, Exception) and self._made and not self._stages:
            with contextlib.suppress(OSError, SlimlineError):
                self._sweep()
            _undo(self.path, self._made)  # nothing to go on from: take back what `create` made, and nothing else
        self.close()

    def close(self) -> None:
        """Let other processes take up the run."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def check(self, what: str, print_: str) -> None:
        """Refuse data (or a model) other than the run was started with, by its fingerprint."""
        if self.created.get(what) not in (None, print_):
            other = "other data" if what == "data" else f"another {what}"
            raise SlimlineError(f"{self.path} was started with {other}: give the same, or start a new run.")

    def check_data(self, print_: str) -> None:
        """Refuse data other than the run was started with."""
        self.check("data", print_)

    def stage(
        self,
        name: str,
        work: Callable[[Path], Record | None],
        place: str | Path | None = None,
        key: str = "",
    ) -> tuple[Path, Record]:
        """Do a stage unless the journal says it is done; its folder and its record.

        Parameters
        ----------
        name : unique in the run; letters, digits, ``-``, ``_`` and ``.``.
        work : called with an empty folder to write its files to; returns what the journal should keep, as JSON.
        place : where the folder goes in the run, ``stages/NAME`` by default.
        key : a hash of all that decides what the stage gives; one that was done with another key is done again.

        A stage must depend on nothing but the recipe, the sources and earlier stages; then a run that is killed
        and goes on ends with the same bytes.
        """
        where = Path(place or Path(STAGES) / name)
        final = below(self.path, where)
        self._used = [*(n for n in self._used if n != name), name]
        why = self.due(name, key)
        done = self._stages.get(name)
        if not why and done is not None:
            return final, dict(done.record)
        if done is not None:
            log.warning("Stage %s is done again: %s.", name, why)
        with writing(self.path):
            self._sweep(name, key)
            part = below(self.path, WORK, f"{name}.part")
            part.mkdir(parents=True)
            files: dict[str, str] = {}
            try:
                record = self.timed(name, lambda: json.loads(json.dumps(work(part) or {})))
                inside = [f for f in sorted(part.rglob("*")) if is_plain(f)]
                files = {(where / f.relative_to(part)).as_posix(): sha256(f) for f in inside}
                install(part, final)
                for old in () if done is None else done.files.keys() - files.keys():
                    below(self.path, old).unlink(missing_ok=True)
                self._append(Stage(event="stage", name=name, key=key, files=files, record=record))
            except BaseException as e:
                with contextlib.suppress(OSError):
                    shutil.rmtree(part)
                if done is None:
                    self._take_back(files)
                if isinstance(e, Exception) and not isinstance(e, SlimlineError | OSError) and _full(self.path):
                    raise SlimlineError(f"{self.path} cannot be written, the disk is full: free some space.") from e
                raise
            self._sweep(name)
        return final, dict(record)

    def timed(self, name: str, work: Callable[[], T]) -> T:
        """What `work` gives; how long it took is noted among the `durations`."""
        start = monotonic()
        result = work()
        self.durations.note(name, monotonic() - start)
        return result

    def due(self, name: str, key: str = "") -> str:
        """Why stage `name` is to be done, or done again; '' where it stands as the journal says."""
        done = self._stages.get(name)
        if done is None:
            return "it is not done"
        if done.key != key:
            return "the recipe, or an earlier stage, is another than it was done with"
        return "; ".join(map(str, self._differences(done.files)))

    def digest(self, name: str) -> str:
        """A hash of what stage `name` gave, '' where it is not done."""
        done = self._stages.get(name)
        return "" if done is None else fingerprint(sorted((Path(f).name, h) for f, h in done.files.items()))

    def files_of(self, name: str) -> dict[str, str]:
        """SHA-256 of the files of stage `name`, by path in the run."""
        done = self._stages.get(name)
        return {} if done is None else dict(done.files)

    def scratch(self, name: str, key: str = "") -> Path:
        """A folder for the checkpoints of stage `name`: survives a kill, and goes when the stage is done.

        Nobody finds there what was left by work with another `key` or with other versions of the packages.
        """
        folder = below(self.path, WORK, _scratch(name, key))
        with writing(self.path):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def done(self, name: str) -> bool:
        """Whether the journal says that stage `name` is done."""
        return name in self._stages

    def decide(self, name: str, choose: Callable[[], Record], key: str = "") -> Record:
        """What `choose` answers, asked once in the life of a run: the journal holds the answer before it is used.

        For whatever a clock decides. `name` and `key` (a hash of what the answer is for) are unique in the run; the
        answer is JSON.
        """
        if (name, key) not in self._decisions:
            answer = json.loads(json.dumps(choose()))
            self._append(Decision(event="decision", name=name, key=key, record=answer))
        return dict(self._decisions[name, key])

    def decided(self, name: str, key: str = "") -> bool:
        """Whether `decide` was asked this before."""
        return (name, key) in self._decisions

    def note(self, event: str, **record: Any) -> None:
        """Append something worth knowing to the journal."""
        self._append(Note.model_validate({"event": event, **record}))

    def write(self, name: str, data: bytes) -> Path:
        """Write the file `name` of the run, whole or not at all."""
        return atomic_write(below(self.path, name), data, below(self.path, WORK, f"{name}.part"))

    def settle(self, recipe: Recipe) -> None:
        """Go on with `recipe`, which was fitted to the budget, in place of the one it was fitted from."""
        self._resolve(recipe, edited=False)
        self.write(RECIPE, recipe.dump().encode())

    def read_recipe(self) -> None:
        """Take over a ``recipe.yaml`` that was edited, and write one again that is missing."""
        path = below(self.path, RECIPE)
        if not os.path.lexists(path):
            log.warning("%s was missing: written again from the journal.", path)
            self.write(RECIPE, self.recipe.dump().encode())
            return
        read = parse(read_plain(path, LONGEST).decode("utf-8", "replace"), str(path))
        if read.target is None:
            read = read.model_copy(update={"target": self.recipe.target})
        if read == self.recipe:
            return
        before = self._recipes[-2:-1]
        if before and not self._recipes[-1][1] and read == self._parsed(before[0][0]):  # killed inside `settle`
            self.write(RECIPE, self.recipe.dump().encode())
            return
        log.warning("%s was edited: the run goes on from the first stage that this touches.", path)
        self._resolve(read, edited=True)
        self.write(RECIPE, read.dump().encode())

    @property
    def own(self) -> bool:
        """Whether this user started the run on this machine, and its first line is as it was then."""
        return is_own(self.created)

    @property
    def begun(self) -> Recipe:
        """The recipe that the run was started with."""
        return self._parsed(self._recipes[0][0])

    @property
    def wish(self) -> Recipe:
        """The recipe as the user gave it last, before it was fitted to the budget."""
        return self._parsed(next(recipe for recipe, edited in reversed(self._recipes) if edited))

    @property
    def base(self) -> str:
        """A hash of `wish`."""
        return fingerprint(next(recipe for recipe, edited in reversed(self._recipes) if edited))

    def read_versions(self) -> None:
        """Say where packages are not those that the run was begun with: what is done stays, the rest is done anew."""
        begun, now = self.created["versions"], versions()
        differing = [name for name in deciding() if begun.get(name) != now.get(name)]
        changed = [f"{name} {begun.get(name, 'none')} → {now.get(name, 'none')}" for name in differing]
        if changed:
            log.warning(
                "%s was begun with other versions (%s): stages that are done stay, and the rest is done with these.",
                self.path,
                ", ".join(changed),
            )

    def compute_on(self, device: str) -> None:
        """Note where training, calibration and gradients are computed from here on, and say so where it is elsewhere
        than before: numbers may differ in their last digits."""
        before = self.devices[-1] if self.devices else device
        if before != device:
            log.warning(
                "%s was computed on %s: stages that are done stay, and the rest is computed on %s.",
                self.path,
                before,
                device,
            )
        if self.devices[-1:] != [device]:
            self._append(Computed(event="device", device=device))

    def finish(self, files: Iterable[str] = ()) -> None:
        """Note that the run is whole, with the hashes of the `files` it leaves for use; clear away what only served to
        go on."""
        if not self.finished:
            hashes = {name: sha256(below(self.path, name)) for name in files}
            stages = list(self._used)
            self._append(Finished(event="finished", files=hashes, stages=stages, journal=self._journal.digest()))
        self._sweep()

    def reopen(self) -> None:
        """Go on with a run that was finished and is not whole any more."""
        self.finished = False

    def verify(self) -> list[Difference]:
        """What is not as the run left it, read from the files themselves; nothing where the run is finished and sound.

        This guards against accidents and edits, not against somebody who writes a new journal too.
        """
        found = [Difference(JOURNAL, f"is damaged in line {number}") for number in self._journal.damaged]
        end = self._journal.finished()
        if end is None:
            found.append(Difference(JOURNAL, "does not say that the run was finished"))
            return [*found, *self._differences(self.files)]
        if not end[1] and not found:
            found.append(Difference(JOURNAL, "was altered"))
        missing = [Difference(JOURNAL, f"has no stage {name}") for name in end[0].stages if name not in self._stages]
        return [*found, *missing, *self._differences(self.files)]

    @property
    def files(self) -> dict[str, str]:
        """SHA-256 of every file that the journal speaks of, by its path in the run."""
        end = self._journal.finished()
        names = list(self._stages) if end is None else [n for n in end[0].stages if n in self._stages]
        of_stages = {f: h for name in names for f, h in self._stages[name].files.items()}
        return of_stages | ({} if end is None else end[0].files)

    def restore(self) -> list[Difference]:
        """Make again what can be copied from elsewhere in the run; what is still not as the run left it.

        Raises
        ------
        SlimlineError : a ``recipe.yaml`` that was edited after the end, which is not overwritten.
        """
        expected = self.files
        differing = self._differences(expected)
        sound = {h: f for f, h in expected.items() if f not in {d.path for d in differing}}
        for difference in differing:
            if difference.path == RECIPE:
                if difference.what != "is missing":
                    raise SlimlineError(
                        f"{self.path / RECIPE} was edited after the run had ended: compress anew with it in another "
                        "directory, or delete it and resume to get back the one that the report speaks of."
                    )
                data = self.recipe.dump().encode()
            elif expected[difference.path] in sound:
                data = below(self.path, sound[expected[difference.path]]).read_bytes()
            else:
                continue
            path = below(self.path, difference.path)
            atomic_write(path, data, below(self.path, WORK, f"{path.name}.part"))
            log.warning("%s %s: made again from the copy that the run holds.", path, difference.what)
        return self.verify()

    @property
    def report(self) -> Report:
        """What was measured; refused where any file that it speaks of was altered."""
        self._check_end("report", REPORT)
        return self._report

    @cached_property
    def _report(self) -> Report:
        from slimline.measure.results import Report

        return Report.from_json(below(self.path, REPORT).read_bytes(), str(self.path / REPORT))

    @property
    def certificate(self) -> Certificate | None:
        """What is proved about the accuracy lost; None where the artifact cannot be run here."""
        return self.report.certificate

    @property
    def artifact(self) -> Path:
        """The compressed file, or folder, that the target runtime loads."""
        return self._the("artifact", lambda f: f.parent == Path(str(self.recipe.target)) and f.suffix != ".data")

    @property
    def model(self) -> Model:
        """The compressed network in its framework."""
        self._the("model", _is_model)
        return self._model

    @cached_property
    def _model(self) -> Model:
        from slimline.model.loading import load

        return load(self._the("model", _is_model))

    def _the(self, what: str, is_it: Callable[[Path], bool]) -> Path:
        end = self._check_end(what)
        tops = {Path(*Path(name).parts[:2]) for name in end.files}  # what lies deeper belongs to a folder
        named = [top for top in tops if is_it(top) and top.stem == "model"]
        if len(named) != 1:
            raise SlimlineError(f"{self.path} names no {what}: start a new run in another directory.")
        return below(self.path, named[0])

    def _check_end(self, what: str, name: str = "") -> Finished:
        """The last line of a finished run all of whose files are as it left them."""
        end = self._journal.finished()
        if end is None or (name and name not in end[0].files):
            raise SlimlineError(f"{self.path} has no {what} yet: finish it with slimline resume {self.path}.")
        if differing := self._differences(end[0].files, remember=True):
            raise SlimlineError(
                f"{self.path} is not as the run left it: {'; '.join(map(str, differing))}; slimline resume {self.path} "
                "makes it again where it can."
            )
        return end[0]

    def _differences(self, files: Mapping[str, str], remember: bool = False) -> list[Difference]:
        """Those of `files` whose hash is another; `remember` takes a file as read that has not been touched since."""
        found = []
        for name, expected in files.items():
            try:
                path = below(self.path, name)
            except SlimlineError:
                found.append(Difference(name, "is, or lies behind, a symbolic link"))
                continue
            if not is_plain(path):
                found.append(Difference(name, "is no file" if os.path.lexists(path) else "is missing"))
                continue
            at = path.stat()
            seen = (at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns, expected)
            if remember and self._trusted.get(name) == seen:
                continue
            if sha256(path) != expected:
                found.append(Difference(name, "was altered"))
            elif remember:
                self._trusted[name] = seen
        return found

    def _resolve(self, recipe: Recipe, edited: bool) -> None:
        self._append(Resolved(event="recipe", recipe=recipe.model_dump(mode="json", by_alias=True), edited=edited))
        self.recipe = recipe

    def _parsed(self, recipe: Record) -> Recipe:
        try:
            return Recipe.model_validate(recipe)
        except RecursionError as e:
            raise SlimlineError(f"{self.path / JOURNAL} holds no recipe: start a new run in another directory.") from e

    def _append(self, event: Event) -> None:
        self._journal.append(event)
        self._take(event)

    def _take(self, event: Event) -> None:
        match event:
            case Stage():
                self._stages[event.name] = event
            case Decision():
                self._decisions[event.name, event.key] = event.record
            case Resolved():
                self._recipes.append((event.recipe, event.edited))
            case Computed():
                self.devices.append(event.device)
        if not isinstance(event, Note):
            self.finished = isinstance(event, Finished)

    def _take_back(self, files: Iterable[str]) -> None:
        """Remove the files of a stage that could not be noted, and the folders that they leave empty."""
        with contextlib.suppress(OSError):
            for name in files:
                (self.path / name).unlink(missing_ok=True)
            for folder in sorted({(self.path / name).parent for name in files}, reverse=True):
                if folder.is_dir():
                    folder.rmdir()

    def _sweep(self, name: str = "", keep: str | None = None) -> None:
        """Remove what stage `name`, or the whole run, has left in the folder of unfinished work.

        `keep` is the key of the checkpoints that stay.
        """
        work = below(self.path, WORK)
        if not work.is_dir():
            return
        ours = {name} if name else {*self._stages, *self._used}
        for entry in list(work.iterdir()):
            stem = entry.name.removesuffix(".part")
            if entry.is_symlink() or (keep is not None and entry.name == _scratch(name, keep)):
                continue
            if stem in ours or (entry.name.rpartition("@")[0] in ours):
                shutil.rmtree(entry)
            elif not name and (entry.suffix == ".part" or entry.name == Path(DURATIONS).name) and is_plain(entry):
                entry.unlink()
        with contextlib.suppress(OSError):
            work.rmdir()  # only where nothing is left in it


def versions() -> dict[str, str]:
    """Versions of the packages that decide what a run computes, of those that are installed."""
    return installed(deciding())


def _scratch(name: str, key: str) -> str:
    """The name of a stage's folder of checkpoints, by all that they depend on."""
    return f"{name}@{fingerprint([key, versions()])[:12]}"


def _is_model(file: Path) -> bool:
    return file.parent == Path() and file.suffix in written()


def _claim(path: Path) -> tuple[list[Path], int]:
    """Make the directory of a run, or take the one that is there, and lock it; what was made, and the lock.

    Only one of many processes or threads holds the lock; whoever does not is refused.
    """
    for _ in range(100):  # a directory may vanish when whoever made it gives up
        made = _make(path)
        try:
            lock, fresh = _locked(path)
        except FileNotFoundError:
            continue
        except SlimlineError as e:
            if isinstance(e.__cause__, BlockingIOError):
                raise SlimlineError(f"{path} is taken by another process: name another directory.") from e
            raise
        return [*made, path / LOCK] if fresh else made, lock
    raise SlimlineError(f"{path} cannot be made, as others remove it: name another directory.")


def _make(path: Path) -> list[Path]:
    """Make a directory with its parents; those that this call made, outermost first."""
    made = []
    for folder in (*reversed(path.parents), path):
        if folder.is_dir():
            continue
        if folder == path and os.path.lexists(folder) and not folder.is_dir():  # it may have come since
            raise SlimlineError(f"{path} is a file: name a directory that does not exist yet.")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            made.append(folder)
    return made


def _check_free(path: Path) -> None:
    if os.path.lexists(path / JOURNAL):
        raise SlimlineError(f"{path} holds another run: go on with slimline resume, or name another directory.")
    left = {f.relative_to(path).as_posix() for f in path.rglob("*")}
    if left - {LOCK, WORK, f"{WORK}/{JOURNAL}.part"}:  # what a kill may leave of an attempt before this one
        raise SlimlineError(f"{path} is not empty: name a new directory.")


def _undo(path: Path, made: Iterable[Path]) -> None:
    """Remove what this call made, files and then empty folders; what others put there stays, and so do its folders."""
    made = list(made)
    files = [f for f in made if f in (path / JOURNAL, path / RECIPE)]
    if files and path / WORK in made:
        files += [path / WORK / f"{JOURNAL}.part", path / DURATIONS]
    inside = [f for f in made if path in f.parents and f not in files and f != path / LOCK]
    outside = [f for f in made if path not in f.parents]
    # Whoever finds no lock may take the directory at once, so that nothing inside it is touched after the lock.
    for remove, those in (
        (Path.unlink, files),
        (Path.rmdir, reversed(inside)),
        (Path.unlink, [f for f in made if f == path / LOCK]),
        (Path.rmdir, reversed(outside)),
    ):
        for entry in those:
            with contextlib.suppress(OSError):
                remove(entry)


def _locked(path: Path) -> tuple[int, bool]:
    """Hold the run in `path` until the process ends, however it ends; and whether this call made the lock's file."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    while True:
        file = below(path, LOCK)
        try:
            handle, fresh = os.open(file, flags | os.O_CREAT | os.O_EXCL, 0o644), True
        except FileExistsError:
            try:
                handle, fresh = os.open(file, flags), False
            except FileNotFoundError:
                continue  # removed in between
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), file.stat()):
                return handle, fresh
        except FileNotFoundError:
            pass
        except BlockingIOError as e:
            os.close(handle)
            raise SlimlineError(f"Another process is working on {path}: wait until it ends.") from e
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # the file was removed by whoever held it before: take the new one


def _full(path: Path) -> bool:
    """Whether so little space is left that what failed has failed for it."""
    return shutil.disk_usage(path).free < 1_000_000
