"""Tables for the terminal that never cut a figure: what is too wide for columns is written row by row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich import table as rich_table
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text

from slimline.basics.text import PERCENT, visible

if TYPE_CHECKING:
    from slimline.measure.figures import Figures, Latency
    from slimline.measure.results import Report

_NARROWEST = 12  # columns of a terminal that words may be folded to


class Table:
    """A table with a title and a header; where it does not fit, each row is a list of its cells.

    Parameters
    ----------
    columns : names. Those in `figures` hold numbers, which are set to the right and never folded; others hold words,
        which are folded to what is left.
    rows : cells as `Text`, or as text that is shown as it is.
    """

    def __init__(
        self,
        title: str,
        columns: Sequence[str],
        rows: Iterable[Sequence[str | Text]],
        figures: Sequence[str] = (),
        folded: bool = True,
    ) -> None:
        self.title = title
        self.columns = tuple(columns)
        self.rows = [[cell if isinstance(cell, Text) else Text(visible(cell)) for cell in row] for row in rows]
        self.figures = frozenset(figures)
        self.folded = folded

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        least = sum(min(w, _NARROWEST) if self._folds(i) else w for i, w in enumerate(self._widths()))
        if least + 3 * len(self.columns) + 1 <= options.max_width:
            yield self._table()
        else:
            yield from self._listed()

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, options.max_width)

    def _folds(self, column: int) -> bool:
        return self.folded and self.columns[column] not in self.figures

    def _widths(self) -> list[int]:
        cells = [[Text(name) for name in self.columns], *self.rows]
        return [max(row[i].cell_len for row in cells) for i in range(len(self.columns))]

    def _table(self) -> rich_table.Table:
        table = rich_table.Table(title=Text(self.title, "italic"), title_justify="left", pad_edge=False)
        for i, (name, width) in enumerate(zip(self.columns, self._widths(), strict=True)):
            if self._folds(i):
                table.add_column(Text(name), overflow="fold", min_width=min(width, _NARROWEST))
            else:
                side = "right" if name in self.figures else "left"
                table.add_column(Text(name), no_wrap=True, min_width=width, justify=side)  # type: ignore[arg-type]
        for row in self.rows:
            table.add_row(*row)
        return table

    def _listed(self) -> Iterable[Text]:
        yield Text(self.title, "italic")
        for row in self.rows:
            yield Text(row[0].plain, "bold", overflow="fold")
            for name, cell in zip(self.columns[1:], row[1:], strict=True):
                if cell.plain:
                    yield Text(f"  {name}: " if name else "  ", overflow="fold") + cell


def summary_table(report: Report) -> Table:
    """Original against compressed, both on the target runtime."""
    columns = {"original": report.original, "compressed": report.compressed}
    return figures_table(columns, report.metric, f"Original against compressed, both on {report.target}")


def figures_table(columns: Mapping[str, Figures], metric: str, title: str) -> Table:
    """Figures side by side; with two columns also what the second one gains on the first."""
    shown = list(columns.values())
    names = ["", *columns, *(["gain"] if len(shown) == 2 else [])]
    rows: list[list[str | Text]] = []

    def row(name: str, values: Sequence[float | None], cells: Sequence[str], words: tuple[str, str] | None) -> None:
        worded: list[str | Text] = [
            "not measured" if value is None else cell for value, cell in zip(values, cells, strict=True)
        ]
        if len(values) == 2:
            before, after = values
            if before is None or after is None:
                worded.append("")
            else:
                worded.append(f"{after - before:+{digits}}" if words is None else _gain(before, after, words))
        rows.append([name, *worded])

    percent = 100 if metric in PERCENT else 1
    digits = ".2f" if percent > 1 else ".4g"
    scores = [None if f.accuracy is None else percent * f.accuracy for f in shown]
    row(f"{metric}, %" if percent > 1 else metric, scores, [f"{s or 0:{digits}}" for s in scores], None)
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
    return Table(title, names, rows, names[1:], folded=False)


def _gain(before: float, after: float, words: tuple[str, str]) -> str | Text:
    """The change as a factor in words."""
    if before <= 0 or after <= 0:
        return ""
    factor = max(before / after, after / before)
    if f"{factor:.2f}" == "1.00":
        return "same"
    better, worse = words
    return Text(f"{factor:.2f}× {better}", "green") if after < before else Text(f"{factor:.2f}× {worse}", "yellow")


def latency_text(latency: Latency) -> str:
    """Median and 10th to 90th percentile, such as ``239 µs [221–258]``."""
    unit, scale = ("µs", 1e3) if latency.median_ms < 1 else ("ms", 1.0) if latency.median_ms < 1e3 else ("s", 1e-3)
    median, low, high = (scale * t for t in (latency.median_ms, latency.p10_ms, latency.p90_ms))
    digits = 0 if median >= 100 else 1 if median >= 10 else 2
    return f"{median:.{digits}f} {unit} [{low:.{digits}f}–{high:.{digits}f}]"


def bytes_text(count: float) -> str:
    """Bytes with a decimal unit, such as ``2.8 MB``."""
    if count < 1000:
        return f"{count:.0f} bytes"
    for unit in ("kB", "MB"):
        count /= 1000
        if count < 999.5:
            return f"{count:.3g} {unit}"
    return f"{count / 1000:.3g} GB"
