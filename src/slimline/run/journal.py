"""``journal.jsonl``: what a run did, a line each, every line with a checksum of its own.

A line that is noted is on disk before the call returns. Where a kill cuts the last line off, or a bit of another
flips, that line is no longer there; what it noted is done again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from slimline.basics.errors import SlimlineError
from slimline.files.atomic import atomic_write, below, read_plain, write_all, writing
from slimline.run.layout import JOURNAL, WORK

LIMIT = 256_000_000  # bytes that a journal may have
_LINE = re.compile(rb'(\{.*), "check": "([0-9a-f]{16})"\}', re.DOTALL)


def _inside(path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or not pure.parts or ".." in pure.parts or not path.isprintable():
        raise ValueError("no path inside the run")
    return path


Inside = Annotated[str, AfterValidator(_inside)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow", strict=True, populate_by_name=True)


class Created(_Event):
    """The first line: what the run is.

    Attributes
    ----------
    version : of slimline.
    versions : of all packages that decide what is computed, by name.
    recipe : fully resolved, as JSON.
    command : the words that reproduce it.
    sources : JSON records from which model and data can be loaded again (`slimline.run.sources`).
    data, model, teacher : fingerprints.
    title : what is compressed, for people.
    seal : of all the rest, by a key of the user's (`slimline.run.seal`).
    """

    event: Literal["created"]
    schema_: Annotated[Literal[2], Field(alias="schema")]
    version: str
    versions: dict[str, str]
    recipe: dict[str, Any]
    command: list[str] | None = None
    sources: dict[str, Any] | None = None
    data: str | None = None
    model: str | None = None
    teacher: str | None = None
    title: str | None = None
    seal: str | None = None


class Stage(_Event):
    """A stage that is done.

    Attributes
    ----------
    key : a hash of all that the stage was made from.
    files : SHA-256 of each, by its path in the run.
    record : what the report should say of it.
    """

    event: Literal["stage"]
    name: Name
    key: str
    files: dict[Inside, Hash]
    record: dict[str, Any]


class Decision(_Event):
    """What a clock decided, for the stage (or search) whose inputs hash to `key`."""

    event: Literal["decision"]
    name: str
    key: str
    record: dict[str, Any]


class Resolved(_Event):
    """The recipe from here on: as it was fitted to the budget, or as the user `edited` it."""

    event: Literal["recipe"]
    recipe: dict[str, Any]
    edited: bool


class Computed(_Event):
    """Where training, calibration and gradients are computed from here on, such as ``cpu`` or ``cuda:0``."""

    event: Literal["device"]
    device: str


class Finished(_Event):
    """The end.

    Attributes
    ----------
    files : SHA-256 of all that the run leaves for use, by their paths in it.
    stages : the names of those that led there.
    journal : SHA-256 of the journal's bytes before this line.
    """

    event: Literal["finished"]
    files: dict[Inside, Hash]
    stages: list[Name]
    journal: Hash


class Note(_Event):
    """Anything else worth knowing."""

    event: str


Event = Created | Stage | Decision | Resolved | Computed | Finished | Note
_KINDS = {
    "created": Created,
    "stage": Stage,
    "decision": Decision,
    "recipe": Resolved,
    "device": Computed,
    "finished": Finished,
}


class Journal:
    """The lines of a run's journal, in the order in which they were noted.

    Attributes
    ----------
    events : those that are whole.
    damaged : numbers of the lines that are not, from 1.
    """

    def __init__(self, root: Path) -> None:
        path = below(root, JOURNAL)
        self.root, self.path = root, path
        self.damaged: list[int] = []
        self.events: list[Event] = []
        self._lines: list[bytes] = []
        raw = read_plain(path, LIMIT)
        self._torn = len(raw) - (raw.rfind(b"\n") + 1)
        *lines, _ = raw.split(b"\n")
        for number, line in enumerate(lines, 1):
            event = _event(line)
            if event is not None and isinstance(event, Created) != (number == 1):
                event = None
            if event is None:
                self.damaged.append(number)
            else:
                self.events.append(event)
                self._lines.append(line + b"\n")
        self._before = self._hashes()
        if not self.events or 1 in self.damaged:
            raise SlimlineError(
                f"{path} is damaged in its first line, which says what the run is: start another run elsewhere."
            )

    @property
    def created(self) -> Created:
        """The first event."""
        first = self.events[0]
        assert isinstance(first, Created)
        return first

    def mend(self) -> None:
        """Cut off a last line that a kill left in the middle, and take out the lines that are damaged."""
        if self.damaged:
            atomic_write(self.path, b"".join(self._lines), below(self.root, WORK, f"{JOURNAL}.part"))
        elif self._torn:
            with self._opened() as handle:
                os.ftruncate(handle, os.fstat(handle).st_size - self._torn)
                os.fsync(handle)
        self.damaged, self._torn = [], 0

    def append(self, event: Event) -> None:
        """Note `event`: it is on disk when this returns, whole, or not at all if it raises."""
        line = dump(event)
        with self._opened() as handle:
            size = os.fstat(handle).st_size
            try:
                write_all(handle, line)
                os.fsync(handle)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.ftruncate(handle, size)
                raise
        self.events.append(event)
        self._lines.append(line)
        self._before.append(_extended(self._before[-1], line))

    def finished(self) -> tuple[Finished, bool] | None:
        """The last line, where it says that the run is whole, and whether all lines before it are as they were."""
        for event, before in zip(reversed(self.events), reversed(self._before[:-1]), strict=True):
            if isinstance(event, Finished):
                return event, event.journal == before.hexdigest()
            if not isinstance(event, Note):
                return None
        return None

    def digest(self) -> str:
        """SHA-256 of all whole lines."""
        return str(self._before[-1].hexdigest())

    def _hashes(self) -> list[Any]:
        hashes = [hashlib.sha256()]
        for line in self._lines:
            hashes.append(_extended(hashes[-1], line))
        return hashes

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        with writing(self.root):
            path = below(self.root, JOURNAL)
            handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                if not stat.S_ISREG(os.fstat(handle).st_mode):
                    raise SlimlineError(f"{path} is no regular file: remove it.")
                yield handle
            finally:
                os.close(handle)


def dump(event: Event) -> bytes:
    """The line that notes `event`."""
    body = json.dumps(event.model_dump(mode="json", by_alias=True)).encode()
    return body[:-1] + f', "check": "{hashlib.sha256(body).hexdigest()[:16]}"}}\n'.encode()


def _extended(before: Any, line: bytes) -> Any:
    after = before.copy()
    after.update(line)
    return after


def _event(line: bytes) -> Event | None:
    """What a line notes; None where it is damaged."""
    match = _LINE.fullmatch(line)
    if match is None or hashlib.sha256(match[1] + b"}").hexdigest()[:16] != match[2].decode():
        return None
    try:
        record = json.loads(match[1] + b"}")
        kind: type[Any] = _KINDS.get(record["event"], Note)
        event: Event = kind.model_validate(record)
        return event
    except (ValueError, KeyError, TypeError, RecursionError, ValidationError):
        return None


def fingerprint(facts: Any) -> str:
    """SHA-256 of anything that JSON can say."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
