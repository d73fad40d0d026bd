"""Times and sizes as people write them, such as ``5 ms`` and ``2 MB``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal

_WRITTEN = re.compile(r"\s*((?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,2})?)\s*([A-Za-zµμ]+)\s*", re.ASCII)
_LONGEST = 40  # characters
_SMALLEST, _LARGEST = Decimal("1e-6"), 10**15  # of the counted unit: whole numbers of bytes are exact in a float


@dataclass(frozen=True)
class Kind:
    """A kind of quantity.

    Attributes
    ----------
    name, example : for messages, such as ``a time`` and ``5 ms``.
    unit : in which it is counted.
    scales : of the units that are understood, in `unit`.
    shown : those that are written, from the largest; of several the largest that is not more than the quantity.
    whole : whether there are only whole numbers of `unit`; parts of one are left out.
    """

    name: str
    example: str
    unit: str
    scales: Mapping[str, Decimal]
    shown: tuple[str, ...]
    whole: bool = False

    def read(self, text: str) -> float | None:
        """What `text` says, in `unit`; None if it says no quantity of this kind, or one that nothing has."""
        match = _WRITTEN.fullmatch(text) if len(text) <= _LONGEST else None
        if match is None or match[2] not in self.scales:
            return None
        value = Decimal(match[1]) * self.scales[match[2]]
        value = value.to_integral_value(ROUND_FLOOR) if self.whole else value
        return float(value) if _SMALLEST <= value <= _LARGEST else None

    def write(self, value: float, digits: int | None = None) -> str:
        """A quantity in `unit` with its unit, in full (`read` gives it back), or to so many `digits`."""
        exact = Decimal(repr(float(value)))
        shown = next((u for u in self.shown if self.scales[u] <= exact), self.shown[-1])
        scaled = exact / self.scales[shown]
        if digits is not None and not (self.whole and shown == self.unit):
            scaled = Decimal(f"{scaled:.{digits - 1}e}")
        return f"{scaled.normalize():f} {shown}"


_MS = {"ns": Decimal("1e-6"), "us": Decimal("1e-3"), "ms": Decimal(1), "s": Decimal(1000)}
_BYTES = {
    "B": Decimal(1),
    "kB": Decimal(10**3),
    "MB": Decimal(10**6),
    "GB": Decimal(10**9),
    "KiB": Decimal(2**10),
    "MiB": Decimal(2**20),
    "GiB": Decimal(2**30),
}

TIME = Kind(
    "a time",
    "5 ms",
    "ms",
    {**_MS, "\N{MICRO SIGN}s": Decimal("1e-3"), "\N{GREEK SMALL LETTER MU}s": Decimal("1e-3")},
    ("ms",),
)
SIZE = Kind("a size", "2 MB", "B", {**_BYTES, "KB": _BYTES["kB"]}, ("GB", "MB", "kB", "B"), whole=True)
