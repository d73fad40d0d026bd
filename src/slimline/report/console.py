"""The terminal: consoles that print what they are given and nothing else, and progress while the library works."""

from __future__ import annotations

import codecs
import io
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from slimline.basics import arguments
from slimline.basics.text import ascii_only, visible

LIKENESS = "slimline-likeness"


def _likeness(error: UnicodeError) -> tuple[str, int]:
    """What stands for characters that an encoding lacks: ``x`` for ``×``, escapes where there is no likeness."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return ascii_only(error.object[error.start : error.end]), error.end


codecs.register_error(LIKENESS, _likeness)


def lenient() -> None:
    """Let nothing that is printed fail because the terminal's encoding lacks a character."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=LIKENESS)


class PlainConsole(Console):
    """A console for text of others: no markup, no emoji codes, no highlighting, control characters written out.

    What slimline itself wants coloured it prints as `rich.text.Text`.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    @property
    def encoding(self) -> str:
        """Of the stream that is printed to now, where rich takes UTF-8 for granted."""
        return (getattr(self.file, "encoding", None) or "utf-8").lower()

    def render_str(self, text: str, **settings: Any) -> Text:
        """As of rich, of text that shows and does nothing."""
        return super().render_str(visible(text), **settings)

    def say(self, text: str, label: str = "", style: str = "") -> None:
        """Print a line, however long, after a coloured `label`."""
        start = Text(f"{visible(label)} ", style) if label else Text()
        self.print(start + Text(visible(text)), soft_wrap=True)


class Log(RichHandler):
    """Log records as coloured lines, their text as it is."""

    def __init__(self, console: Console) -> None:
        super().__init__(console=console, show_path=False, show_time=False, keywords=[])

    def render_message(self, record: logging.LogRecord, message: str) -> Text:
        """The record's text."""
        return Text(visible(message))


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
        unicode = console.encoding.lower().startswith("utf")
        self._bars = Progress(
            SpinnerColumn("dots" if unicode else "line", finished_text=Text("✓" if unicode else "+", "green")),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[figures]}", style="dim", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bars.live.is_started:
            self._bars.stop()

    def __call__(self, told: Told) -> None:
        self._bars.start()
        what = visible(told.what)
        extra = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in told.extra.items()]
        figures = visible(" ".join(extra))
        again = what in self._finished and told.done < told.total
        if what not in self._tasks or again:
            self._finished.discard(what)
            self._tasks[what] = self._bars.add_task(what, total=told.total, figures=figures)
            self._started[what] = time.monotonic()
        self._bars.update(self._tasks[what], completed=told.done, total=told.total, figures=figures)
        if told.done >= told.total and what not in self._finished:
            self._finished.add(what)
            if not self.console.is_terminal:
                seconds = time.monotonic() - self._started[what]
                self.console.print(Text(f"{what}: done in {seconds:.1f} s {figures}".rstrip()), soft_wrap=True)


@contextmanager
def telling(progress: Callable[[Any], None] | bool | None) -> Iterator[Callable[[Any], None] | None]:
    """The callback that `progress` means, as users of the library give it.

    Parameters
    ----------
    progress : a callback, used as it is; True for bars on stderr (lines where it is no terminal); False for silence;
        None for bars where stderr is a terminal, and else silence.
    """
    arguments.progress("progress", progress)
    shown = sys.stderr is not None and sys.stderr.isatty() if progress is None else progress
    if callable(shown):
        yield shown
    elif not shown:
        yield None
    else:
        # A stream of its own, so that the user's is left as it is.
        with Display(PlainConsole(stderr=True)) as display:
            yield display
