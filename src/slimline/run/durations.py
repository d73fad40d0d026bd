"""When a run was started and how long its parts took: what no two runs share, and so beside the journal."""

from __future__ import annotations

import json
import os
import stat
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_MOST_BYTES = 10**6


class Durations:
    """A file of JSON lines that only grows. It informs: what cannot be written or read is left out."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self) -> None:
        """Note that the run begins now."""
        self._append({"at": datetime.now(UTC).isoformat(timespec="seconds")})

    def note(self, name: str, seconds: float) -> None:
        """Note how long the part `name` took; the last word counts."""
        self._append({"name": name, "seconds": round(seconds, 3)})

    @property
    def at(self) -> str | None:
        """When the run was started, in ISO 8601, UTC."""
        return next((r["at"] for r in self._records() if isinstance(r.get("at"), str)), None)

    @property
    def seconds(self) -> dict[str, float]:
        """By part, in the order in which they were first done."""
        return {
            record["name"]: float(record["seconds"])
            for record in self._records()
            if isinstance(record.get("name"), str) and isinstance(record.get("seconds"), int | float)
        }

    def _append(self, record: dict[str, Any]) -> None:
        # A link in a run directory is never written through.
        with suppress(OSError):
            self.path.parent.mkdir(exist_ok=True)
            if self.path.parent.is_symlink():
                return
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
            try:
                os.write(handle, json.dumps(record).encode() + b"\n")
            finally:
                os.close(handle)

    def _records(self) -> list[dict[str, Any]]:
        try:
            handle = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return []
        with os.fdopen(handle, "rb") as file:
            raw = file.read(_MOST_BYTES) if stat.S_ISREG(os.fstat(handle).st_mode) else b""
        records = []
        for line in raw.splitlines():
            with suppress(ValueError, RecursionError):
                record = json.loads(line)
                if isinstance(record, dict):
                    records.append(record)
        return records
