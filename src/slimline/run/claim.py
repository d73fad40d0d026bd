"""The directory of a run is made, or taken as it is, and locked: by one process alone, and all or nothing."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterable
from pathlib import Path

from slimline.basics.errors import SlimlineError
from slimline.files.atomic import below
from slimline.run.layout import DURATIONS, JOURNAL, LOCK, RECIPE, WORK


def claim(path: Path) -> tuple[list[Path], int]:
    """Make the directory of a run, or take the one that exists, and lock it; the new paths, and the lock.

    Only one of many processes or threads holds the lock; whoever does not is refused.
    """
    for _ in range(100):  # a directory may vanish when whoever made it gives up
        new = _make(path)
        try:
            lock, fresh = locked(path)
        except FileNotFoundError:
            continue
        except SlimlineError as e:
            if isinstance(e.__cause__, BlockingIOError):
                raise SlimlineError(f"{path} is taken by another process: name another directory.") from e
            raise
        return [*new, path / LOCK] if fresh else new, lock
    raise SlimlineError(f"{path} cannot be made, as others remove it: name another directory.")


def check_free(path: Path) -> None:
    """Refuse a directory that holds a run, or anything but what a kill may leave of an attempt to start one."""
    if os.path.lexists(path / JOURNAL):
        raise SlimlineError(f"{path} holds another run: go on with slimline resume, or name another directory.")
    entries = {f.relative_to(path).as_posix() for f in path.rglob("*")}
    if entries - {LOCK, WORK, f"{WORK}/{JOURNAL}.part"}:
        raise SlimlineError(f"{path} is not empty: name a new directory.")


def undo(path: Path, new: Iterable[Path]) -> None:
    """Remove the `new` paths, files and then empty folders; what others put there stays, and so do its folders."""
    new = list(new)
    files = [f for f in new if f in (path / JOURNAL, path / RECIPE)]
    if files and path / WORK in new:
        files += [path / WORK / f"{JOURNAL}.part", path / DURATIONS]
    inside = [f for f in new if path in f.parents and f not in files and f != path / LOCK]
    outside = [f for f in new if path not in f.parents]
    # Whoever finds no lock may take the directory at once, so that nothing inside it is touched after the lock.
    for remove, those in (
        (Path.unlink, files),
        (Path.rmdir, reversed(inside)),
        (Path.unlink, [f for f in new if f == path / LOCK]),
        (Path.rmdir, reversed(outside)),
    ):
        for entry in those:
            with contextlib.suppress(OSError):
                remove(entry)


def locked(path: Path) -> tuple[int, bool]:
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


def _make(path: Path) -> list[Path]:
    """Make a directory with its parents; those that this call made, outermost first."""
    new = []
    for folder in (*reversed(path.parents), path):
        if folder.is_dir():
            continue
        if folder == path and os.path.lexists(folder) and not folder.is_dir():  # it may have come since
            raise SlimlineError(f"{path} is a file: name a directory that does not exist yet.")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            new.append(folder)
    return new
