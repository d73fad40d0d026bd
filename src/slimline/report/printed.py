"""Results that are asked for at a prompt: the same figures as tables, as text and as JSON."""

from __future__ import annotations

import io
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from slimline.report.console import PlainConsole
from slimline.report.tables import Table

SCHEMA = 1
"""Of the JSON: keys may be added to it, and none of them changes its meaning or goes."""


class Row(BaseModel):
    """A part of a result."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Printed(Row, ABC):
    """A result that is printed: `tables` and then `lines`, which is what ``print`` shows too, or JSON."""

    @abstractmethod
    def tables(self) -> list[Table]:
        """What the command line prints."""

    def lines(self) -> list[str]:
        """Sentences below the tables."""
        return []

    def summary(self) -> dict[str, Any]:
        """All of it, ready for JSON; numbers as they are."""
        return {"schema": SCHEMA, **self.model_dump(mode="json")}

    def to_json(self, indent: int | None = 2) -> str:
        """`summary` as JSON text."""
        return as_json(self.summary(), indent)

    def __str__(self) -> str:
        console = PlainConsole(file=io.StringIO())
        for table in self.tables():
            console.print(table)
        for line in self.lines():
            console.say(line)
        return console.file.getvalue().rstrip("\n")  # type: ignore[attr-defined, no-any-return]

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {'; '.join(table.title for table in self.tables()[:1])}>"


def listing(name: str, entries: Sequence[Any]) -> dict[str, Any]:
    """The JSON of a command that prints a list."""
    return {"schema": SCHEMA, name: list(entries)}


def as_json(value: Any, indent: int | None = 2) -> str:
    """JSON text in ASCII, which every terminal and every pipe takes."""
    return json.dumps(value, indent=indent, allow_nan=False)
