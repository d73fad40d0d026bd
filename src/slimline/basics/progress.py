"""How far a long job has come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Progress:
    """`done` of `total` parts of `what`; `extra` holds figures worth showing."""

    what: str
    done: int
    total: int
    extra: Mapping[str, Any] = field(default_factory=dict)
