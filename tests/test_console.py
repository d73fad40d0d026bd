"""What reaches a terminal: whole figures at every width, likenesses in ASCII, text of others as it is."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

import slimline as sl
from slimline.basics.errors import SlimlineError, unknown
from slimline.basics.progress import Progress
from slimline.basics.text import ascii_only, seconds, visible
from slimline.measure import Figures, Latency
from slimline.report.console import LIKENESS, Display, Log, PlainConsole, telling
from slimline.report.tables import Table, figures_table

HOSTILE = "nomod:m: [bold]x[/] [/] \x1b[2J\x07 \u202e :warning: {{ 7 }} http://a"
ROOT = Path(__file__).parent.parent


def printed(what: object, width: int = 80, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding, errors=LIKENESS)
    PlainConsole(file=stream, width=width).print(what)
    stream.flush()
    return raw.getvalue().decode(encoding)


def many_digits() -> Table:
    before = Figures(
        accuracy=0.98765, file_bytes=2_812_345_678, parameters=697_123_456, macs=70_123_456_789,
        latency={1: Latency.of([1234.5] * 3), 4096: Latency.of([98765.4] * 3)}, peak_memory_bytes=9 * 10**10,
    )  # fmt: skip
    after = before.model_copy(
        update={"file_bytes": 197_222, "macs": 17, "parameters": 88, "latency": {1: Latency.of([0.0865])}}
    )
    return figures_table({"original": before, "compressed": after}, "accuracy", "Original against compressed")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "cp1252"])
@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 200])
def test_no_figure_is_cut(width: int, encoding: str) -> None:
    said = printed(many_digits(), width, encoding)
    times = "x" if encoding == "ascii" else "×"
    unfolded = " ".join(said.split())
    for figure in ("697,123,456", "70,123,456,789", "2.81 GB", "197 kB", "90 GB", f"14271.68{times} faster"):
        assert figure in unfolded, figure
    assert "…" not in said and "..." not in said
    if width >= 60:
        assert all(len(line) <= width for line in said.splitlines())


@pytest.mark.parametrize("width", [40, 60, 80, 100])
def test_words_are_folded_and_figures_kept_in_other_tables(width: int) -> None:
    names = [f"encoder.layers.{i}.attention.query_projection_of_the_first_head" for i in range(3)]
    rows = [(name, "aten.linear", "4096 × 11008", "45,088,768", "1,234,567,890,123", HOSTILE) for name in names]
    columns = ("layer", "operator", "weight", "parameters", "MACs", "INT8")
    said = printed(Table("t", columns, rows, ("weight", "parameters", "MACs")), width)
    for figure in ("4096 × 11008", "45,088,768", "1,234,567,890,123"):
        assert said.count(figure) == 3
    assert "…" not in said
    letters = re.sub(r"[\s│]", "", said)
    assert "query" in letters and "[bold]" in letters


def test_text_of_others_shows_and_does_nothing() -> None:
    for said in (printed(HOSTILE), printed(Table(HOSTILE, (HOSTILE,), [(HOSTILE,)]), 200)):
        assert "nomod:m: [bold]x[/] [/] \\x1b[2J\\x07 \\u202e :warning:" in said
    stream = io.StringIO()
    console = PlainConsole(file=stream, width=200, force_terminal=True, color_system="truecolor")
    console.say(HOSTILE, HOSTILE, "red")
    with Display(console) as display:
        display(Progress(HOSTILE, 1, 1, {"now": HOSTILE}))
    log = logging.getLogger("slimline.test_console")
    log.addHandler(Log(console))
    log.propagate = False
    log.warning("%s", HOSTILE)
    said = stream.getvalue()
    assert said.count("nomod:m: [bold]x[/]") >= 5 and "\x1b[2J" not in said and "\x07" not in said
    assert "\u202e" not in said


def test_likenesses() -> None:
    assert ascii_only("2.00× – → ✓ µs “a” … Ⓜ") == '2.00x - > + us "a" . \\u24c2'
    assert visible("a\x1b\n\tb\u200b") == "a\\x1b\n\tb\\u200b"
    assert [seconds(s) for s in (0.04, 9.99, 119, 120, 3599, 3905)] == [
        "0.0 s", "10 s", "119 s", "2 min", "1 h 00 min", "1 h 05 min",
    ]  # fmt: skip


@pytest.mark.parametrize("settings", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}], ids=str)
@pytest.mark.parametrize("words", ["recipes", "targets", "compress --help", "recipes show fast", "report nowhere–×"])
def test_commands_in_an_ascii_terminal(words: str, settings: dict[str, str]) -> None:
    environment = {**os.environ, "PYTHONCOERCECLOCALE": "0", **settings}
    code = "from slimline.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True, env=environment)
    said = (done.stdout + done.stderr).decode("ascii")
    assert "Traceback" not in said and said.strip()
    assert done.returncode == (2 if "nowhere" in words else 0)


def test_choices_that_are_none_or_many() -> None:
    assert str(unknown("block", "a", [])) == "There is no block 'a', and nothing to choose from: leave it out."
    assert str(unknown("block", "zz", map(str, range(100)))).endswith(" and 88 more.")


def test_progress_of_the_library(capfd: pytest.CaptureFixture[str]) -> None:
    with telling(None) as tell:
        assert tell is None, "silent where stderr is no terminal"
    with telling(False) as tell:
        assert tell is None
    with telling(print) as tell:
        assert tell is print
    with telling(True) as tell:
        assert tell is not None
        tell(Progress("Training", 1, 1))
    assert capfd.readouterr() == ("", "Training: done in 0.0 s\n")
    with pytest.raises(SlimlineError, match="progress is 'bars': give a function, True"), telling("bars"):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize(("argument", "seen"), [("", True), (", False", False)])
def test_bars_in_a_terminal_by_default(argument: str, seen: bool) -> None:
    code = (
        "from slimline.report.console import telling\nfrom slimline.training.loop import Progress\n"
        f"with telling(None{argument}) as tell:\n    tell and tell(Progress('Training', 1, 2))\n"
    ).replace("None, False", "False")
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", code], stderr=theirs, stdout=subprocess.PIPE, check=True, cwd=ROOT)
    os.set_blocking(ours, False)
    try:
        said = os.read(ours, 10_000).decode()
    except BlockingIOError:
        said = ""
    os.close(ours)
    os.close(theirs)
    assert ("Training" in said) == seen


def test_a_library_call_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    import numpy as np

    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    x = np.random.default_rng(0).random((64, 8)).astype(np.float32)
    model = sl.load(net, x[:2])
    capfd.readouterr()
    sl.apply(model, [sl.ChannelPruning(ratio=0.5), sl.Distillation(epochs=1)], sl.Data(train=(x,)))
    assert capfd.readouterr() == ("", "")
