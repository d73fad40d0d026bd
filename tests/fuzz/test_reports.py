"""Damaged reports: every reader shows them or says in one sentence what is wrong."""

from __future__ import annotations

import io
import json
import random

import pytest

from slimline import cli
from slimline.basics.errors import SlimlineError
from slimline.measure import Report
from slimline.report.console import PlainConsole
from slimline.report.page import html
from slimline.report.tables import summary_table
from tests.fuzz.jsonmutate import mutate
from tests.report.example import report


def whole():
    """A report with something in every field, short enough to be mutated often."""
    found = report(3) | {
        "run": "half",
        "model": "resnet",
        "created": "2026-11-25T10:51:00+00:00",
        "notices": [{"what": "ChannelPruning", "reason": "conv1 is left alone"}],
        "warnings": ["The machine was busy."],
        "durations": [{"stage": "fit", "seconds": 1.5}],
        "unmet": ["size"],
        "recipe": "steps: []",
    }
    found["steps"][0]["plan"] = {
        "activations": [{"value": "relu", "before": 0.5, "after": 0.6, "threshold": 0.1, "error": 0.01}]
    }
    for figures in (found["original"], found["compressed"]):
        for latency in figures["latency"].values():
            latency["samples_ms"], latency["waited"] = latency["samples_ms"][:5], 0.2
    return found


def read_by_all(raw: bytes) -> str:
    """'shown', or the sentence with which the report was refused."""
    try:
        found = Report.from_json(raw)
        console = PlainConsole(file=io.TextIOWrapper(io.BytesIO(), "utf-8"), width=80)
        for width in (40, 80):
            console.width = width
            console.print(summary_table(found))
        assert str(found).isascii() and repr(found) and found._repr_html_()
        assert "\x1b" not in str(found)
        assert Report.from_json(found.to_json()) == found
        said = "shown"
    except SlimlineError as e:
        said = str(e)
        assert "\n" not in said and len(said) < 1000, said
    try:
        page = html(json.loads(raw))
    except (SlimlineError, ValueError, RecursionError) as e:
        if isinstance(e, SlimlineError):
            assert "\n" not in str(e)
    else:
        assert "<script" not in page and "\x1b" not in page and page.encode()
    return said


@pytest.mark.parametrize("seeds", [range(400), pytest.param(range(400, 10_000), marks=pytest.mark.slow)], ids=str)
def test_mutated_reports_are_shown_or_refused(seeds):
    document = whole()
    answers = {seed: read_by_all(mutate(document, random.Random(seed))) for seed in seeds}
    shown = sum(said == "shown" for said in answers.values())
    assert 0 < shown < len(answers), "the mutations must do something, and not everything"


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "is no JSON at line 1"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"[" * 10**5, "more than 100 levels"),
        (b'{"schema": 1, "x": ' + b"[" * 100 + b"]" * 100 + b"}", "more than 100 levels"),
        (b'{"schema": ' + b"9" * 5000 + b"}", "integer of 5,000 digits"),
        (b'{"schema": 1, "a": NaN}', "holds NaN"),
        (b'{"schema": 1, "a": 1e999}', "too large"),
        (b'{"schema": 1, "a": 1e200}', "out of range"),
        (b'{"schema": 1, "a": "\\ud800"}', "half a character"),
        (b"[]", "holds list, not an object"),
        (b"{}", "does not say which schema"),
        (b'{"schema": true}', "does not say which schema"),
        (b'{"schema": 7}', "has schema 7, and this slimline reads schema 1: update slimline"),
        (b'{"schema": 0}', "has schema 0"),
        (b'{"schema": 1}', "target is missing"),
    ],
    ids=lambda value: value[:20] if isinstance(value, bytes) else value,
)
def test_what_is_wrong_is_said(raw, said):
    with pytest.raises(SlimlineError, match=said) as caught:
        Report.from_json(raw, "runs/r/report.json")
    assert str(caught.value).startswith("runs/r/report.json ")


def test_the_command_says_it_too(tmp_path, capsys, monkeypatch):
    from slimline.recipe import Recipe
    from slimline.run.directory import Run
    from slimline.steps.quantization.step import StaticQuantization

    with Run.create(tmp_path / "r", Recipe(steps=(StaticQuantization(),))) as run:
        run.stage("one", lambda folder: None)
    for seed in range(30):
        (tmp_path / "r" / "report.json").write_bytes(mutate(whole(), random.Random(seed)))
        monkeypatch.setattr("sys.argv", ["slimline", "report", str(tmp_path / "r")])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        assert end.value.code == 2  # there is no artifact, or the report is damaged
        assert err.startswith("slimline: ") and err.count("\n") == 1
        assert "\x1b" not in out + err
