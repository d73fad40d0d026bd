"""The mark by which slimline knows a run that this user started on this machine.

It is an HMAC of the journal's first line, which names all that a run would import or unpickle. The key lies outside
every run (`slimline.files.state`), readable by its owner alone, so that nobody else can make the mark, and whoever
changes the line loses it.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimline.files.state import state_folder

KEY = "key"
SIZE = 32


def seal(record: Mapping[str, Any]) -> str | None:
    """The mark for the first line of a journal, in hex; None where no key can be kept on this machine."""
    key = _key(make=True)
    return None if key is None else _mark(key, record)


def is_own(record: Mapping[str, Any]) -> bool:
    """Whether the first line of a journal carries the mark that this user's key makes for it."""
    mark, key = record.get("seal"), _key(make=False)
    if key is None or not isinstance(mark, str):
        return False
    return hmac.compare_digest(_mark(key, record).encode(), mark.encode("utf-8", "surrogatepass"))


def _mark(key: bytes, record: Mapping[str, Any]) -> str:
    text = json.dumps({name: value for name, value in record.items() if name != "seal"}, sort_keys=True)
    return hmac.digest(key, text.encode(), hashlib.sha256).hex()


def _key(make: bool) -> bytes | None:
    folder = state_folder()
    if folder is None:
        return None
    path = folder / KEY
    with contextlib.suppress(OSError):
        if make and not os.path.lexists(path):
            _write(folder, path)
        return _read(path)
    return None


def _write(folder: Path, path: Path) -> None:
    """Make a key, whole or not at all; of two who try at once, one does."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = folder / f".{KEY}.{os.getpid()}.{secrets.token_hex(4)}"
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(SIZE))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(part, path)
    finally:
        part.unlink(missing_ok=True)


def _read(path: Path) -> bytes | None:
    """The key; None for what others may have written or read."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(handle, "rb") as file:
        about = os.fstat(file.fileno())
        private = stat.S_ISREG(about.st_mode) and about.st_uid == os.geteuid() and not about.st_mode & 0o077
        key = file.read(SIZE + 1) if private else b""
    return key if len(key) == SIZE else None
