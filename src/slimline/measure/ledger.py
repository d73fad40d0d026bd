"""Which models were scored on which certification samples: what makes it noticed that samples are used again.

It lies in the user's state directory (`slimline.files.state`), in ``certificates``: ``uses.jsonl`` with a line per
model, and in ``samples`` the hashes of the samples of each set, never the samples. Sets that share samples count as
one, so another seed, another order or a part of the same test set is the same test set.

Where any of it is damaged, what cannot be read is kept in ``damaged``, and every certificate says that uses may be
missing for as long as that folder is there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import itertools
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from slimline.files.atomic import atomic_write, sha256
from slimline.files.state import state_folder
from slimline.runtimes.base import files_of

log = logging.getLogger(__name__)

_SHARED = 0.01
"""The part of the smaller of two sets that must be in both for them to be the same test."""
_FORGOTTEN = "The record of earlier certificates is damaged, so uses of these samples may be missing from the count."


_UNKNOWN = "0" * 64
"""In place of the hash of models that were forgotten."""


class _Record(TypedDict):
    """A line: the hash of a set of samples, that of the models and the score compared on it, and the number of the
    use."""

    samples: str
    model: str
    use: int


_records: list[_Record] = []
_sets: dict[str, np.ndarray] = {}


@dataclass(frozen=True)
class Use:
    """The how-manyth comparison it is on these samples, and what a reader must know of that number."""

    number: int
    note: str = ""


def use(samples: np.ndarray, original: Path, compressed: Path, metric: str) -> Use:
    """Enter that `compressed` is compared with `original` on these samples, unless that is entered already.

    Parameters
    ----------
    samples : hashes of the certification samples, ``(n,)`` uint64.
    original, compressed : the artifacts; the same bytes on the same samples are no new use.
    metric : name of the score.
    """
    hashes = np.unique(samples)
    entry = hashlib.sha256(hashes.tobytes()).hexdigest()
    model = hashlib.sha256(f"{digest(original)} {digest(compressed)} {metric}".encode()).hexdigest()
    folder = state_folder()
    if folder is not None:
        try:
            with _locked(folder / "certificates") as here:
                return _enter_kept(here, hashes, entry, model)
        except OSError:
            pass
    where = "there is no state directory" if folder is None else f"{folder} cannot be written"
    note = f"Earlier certificates on these samples are known only of this process, as {where}."
    _sets[entry] = hashes
    return Use(_enter(_records, _sets, entry, model), note)


def _enter_kept(folder: Path, hashes: np.ndarray, entry: str, model: str) -> Use:
    """The use as the files of `folder` know it, entered there if it is new."""
    records, cut = _read(folder)
    sets = _read_sets(folder / "samples")
    used = {record["samples"] for record in records}
    whole = {name: samples for name, samples in sets.items() if samples is not None}
    known, doubted = len(records), (folder / "damaged").exists()
    lost = used - sets.keys() - {entry}
    damaged = cut or len(whole) < len(sets) or bool(sets.keys() - used) or (bool(lost) and not doubted)
    if damaged:
        _keep_damaged(folder, records, sets, cut)
    number = _enter(records, {**whole, entry: hashes}, entry, model)
    # Entries come before their samples: a kill in between leaves what the same use completes, and no doubt.
    if damaged or len(records) > known:
        atomic_write(folder / "uses.jsonl", b"".join(json.dumps(record).encode() + b"\n" for record in records))
    if entry not in whole:
        stream = io.BytesIO()
        np.save(stream, hashes)
        atomic_write(folder / "samples" / f"{entry}.npy", stream.getvalue())
    return Use(number, _FORGOTTEN if damaged or doubted else "")


def _enter(records: list[_Record], sets: Mapping[str, np.ndarray], entry: str, model: str) -> int:
    """The number of this use, added to `records` if it is new."""
    for record in records:
        if (record["samples"], record["model"]) == (entry, model):
            return record["use"]
    # The same model on another part of the test set is another try, too.
    empty = np.empty(0, np.uint64)
    held = [record["samples"] for record in records]
    number = 1 + sum(name == entry or _overlap(sets.get(name, empty), sets[entry]) for name in held)
    records.append({"samples": entry, "model": model, "use": number})
    return number


def _overlap(one: np.ndarray, other: np.ndarray) -> bool:
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared > 0 and shared >= _SHARED * min(len(one), len(other))


def _read(folder: Path) -> tuple[list[_Record], bool]:
    """The entries, and whether there are lines that are none."""
    file = folder / "uses.jsonl"
    raw = file.read_bytes() if file.exists() else b""
    lines = raw.splitlines()
    records = [record for line in lines if (record := _record(line)) is not None]
    return records, len(records) < len(lines)


def _record(line: bytes) -> _Record | None:
    try:
        fields = json.loads(line)
        record = _Record(samples=fields["samples"], model=fields["model"], use=fields["use"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    named = all(isinstance(name, str) and _is_hash(name) for name in (record["samples"], record["model"]))
    return record if named and type(record["use"]) is int and record["use"] >= 1 else None


def _is_hash(name: str) -> bool:
    return len(name) == 64 and set(name) <= set("0123456789abcdef")


def _read_sets(folder: Path) -> dict[str, np.ndarray | None]:
    """The hashes of each set, ascending, by the name of the set; None where they are not what was written."""
    return {path.stem: _samples(path) for path in sorted(folder.glob("*.npy"))}


def _samples(path: Path) -> np.ndarray | None:
    try:
        samples: Any = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError, MemoryError):
        return None
    return (
        samples if hashlib.sha256(samples.tobytes()).hexdigest() == path.stem and samples.dtype == np.uint64 else None
    )


def _keep_damaged(folder: Path, records: list[_Record], sets: Mapping[str, np.ndarray | None], cut: bool) -> None:
    """Put aside what is damaged (the entries too if some are `cut`), and enter a use for each set without one."""
    aside = folder / "damaged"
    aside.mkdir(exist_ok=True)
    log.warning(
        "The record of certification samples in %s is damaged and may lack earlier uses, as certificates will say: put "
        "back a copy of that folder or delete it to begin anew; what cannot be read is kept in %s.",
        folder,
        aside,
    )
    if cut:
        (folder / "uses.jsonl").replace(_free(aside / "uses.jsonl"))
    used = {record["samples"] for record in records}
    for name, samples in sets.items():
        if samples is None:
            (folder / "samples" / f"{name}.npy").replace(_free(aside / f"{name}.npy"))
        elif name not in used:
            records.append({"samples": name, "model": _UNKNOWN, "use": 1})


def _free(path: Path) -> Path:
    """`path`, or with the first number before its suffix that no file has."""
    numbered = path
    for number in itertools.count(2):
        if not numbered.exists():
            break
        numbered = path.with_stem(f"{path.stem}-{number}")
    return numbered


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    """The folder, made when missing, for this process alone."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(handle)


def digest(artifact: Path) -> str:
    """SHA-256 of an artifact, in hex; of one of several files that of their hashes."""
    hashes = [sha256(file) for file in files_of(artifact)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()
