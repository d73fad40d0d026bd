"""Numbers in words, and text of others made safe to show."""

from __future__ import annotations

import math
import unicodedata

NOT_MEASURED = "not measured"
PERCENT = ("accuracy", "agreement", "jaccard")
"""Scores that are parts of one."""

_PLAIN = str.maketrans(
    {"×": "x", "–": "-", "—": "-", "−": "-", "→": ">", "µ": "u", "✓": "+", "·": "-", "’": "'", "‘": "'", "“": '"'}
    | {"”": '"', "\N{NO-BREAK SPACE}": " ", "…": ".", "•": "*", "≤": "<", "≥": ">"}
    | {chr(code): "+" for code in range(0x2500, 0x2580)}  # lines and corners of tables
    | dict.fromkeys("─━┄┅╌╍═╴╶╸╺", "-")
    | dict.fromkeys("│┃┆┇╎╏║╵╷╹╻", "|")
)


def visible(text: str) -> str:
    """`text` with what a terminal or browser would obey instead of show (escapes, direction marks) written out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" or unicodedata.category(c) == "Zs" else _code(c) for c in text)


def ascii_only(text: str) -> str:
    """`text` in ASCII, of the same length where its signs have a likeness there."""
    return text if text.isascii() else "".join(c if c.isascii() else _code(c) for c in text.translate(_PLAIN))


def _code(character: str) -> str:
    return f"\\x{ord(character):02x}" if ord(character) < 128 else ascii(character)[1:-1]


def times(before: float | None, after: float | None, down: str = "smaller", up: str = "larger") -> str:
    """How `after` relates to `before`, such as ``12.7× smaller``."""
    if before is None or after is None or before <= 0 or after <= 0:
        return NOT_MEASURED
    if before == after:
        return "unchanged"
    if abs(before - after) < 0.005 * min(before, after):
        return "about the same"
    ratio = max(before, after) / min(before, after)
    return f"{three(ratio)}× {down if before > after else up}" if math.isfinite(ratio) else NOT_MEASURED


def score(value: float | None, metric: str) -> str:
    """A mean score: of accuracy and agreement in percent."""
    if value is None or not math.isfinite(value):
        return NOT_MEASURED
    return f"{100 * value:.2f} %" if metric in PERCENT else f"{value:.4g}"


def drop(value: float, metric: str, sign: bool = False) -> str:
    """A change of a mean score: of accuracy and agreement in points."""
    plus = "+" if sign and value > 0 else ""
    points = 100 * value
    digits = ".2f" if abs(points) >= 0.005 or not points else ".2g"
    text = f"{points:{digits}} points" if metric in PERCENT else f"{value:.4g}"
    return f"{plus}{text}".replace("-", "−")


def three(value: float) -> str:
    """To three digits at least; `value` is 1 or more."""
    return f"{value:.{max(0, 2 - int(math.log10(value)))}f}"


def bytes_(value: int | None) -> str:
    """Bytes with a decimal unit, such as ``2.81 MB``."""
    return _unit(value, ((10**9, " GB"), (10**6, " MB"), (10**3, " kB")), " B")


def count(value: int | None) -> str:
    """A number of things with a decimal unit, such as ``70.1 M``."""
    return _unit(value, ((10**9, " G"), (10**6, " M"), (10**3, " k")), "")


def _unit(value: int | None, units: tuple[tuple[int, str], ...], one: str) -> str:
    if value is None:
        return NOT_MEASURED
    for size, unit in units:
        if value >= size:
            return f"{three(value / size)}{unit}"
    return f"{value}{one}"


def seconds(value: float) -> str:
    """A duration, such as ``0.8 s``, ``42 s`` or ``1 h 05 min``."""
    if value < 9.95:
        return f"{value:.1f} s"
    if value < 119.5:
        return f"{value:.0f} s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
