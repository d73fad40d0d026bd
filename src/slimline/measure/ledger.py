"""Which models were scored on which certification samples: what makes it noticed that samples are used again.

It lies in the user's state directory (`slimline.files.state`), in ``certificates``: ``uses.jsonl`` with a line per
model, and in ``samples`` the hashes of the samples of each set, never the samples. Sets that share samples count as
one, so another seed, another order or a part of the same test set is the same test set.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slimline.files.state import state_folder

_SHARED = 0.01
"""The part of the smaller of two sets that must be in both for them to be the same test."""
_held: list[tuple[str, np.ndarray, str, int]] = []


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
    model = hashlib.sha256(f"{_sha256(original)} {_sha256(compressed)} {metric}".encode()).hexdigest()
    folder = state_folder()
    if folder is not None:
        try:
            with _locked(folder / "certificates") as here:
                return Use(_enter(here, hashes, entry, model))
        except OSError:
            pass
    where = "there is no state directory" if folder is None else f"{folder} cannot be written"
    note = f"Earlier certificates on these samples are known only of this process, as {where}."
    return Use(_enter(None, hashes, entry, model), note)


def _enter(folder: Path | None, hashes: np.ndarray, entry: str, model: str) -> int:
    """The number of this use, entered if it is new; `folder` None is the memory of this process."""
    known = _held if folder is None else list(_read(folder))
    for samples, _, used_by, number in known:
        if (samples, used_by) == (entry, model):
            return number
    # The same model on another part of the test set is another try, too.
    number = 1 + sum(samples == entry or _overlap(held, hashes) for samples, held, _, _ in known)
    if folder is None:
        _held.append((entry, hashes, model, number))
    else:
        _write(folder, hashes, {"samples": entry, "model": model, "use": number})
    return number


def _overlap(one: np.ndarray, other: np.ndarray) -> bool:
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared > 0 and shared >= _SHARED * min(len(one), len(other))


def _read(folder: Path) -> Iterator[tuple[str, np.ndarray, str, int]]:
    """The entries; a line that was cut off, or is none, is passed over."""
    file = folder / "uses.jsonl"
    sets: dict[str, np.ndarray] = {}
    for line in file.read_bytes().splitlines() if file.exists() else []:
        try:
            record = json.loads(line)
            samples, model, number = str(record["samples"]), str(record["model"]), int(record["use"])
            if len(samples) != 64 or not set(samples) <= set("0123456789abcdef") or number < 1:
                continue
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if samples not in sets:
            sets[samples] = _samples(folder / "samples" / f"{samples}.npy")
        yield samples, sets[samples], model, number


def _samples(path: Path) -> np.ndarray:
    """The hashes of a set, ascending; none where they cannot be read."""
    try:
        found: Any = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return np.empty(0, np.uint64)
    return np.unique(found) if found.dtype == np.uint64 else np.empty(0, np.uint64)


def _write(folder: Path, hashes: np.ndarray, record: dict[str, Any]) -> None:
    samples = folder / "samples" / f"{record['samples']}.npy"
    if not samples.exists():
        samples.parent.mkdir(exist_ok=True)
        part = samples.with_suffix(".part")
        with part.open("wb") as file:
            np.save(file, hashes)
            file.flush()
            os.fsync(file.fileno())
        part.replace(samples)
    path = folder / "uses.jsonl"
    whole = not path.exists() or not path.stat().st_size or path.read_bytes().endswith(b"\n")
    with path.open("ab") as file:
        file.write((b"" if whole else b"\n") + json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
