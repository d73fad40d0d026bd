from __future__ import annotations

from html.parser import HTMLParser

import pytest

from slimline.basics.errors import SlimlineError
from slimline.measure import Figures
from slimline.measure.rows import busy
from slimline.report.page import html, render
from tests.report.example import hostile, report

SECTIONS = ["Figures", "Certificate", "Parity", "Latency samples", "Layers", "Recovery", "Refused or undone"]
VOID = {"meta", "link"}


class Page(HTMLParser):
    """Tags with their attributes' names in order, and the text; checks that what is opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self._open = [], [], []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, *(name for name, _ in attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, *(name for name, _ in attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def test_the_same_report_gives_the_same_bytes(tmp_path):
    render(report(), tmp_path / "a.html")
    render(report(), tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_refers_to_nothing_outside_itself():
    text = html(report())
    for sign in ("http:", "https:", "//", "@import", "url(", "<script", "src="):
        assert sign not in text, sign


def test_text_from_the_report_never_becomes_markup():
    plain, bad = Page(html(hostile("plain"))), Page(html(hostile()))
    assert bad.tags == plain.tags
    assert "{{ 7 * 7 }}" in bad.text and "document.title='owned'" in bad.text


def test_sections_come_in_order():
    text = Page(html(report())).text
    assert sorted(SECTIONS, key=lambda s: text.index(f"{s} ")) == SECTIONS


def test_what_is_missing_is_said_to_be_not_measured():
    empty = dict.fromkeys(("accuracy", "file_bytes", "parameters", "macs", "peak_memory_bytes")) | {"latency": {}}
    nothing = {
        "schema": 1, "target": "litert", "original": empty, "compressed": empty, "certificate": None, "parity": None,
        "refused": [], "frozen": [], "steps": [], "layers": [], "history": [], "command": None, "environment": {},
    }  # fmt: skip
    text = Page(html(nothing)).text
    # Five quantities, each with two values and a change; the verdict, certificate, parity and latency.
    assert text.count("not measured") == 5 * 3 + 4
    assert "None" not in text.replace("None.", "") and "nan" not in text
    assert Page(html({"schema": 1})).text.count("not measured") == 19


def test_one_missing_side_is_no_ratio():
    partial = report()
    partial["compressed"]["macs"] = None
    del partial["original"]["latency"]["32"]
    text = Page(html(partial)).text
    assert "MACs a sample 70.1 M not measured not measured" in text
    assert "Latency, batch 32 median, p10–p90 not measured 11.9 ms" in text


def test_worse_is_worded_as_worse():
    worse = report()
    worse["compressed"] |= {"file_bytes": 2 * 2_812_345, "accuracy": 0.9531, "macs": 70_123_000}
    text = Page(html(worse)).text
    assert "2.00× larger" in text and "+1.00 points" in text and "70.1 M 70.1 M unchanged" in text


@pytest.mark.parametrize(("value", "said"), [(999, "999 B"), (1000, "1.00 kB"), (123_456_789, "123 MB")])
def test_bytes_keep_three_digits(value, said):
    sized = report()
    sized["original"]["file_bytes"] = value
    assert said in Page(html(sized)).text


def test_a_slower_artifact_has_its_interval_in_the_same_direction():
    slower = report()
    slower["original"]["latency"], slower["compressed"]["latency"] = (
        slower[which]["latency"] for which in ("compressed", "original")
    )
    assert "3.71× slower (95 %: 3.71–3.71)" in Page(html(slower)).text


def test_limits_that_were_missed_are_said_at_the_top():
    over = report() | {"unmet": ["latency reaches 0.4 of the original's, the budget is 0.2"]}
    text = Page(html(over)).text
    assert text.index("Over budget latency reaches 0.4") < text.index("Figures")


def test_model_run_and_date_are_named():
    named = report() | {"model": "resnet18.pt2", "run": "half", "created": "2026-11-25T10:51:07+00:00"}
    page = html(named)
    assert "<title>slimline · resnet18.pt2 · half · onnxruntime</title>" in page
    text = Page(page).text
    assert "resnet18.pt2 on onnxruntime" in text and "run half , started 2026-11-25 10:51 UTC" in text
    assert "A network on onnxruntime" in Page(html(report())).text


def test_a_busy_machine_is_a_warning_with_how_much():
    told = report()
    told["original"]["latency"]["32"]["waited"] = 0.31
    told["compressed"]["latency"]["1"]["waited"] = 0.02
    original, compressed = (Figures.model_validate(told[which]) for which in ("original", "compressed"))
    said = busy(original, compressed)
    assert said.startswith("The machine was busy: the original 31% of the time at batch 32 waited for a core.")
    assert busy(compressed, compressed) == ""
    text = Page(html(told | {"warnings": [said]})).text
    assert text.index("Warning The machine was busy: the original 31%") < text.index("Figures")


def test_notices_stand_apart_from_what_was_refused():
    noted = report() | {"notices": [{"what": "ChannelPruning", "reason": "conv1 has nobody else to read it"}]}
    text = Page(html(noted)).text
    assert text.index("Refused or undone") < text.index("slower by 3 %") < text.index("Notices ChannelPruning conv1")
    assert "Notices" not in Page(html(report())).text
    assert "Refused or undone Nothing." in Page(html(report() | {"refused": []})).text


def test_stages_have_times():
    timed = [{"stage": "fit", "seconds": 2.0}, {"stage": "02-Distillation", "seconds": 4000.4}]
    text = Page(html(report() | {"durations": timed})).text
    assert "fit 2.0 s 02-Distillation 1 h 07 min Together 1 h 07 min" in text


def test_the_recipe_is_shown_as_the_file_has_it():
    assert "schema: 1 steps: []" in Page(html(report() | {"recipe": "schema: 1\nsteps: []\n"})).text


def test_every_layer_has_a_row_and_bars_within_the_widest():
    many = report(160)
    page = Page(html(many))
    for row in many["layers"]:
        assert row["layer"] in page.text
    assert page.tags.count(("i", "class", "style")) == 2 * 160
    assert page.text.count("removed") == sum(row["after"] is None for row in many["layers"])


def test_a_new_recovery_begins_where_epochs_start_again():
    twice = report()
    twice["history"] = 2 * twice["history"]
    text = Page(html(twice)).text
    assert "Round 1: 8 epochs" in text and "Round 2: 8 epochs" in text


def test_the_epoch_that_was_kept_is_one_in_which_all_was_pruned():
    gradual = report()
    for row in gradual["history"]:
        row["score"], row["pruned"] = 1 - row["epoch"] / 10, row["epoch"] >= 6
    assert "the model of epoch 6 was kept" in Page(html(gradual)).text


def test_layers_in_float_are_gathered_by_reason():
    slow, none = "it was slower", "there is no kernel"
    reasons = {"a": slow, "b": none, "c": slow}
    floating = [{"layer": name, "macs": 0.25, "reason": why} for name, why in reasons.items()]
    text = html({**report(), "integers": {"macs": 0.25, "floating": floating}})
    assert text.count(slow) == text.count(none) == 1
    assert "a, 25 %; c, 25 %" in text and text.index(slow) < text.index("b, 25 %")


def test_frozen_units_are_gathered_by_reason():
    assert "it is an output of the model head.out, aux.out" in Page(html(report())).text


@pytest.mark.parametrize("verdict", ["refuted", "inconclusive", "measured"])
def test_every_verdict_is_shown(verdict):
    told = report()
    told["certificate"] |= {"verdict": verdict, "max_drop": None if verdict == "measured" else 0.005}
    text = html(told)
    assert f'class="verdict {verdict}"' in text and f"<b>{verdict.capitalize()}</b>" in text


def test_a_file_that_is_no_report_is_refused_in_one_sentence():
    with pytest.raises(SlimlineError, match="schema 2"):
        html({"schema": 2})
    broken = report()
    broken["original"]["file_bytes"] = "many"
    with pytest.raises(SlimlineError, match="file_bytes") as caught:
        html(broken)
    assert "\n" not in str(caught.value)


def test_an_excuse_for_a_difference_is_on_the_page() -> None:
    """How far the model moves by itself stands there where that was asked, and nowhere else."""
    words, full = "of the model from itself", report()
    assert words not in Page(html(full)).text
    full["parity"]["instability"] = 0.0432
    assert f"{words}, its floats moved by their last digits 0.0432" in Page(html(full)).text
