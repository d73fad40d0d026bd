"""Files that are whole or not there, and that are never written through a symbolic link."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from slimline.basics.errors import SlimlineError

_WHY = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EFBIG: "a file would become larger than this system allows: raise the limit (ulimit -f)",
    errno.EROFS: "the file system is read-only: name another directory",
    errno.EACCES: "permission is denied: name another directory",
    errno.EPERM: "permission is denied: name another directory",
    errno.ENOTDIR: "a part of the path is a file: name another directory",
    errno.EISDIR: "a directory is in the way: remove it, or name another directory",
    errno.ELOOP: "a symbolic link is in the way: remove it, or name another directory",
    errno.ENAMETOOLONG: "the name is too long: name another directory",
    errno.EIO: "the disk reports an error: check it",
    errno.EMFILE: "too many files are open: close some (ulimit -n)",
}
_HERE = (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an operating system's refusal to write at or below `path` into a sentence."""
    try:
        yield
    except OSError as e:
        named = None if e.filename is None else Path(os.fsdecode(e.filename))
        if named is not None and not named.is_relative_to(path.parent):
            raise
        if e.errno in _WHY:
            raise SlimlineError(f"{path} cannot be written, {_WHY[e.errno]}.") from e
        if e.errno in _HERE and named is not None:
            why = f"{os.strerror(e.errno)} ({named.name}): leave the directory alone while it is written"
            raise SlimlineError(f"{path} cannot be written, {why}.") from e
        raise


def below(root: Path, *parts: str | Path) -> Path:
    """The path of `parts` under `root`, for reading and writing what belongs to `root` alone.

    Raises
    ------
    SlimlineError
        A path that leads out of `root`, or a symbolic link anywhere on it below `root`.
    """
    relative = PurePosixPath(*(str(p) for p in parts))
    if relative.is_absolute() or ".." in relative.parts or "\0" in str(relative) or not relative.parts:
        raise SlimlineError(f"{str(relative)!r} is no path inside {root}: name files by their place in it.")
    path = root
    for part in relative.parts:
        path = path / part
        if _is_link(path):
            raise SlimlineError(f"{path} is a symbolic link, which slimline never follows: remove it.")
    return path


def _is_link(path: Path) -> bool:
    try:
        return path.is_symlink()
    except (OSError, ValueError):  # a name that no file can have
        return False


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_plain(path: Path) -> bool:
    """Whether there is a regular file at `path`, itself and not by a link."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


def read_plain(path: Path, limit: int) -> bytes:
    """What a regular file of at most `limit` bytes holds; a link, a pipe and a device are refused."""
    if not is_plain(path):
        raise SlimlineError(f"{path} is no regular file: remove it.")
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise SlimlineError(f"{path} is larger than {limit // 1_000_000} MB, which no such file is: remove it.")
    return data


def write_new(path: Path, data: bytes) -> None:
    """Write a file that must not be there yet, and wait until it is on disk."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        write_all(handle, data)
        os.fsync(handle)
    finally:
        os.close(handle)


def write_all(handle: int, data: bytes) -> None:
    """Write all of `data`, which one call of the system may cut short."""
    remaining = memoryview(data)
    while remaining:
        remaining = remaining[os.write(handle, remaining) :]


def atomic_write(path: str | Path, data: bytes, part: Path | None = None) -> Path:
    """Write `data` to `path` so that a reader, or a restart, sees the old file or the new one and nothing between.

    `part` is where it is written first, on the same file system and nobody else's; by default a hidden neighbour.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, part) as part:
            write_new(part, data)
    return path


@contextmanager
def replacing(path: Path, part: Path | None = None) -> Iterator[Path]:
    """Where a file is to be written and brought to disk before it takes the place of `path`; nothing is left of it if
    that fails. `part` is as of `atomic_write`."""
    if part is None:
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    else:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
    try:
        yield part
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    sync(path.parent)


def install(part: Path, final: Path) -> None:
    """Move all that the folder `part` holds to the folder `final`, in which other files stay as they are.

    Everything is on disk before it moves. Where `final` is not there yet, it appears whole.
    """
    for entry in sorted(part.rglob("*")):
        if entry.is_symlink():
            raise SlimlineError(f"{entry} is a symbolic link, which slimline never follows: remove it.")
        if entry.is_file():
            sync(entry)
    for folder in (*(f for f in part.rglob("*") if f.is_dir()), part):
        sync(folder)
    final.parent.mkdir(parents=True, exist_ok=True)
    if not final.exists():
        part.rename(final)
        sync(final.parent)
        return
    for entry in sorted(part.rglob("*")):
        to = below(final, entry.relative_to(part))
        if entry.is_dir():
            to.mkdir(exist_ok=True)
        else:
            entry.replace(to)
    for folder in (*(f for f in part.rglob("*") if f.is_dir()), part):
        sync(final / folder.relative_to(part))
    shutil.rmtree(part)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
