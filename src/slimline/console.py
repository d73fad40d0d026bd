"""What the command line shows: tables of figures, and progress while the library works."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from slimline.measure.results import Figures, Report


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
        if told.what not in self._tasks:
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
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    shown = list(columns.values())
    if len(shown) == 2:
        table.add_column("gain", justify="right", style="green")

    def row(name: str, values: Sequence[float | None], text: Callable[[float], str], gain: str = "") -> None:
        cells = ["not measured" if value is None else text(value) for value in values]
        if len(values) == 2:
            before, after = values
            if before is None or after is None:
                cells.append("")
            else:
                cells.append(f"{before / after:.2f}× {gain}" if gain and after else f"{after - before:+.4g}")
        table.add_row(name, *cells)

    percent = metric in ("accuracy", "agreement")
    scores = [f.accuracy if f.accuracy is None or not percent else 100 * f.accuracy for f in shown]
    row(f"{metric}, %" if percent else metric, scores, lambda score: f"{score:.4g}")
    row("file", [f.file_bytes for f in shown], bytes_text, "smaller")
    if any(f.parameters is not None for f in shown):
        row("parameters", [f.parameters for f in shown], lambda count: f"{count:,}", "fewer")
        row("MACs per sample", [f.macs for f in shown], lambda count: f"{count:,}", "fewer")
    for batch in sorted({batch for f in shown for batch in f.latency}):
        medians = [f.latency[batch].median_ms if batch in f.latency else None for f in shown]
        spread = {t.median_ms: f" \\[{t.p10_ms:.3g} to {t.p90_ms:.3g}]" for f in shown if (t := f.latency.get(batch))}
        row(f"latency at batch {batch}, ms", medians, lambda ms, of=spread: f"{ms:.3g}{of[ms]}", "faster")
    row("peak memory", [f.peak_memory_bytes for f in shown], bytes_text, "less")
    return table


def bytes_text(count: float) -> str:
    """Bytes with a decimal unit, such as ``2.8 MB``."""
    if count < 1000:
        return f"{count:.0f} bytes"
    for unit in ("kB", "MB"):
        count /= 1000
        if count < 999.5:
            return f"{count:.3g} {unit}"
    return f"{count / 1000:.3g} GB"
