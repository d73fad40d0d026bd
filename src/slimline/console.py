"""What the command line shows: tables of figures, and progress while the library works."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from slimline.measure.results import Figures, Latency, Report


class Told(Protocol):
    """How far a long job has come, as the library's ``progress`` callbacks tell it."""

    @property
    def what(self) -> str: ...
    @property
    def done(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def extra(self) -> Mapping[str, object]: ...


class Display:
    """A ``progress`` callback: bars with the time left on a terminal, a line per finished job anywhere else.

    Use it in a ``with`` block.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}
        self._finished: set[str] = set()
        self._bars = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("[dim]{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bars.stop()

    def __call__(self, told: Told) -> None:
        figures = " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in told.extra.items())
        again = told.what in self._finished and told.done < told.total
        if told.what not in self._tasks or again:
            self._finished.discard(told.what)
            self._tasks[told.what] = self._bars.add_task(told.what, total=told.total, figures=figures)
            self._started[told.what] = time.monotonic()
        self._bars.update(self._tasks[told.what], completed=told.done, total=told.total, figures=figures)
        if told.done >= told.total and told.what not in self._finished:
            self._finished.add(told.what)
            if not self.console.is_terminal:
                seconds = time.monotonic() - self._started[told.what]
                self.console.print(f"{told.what}: done in {seconds:.1f} s {figures}".rstrip(), highlight=False)


def summary_table(report: Report) -> Table:
    """Original against compressed, both on the target runtime."""
    columns = {"original": report.original, "compressed": report.compressed}
    return figures_table(columns, report.certificate.metric, f"Original against compressed, both on {report.target}")


def figures_table(columns: Mapping[str, Figures], metric: str, title: str) -> Table:
    """Figures side by side; with two columns also what the second one gains on the first."""
    table = Table(title=title, title_justify="left", pad_edge=False)  # fits 80 columns
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    shown = list(columns.values())
    if len(shown) == 2:
        table.add_column("gain", justify="right", no_wrap=True)

    def row(name: str, values: Sequence[float | None], cells: Sequence[str], words: tuple[str, str] | None) -> None:
        cells = ["not measured" if value is None else cell for value, cell in zip(values, cells, strict=True)]
        if len(values) == 2:
            before, after = values
            cells.append("" if before is None or after is None else _gain(before, after, words))
        table.add_row(name, *cells)

    percent = 100 if metric in ("accuracy", "agreement") else 1
    scores = [None if f.accuracy is None else percent * f.accuracy for f in shown]
    row(f"{metric}, %" if percent > 1 else metric, scores, [f"{s or 0:.4g}" for s in scores], None)
    sizes = [f.file_bytes for f in shown]
    row("file", sizes, [bytes_text(s or 0) for s in sizes], ("smaller", "larger"))
    for name, counts in (("parameters", [f.parameters for f in shown]), ("MACs", [f.macs for f in shown])):
        if any(count is not None for count in counts):
            row(name, counts, [f"{count or 0:,}" for count in counts], ("fewer", "more"))
    for batch in sorted({batch for f in shown for batch in f.latency}):
        times = [f.latency.get(batch) for f in shown]
        cells = [latency_text(t) if t else "" for t in times]
        row(f"latency, batch {batch}", [t.median_ms if t else None for t in times], cells, ("faster", "slower"))
    peaks = [f.peak_memory_bytes for f in shown]
    row("peak memory", peaks, [bytes_text(p or 0) for p in peaks], ("less", "more"))
    return table


def _gain(before: float, after: float, words: tuple[str, str] | None) -> str:
    """The change as a factor in words, or, without words, as a difference."""
    if words is None:
        return f"{after - before:+.4g}"
    if before <= 0 or after <= 0:
        return ""
    factor = max(before / after, after / before)
    if f"{factor:.2f}" == "1.00":
        return "same"
    better, worse = words
    return f"[green]{factor:.2f}× {better}" if after < before else f"[yellow]{factor:.2f}× {worse}"


def latency_text(latency: Latency) -> str:
    """Median and 10th to 90th percentile, such as ``239 µs [221–258]``, escaped for rich."""
    unit, scale = ("µs", 1e3) if latency.median_ms < 1 else ("ms", 1.0) if latency.median_ms < 1e3 else ("s", 1e-3)
    median, low, high = (scale * t for t in (latency.median_ms, latency.p10_ms, latency.p90_ms))
    digits = 0 if median >= 100 else 1 if median >= 10 else 2
    return f"{median:.{digits}f} {unit} \\[{low:.{digits}f}–{high:.{digits}f}]"


def bytes_text(count: float) -> str:
    """Bytes with a decimal unit, such as ``2.8 MB``."""
    if count < 1000:
        return f"{count:.0f} bytes"
    for unit in ("kB", "MB"):
        count /= 1000
        if count < 999.5:
            return f"{count:.3g} {unit}"
    return f"{count / 1000:.3g} GB"
