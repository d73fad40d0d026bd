"""The run directory: everything a compression did, so that it can be killed anywhere and go on.

A run is a list of stages. A stage works in a folder of its own that is moved into place when it is whole, and then
noted in ``journal.jsonl`` with a key, which is a hash of all that it was made from, and the hashes of its files. A
stage whose key and files are as noted is not done again; a stage with another key (an edited recipe, an earlier stage
that came out differently) is.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
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
from slimline.run.claim import check_free, claim, locked, undo
from slimline.run.durations import Durations
from slimline.run.history import History, Record
from slimline.run.integrity import Difference, Integrity
from slimline.run.journal import Computed, Created, Decision, Finished, Note, Stage, dump, fingerprint
from slimline.run.layout import DURATIONS, JOURNAL, RECIPE, REPORT, STAGES, WORK
from slimline.run.seal import is_own, seal
from slimline.run.workspace import Workspace
from slimline.runtimes.base import runtime

if TYPE_CHECKING:
    from slimline.measure.certificate import Certificate
    from slimline.measure.results import Report
    from slimline.model import Model

log = logging.getLogger(__name__)

T = TypeVar("T")


class Run:
    """One compression on disk. Made by `Run.create`, taken up again by `Run.open`; use it in a ``with`` block.

    Attributes
    ----------
    path : the directory.
    recipe : what it does, fully resolved.
    created : the journal's first record: ``version``, ``versions``, ``recipe``, ``command``, ``sources``, ``data``,
        ``model`` and ``teacher`` (fingerprints), ``title``.
    durations : when the run was started and how long its stages took, until it is finished.
    """

    def __init__(self, path: Path, history: History, lock: int | None, new: Iterable[Path] = ()) -> None:
        self.path = path
        self.created: Record = history.created
        self.recipe = history.recipe
        self.durations = Durations(path / DURATIONS)
        self._history, self._lock, self._new_paths = history, lock, list(new)
        self._integrity, self._workspace = Integrity(path, history), Workspace(path)
        self._used: list[str] = []

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
            new, lock = claim(path)
            try:
                check_free(path)
                new += [f for f in (path / WORK,) if not f.exists()]
                new += [path / STAGES, path / JOURNAL, path / RECIPE]
                atomic_write(path / JOURNAL, dump(first), below(path, WORK, f"{JOURNAL}.part"))
                run = cls(path, History(path), lock, new)
                run.write(RECIPE, text.encode())
                run.durations.start()
            except BaseException:
                undo(path, new)
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
            held = locked(path)[0] if lock else None
            try:
                history = History(path)
                journal = history.journal
                if journal.damaged:
                    lines = ", ".join(map(str, journal.damaged))
                    log.warning("Lines %s of %s are damaged: what they noted counts as not done.", lines, journal.path)
                if lock:
                    journal.mend()
                return cls(path, history, held)
            except BaseException:
                if held is not None:
                    os.close(held)
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, Exception) and self._new_paths and not self._history.stages:
            with contextlib.suppress(OSError, SlimlineError):
                self._sweep()
            undo(self.path, self._new_paths)  # nothing to go on from: take back what `create` made, and nothing else
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
        earlier = self._history.stages.get(name)
        if not why and earlier is not None:
            return final, dict(earlier.record)
        if earlier is not None:
            log.warning("Stage %s is done again: %s.", name, why)
        with writing(self.path):
            self._workspace.sweep({name}, keep=_scratch(name, key))
            part = self._workspace.part(name)
            files: dict[str, str] = {}
            try:
                record = self.timed(name, lambda: json.loads(json.dumps(work(part) or {})))
                inside = [f for f in sorted(part.rglob("*")) if is_plain(f)]
                files = {(where / f.relative_to(part)).as_posix(): sha256(f) for f in inside}
                install(part, final)
                for old in () if earlier is None else earlier.files.keys() - files.keys():
                    below(self.path, old).unlink(missing_ok=True)
                self._history.append(Stage(event="stage", name=name, key=key, files=files, record=record))
            except BaseException as e:
                with contextlib.suppress(OSError):
                    shutil.rmtree(part)
                if earlier is None:
                    self._workspace.take_back(files)
                if isinstance(e, Exception) and not isinstance(e, SlimlineError | OSError) and _full(self.path):
                    raise SlimlineError(f"{self.path} cannot be written, the disk is full: free some space.") from e
                raise
            self._workspace.sweep({name})
        return final, dict(record)

    def timed(self, name: str, work: Callable[[], T]) -> T:
        """What `work` gives; how long it took is noted among the `durations`."""
        start = monotonic()
        result = work()
        self.durations.note(name, monotonic() - start)
        return result

    def due(self, name: str, key: str = "") -> str:
        """Why stage `name` is to be done, or done again; '' where it stands as the journal says."""
        stage = self._history.stages.get(name)
        if stage is None:
            return "it is not done"
        if stage.key != key:
            return "the recipe, or an earlier stage, is another than it was done with"
        return "; ".join(map(str, self._integrity.differences(stage.files)))

    def digest(self, name: str) -> str:
        """A hash of what stage `name` gave, '' where it is not done."""
        files = self.files_of(name)
        return fingerprint(sorted((Path(f).name, h) for f, h in files.items())) if self.has_stage(name) else ""

    def files_of(self, name: str) -> dict[str, str]:
        """SHA-256 of the files of stage `name`, by path in the run."""
        stage = self._history.stages.get(name)
        return {} if stage is None else dict(stage.files)

    def scratch(self, name: str, key: str = "") -> Path:
        """A folder for the checkpoints of stage `name`: survives a kill, and goes when the stage is done.

        Nobody finds there what was left by work with another `key` or with other versions of the packages.
        """
        with writing(self.path):
            return self._workspace.folder(_scratch(name, key))

    def has_stage(self, name: str) -> bool:
        """Whether the journal says that stage `name` is done."""
        return name in self._history.stages

    def decide(self, name: str, choose: Callable[[], Record], key: str = "") -> Record:
        """What `choose` answers, asked once in the life of a run: the journal holds the answer before it is used.

        For whatever a clock decides. `name` and `key` (a hash of what the answer is for) are unique in the run; the
        answer is JSON.
        """
        if (name, key) not in self._history.decisions:
            answer = json.loads(json.dumps(choose()))
            self._history.append(Decision(event="decision", name=name, key=key, record=answer))
        return dict(self._history.decisions[name, key])

    def decided(self, name: str, key: str = "") -> bool:
        """Whether `decide` was asked this before."""
        return (name, key) in self._history.decisions

    def note(self, event: str, **record: Any) -> None:
        """Append something worth knowing to the journal."""
        self._history.append(Note.model_validate({"event": event, **record}))

    def write(self, name: str, data: bytes) -> Path:
        """Write the file `name` of the run, whole or not at all."""
        return self._workspace.write(name, data)

    def adopt(self, recipe: Recipe) -> None:
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
        if read == self._history.replaced:  # killed inside `adopt`
            self.write(RECIPE, self.recipe.dump().encode())
            return
        log.warning("%s was edited: the run goes on from the first stage that this touches.", path)
        self._resolve(read, edited=True)
        self.write(RECIPE, read.dump().encode())

    @property
    def finished(self) -> bool:
        """Whether all is done."""
        return self._history.finished

    @property
    def devices(self) -> list[str]:
        """On which training, calibration and gradients were computed, in their order; more than one where it went on
        elsewhere."""
        return self._history.devices

    @property
    def own(self) -> bool:
        """Whether this user started the run on this machine, and its first line is as it was then."""
        return is_own(self.created)

    @property
    def begun(self) -> Recipe:
        """The recipe that the run was started with."""
        return self._history.begun

    @property
    def wish(self) -> Recipe:
        """The recipe as the user gave it last, before it was fitted to the budget."""
        return self._history.wish

    @property
    def base(self) -> str:
        """A hash of `wish`."""
        return self._history.base

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
            self._history.append(Computed(event="device", device=device))

    def finish(self, files: Iterable[str] = ()) -> None:
        """Note that the run is whole, with the hashes of the `files` it leaves for use; clear away what only served to
        go on."""
        if not self.finished:
            hashes = {name: sha256(below(self.path, name)) for name in files}
            stages = list(self._used)
            self._history.append(
                Finished(event="finished", files=hashes, stages=stages, journal=self._history.journal.digest())
            )
        self._sweep()

    def reopen(self) -> None:
        """Go on with a run that was finished and is not whole any more."""
        self._history.finished = False

    def verify(self) -> list[Difference]:
        """What is not as the run left it, see `slimline.run.integrity.Integrity.verify`."""
        return self._integrity.verify()

    @property
    def files(self) -> dict[str, str]:
        """SHA-256 of every file that the journal speaks of, by its path in the run."""
        return self._integrity.files

    def restore(self) -> list[Difference]:
        """Make again what can be, see `slimline.run.integrity.Integrity.restore`; what is still not as it was."""
        return self._integrity.restore(self.recipe)

    @property
    def report(self) -> Report:
        """What was measured; refused where any file that it speaks of was altered."""
        self._integrity.end("report", REPORT)
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
        target = str(self.recipe.target)
        return self._file("artifact", lambda f: f.parent == Path(target) and f.suffix == runtime(target).suffix)

    @property
    def model(self) -> Model:
        """The compressed network in its framework."""
        self._file("model", _is_model)
        return self._model

    @cached_property
    def _model(self) -> Model:
        from slimline.model.loading import load

        return load(self._file("model", _is_model))

    def _file(self, what: str, is_it: Callable[[Path], bool]) -> Path:
        end = self._integrity.end(what)
        tops = {Path(*Path(name).parts[:2]) for name in end.files}  # what lies deeper belongs to a folder
        named = [top for top in tops if is_it(top) and top.stem == "model"]
        if len(named) != 1:
            raise SlimlineError(f"{self.path} names no {what}: start a new run in another directory.")
        return below(self.path, named[0])

    def _resolve(self, recipe: Recipe, edited: bool) -> None:
        self._history.resolve(recipe, edited)
        self.recipe = recipe

    def _sweep(self) -> None:
        """Remove what all stages have left in the folder of unfinished work."""
        self._workspace.sweep({*self._history.stages, *self._used}, whole=True)


def versions() -> dict[str, str]:
    """Versions of the packages that decide what a run computes, of those that are installed."""
    return installed(deciding())


def _scratch(name: str, key: str) -> str:
    """The name of a stage's folder of checkpoints, by all that they depend on."""
    return f"{name}@{fingerprint([key, versions()])[:12]}"


def _is_model(file: Path) -> bool:
    return file.parent == Path() and file.suffix in written()


def _full(path: Path) -> bool:
    """Whether so little space is left that what failed has failed for it."""
    return shutil.disk_usage(path).free < 1_000_000
