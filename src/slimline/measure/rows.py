"""Two artifacts side by side, in words: what the page, the console and `print` show of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from slimline.basics import text
from slimline.measure.figures import Figures, Latency
from slimline.measure.latency import speedup

_ALIKE = ("unchanged", "about the same")


@dataclass(frozen=True)
class Row:
    """A quantity of both artifacts, worded; `left` is the part of the original that stays, for a bar."""

    name: str
    before: str
    after: str
    change: str
    detail: str = ""
    before_detail: str = ""
    after_detail: str = ""
    left: float | None = None

    @property
    def changed(self) -> bool:
        """Whether there is a change to speak of."""
        return self.change not in (text.NOT_MEASURED, *_ALIKE)


def rows(original: Figures, compressed: Figures, metric: str) -> list[Row]:
    """A row per quantity, in the order in which they are shown; `metric` is the name of the score."""
    a, b = original.accuracy, compressed.accuracy
    change = text.NOT_MEASURED if a is None or b is None else text.drop(b - a, metric, sign=True)
    name = metric[:1].upper() + metric[1:]
    table = [Row(name, text.score(a, metric), text.score(b, metric), change)]
    table.append(_smaller("File", original.file_bytes, compressed.file_bytes, text.bytes_))
    table.append(_smaller("Parameters", original.parameters, compressed.parameters, text.count, "fewer", "more"))
    table.append(_smaller("MACs a sample", original.macs, compressed.macs, text.count, "fewer", "more"))
    if original.integer_macs is not None or compressed.integer_macs is not None:
        parts = (original.integer_macs, compressed.integer_macs)
        before, after = (text.NOT_MEASURED if part is None else f"{part:.0%}" for part in parts)
        table.append(Row("MACs in integers", before, after, f"{after} of all" if before != after else _ALIKE[0]))
    for batch in sorted({*original.latency, *compressed.latency}):
        table.append(_faster(batch, original.latency.get(batch), compressed.latency.get(batch)))
    peaks = original.peak_memory_bytes, compressed.peak_memory_bytes
    table.append(_smaller("Peak memory", *peaks, text.bytes_, "less", "more", "whole process"))
    return table


def lines(original: Figures, compressed: Figures, metric: str) -> list[str]:
    """The same as a table of plain text."""
    cells = [("", "original", "compressed", "change")]
    cells += [(r.name, r.before, r.after, r.change.partition(" (")[0]) for r in rows(original, compressed, metric)]
    widths = [max(len(row[i]) for row in cells) for i in range(4)]
    return [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]


def busy(original: Figures, compressed: Figures) -> str:
    """How much the artifacts waited for a core while they were timed, where that is reason for doubt; else empty."""
    waits = [
        f"the {name} {latency.waited:.0%} of the time at batch {batch}"
        for name, figures in (("original", original), ("compressed", compressed))
        for batch, latency in sorted(figures.latency.items())
        if latency.busy
    ]
    if not waits:
        return ""
    return (
        f"The machine was busy: {', '.join(waits)} waited for a core. That time is taken off, but caches were shared: "
        "measure again while nothing else runs."
    )


def _smaller(
    name: str,
    before: int | None,
    after: int | None,
    say: Callable[[int | None], str],
    down: str = "smaller",
    up: str = "larger",
    detail: str = "",
) -> Row:
    return Row(name, say(before), say(after), text.times(before, after, down, up), detail, left=_part(before, after))


def _faster(batch: int, before: Latency | None, after: Latency | None) -> Row:
    name = f"Latency, batch {batch}"
    a, b = (None if v is None else v.median_ms for v in (before, after))
    change = text.times(a, b, "faster", "slower")
    if before is not None and after is not None and _paired(before, after):
        s = speedup(before, after)
        low, high = (s.low, s.high) if s.ratio >= 1 else (1 / s.high, 1 / s.low)
        change = f"{change} ({100 * s.confidence:g} %: {low:.2f}–{high:.2f})"
    return Row(
        name, _ms(before), _ms(after), change, "median, p10–p90", _range(before), _range(after), left=_part(a, b)
    )


def _paired(before: Latency, after: Latency) -> bool:
    same = len(before.samples_ms) == len(after.samples_ms) > 1
    return same and min(*before.samples_ms, *after.samples_ms) > 0


def _part(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None or before <= 0 else min(1.0, after / before)


def _ms(latency: Latency | None) -> str:
    return text.NOT_MEASURED if latency is None else f"{latency.median_ms:.3g} ms"


def _range(latency: Latency | None) -> str:
    return "" if latency is None else f"{latency.p10_ms:.3g}–{latency.p90_ms:.3g}"
