"""What `print`, the prompt and a notebook show of results: short, for people, and in any encoding."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from slimline.measure import Latency, Report
from slimline.report.page import html
from tests.report.example import PAYLOAD, report


def parsed(**changes):
    import json

    return Report.from_json(json.dumps(report() | changes))


def test_print_shows_the_table_and_the_certificate():
    said = str(parsed(run="half", model="resnet18", warnings=["The machine was busy."], unmet=["size is 0.5"]))
    lines = said.splitlines()
    assert lines[0] == "resnet18, run half, onnxruntime"
    row = ["Latency,", "batch", "32", "44.1", "ms", "11.9", "ms", "3.71x", "faster"]
    assert row in [line.split() for line in lines]
    assert "Certified: accuracy fell by 0.42 points; the true drop is at most 0.71 points" in said
    assert "Warning: The machine was busy." in said and "Over budget: size is 0.5." in said
    assert "1 thing refused or undone" in said
    assert said.isascii() and len(said) < 1500 and max(map(len, lines[:10])) <= 80


def test_limits_are_said_in_their_units():
    amount = {"value": 4.31, "low": 4.2, "high": 4.4, "confidence": 0.95, "unit": "ms"}
    latency = {"value": 0.3, "low": 0.29, "high": 0.31, "confidence": 0.95, "amount": amount}
    size = {"value": 0.2, "low": 0.2, "high": 0.2}
    limits = [
        {"what": "latency", "part": latency, "limit": 5, "outcome": "met", "unit": "ms", "batch": 32},
        {"what": "size", "part": size, "limit": 0.25, "outcome": "met"},
        {"what": "latency", "part": latency, "limit": 0.3, "outcome": "unclear"},
    ]
    found = parsed(limits=limits)
    said = "latency is 4.31 ms (4.2 to 4.4 with 95 % confidence) at batch 32, the budget is 5 ms"
    assert f"Within budget: {said}.\n" in f"{found}\n"
    assert "Within budget: size reaches 0.2 of the original's, the budget is 0.25." in str(found)
    assert "the budget is 0.3: the clock cannot tell." in str(found)
    assert f"<p>{said}</p>" in found._repr_html_()
    trial = {"stage": "estimate", "settings": {"strength": "half"}, "cost": {"latency": {"32": latency}, "size": size}}
    page = html(report() | {"limits": limits, "trials": [trial]})
    assert said in page and "4.31 ms (4.2 to 4.4)" in page
    head = page.partition('class="trials"')[2].partition("</thead>")[0]
    assert re.findall(">([^<>]+)</th>", head) == ["Tried", "Latency", "Size", "Outcome"]  # columns of what was measured


def test_a_prompt_shows_one_line_of_each():
    found = parsed()
    assert repr(found).startswith("<Report on onnxruntime: Certified: accuracy fell")
    for part in (found, found.original, found.original.latency[32]):
        assert "\n" not in repr(part) and len(repr(part)) < 300
    assert str(found.original).startswith("mean score 0.9431, file 2.81 MB, 697 k parameters")
    assert str(found.parity) == "passed on 512 rows, largest error 0.021 of the largest output"
    assert str(found.certificate) == found.certificate.sentence()
    assert "waited for a core 20% of the time" in str(Latency.of([1.0, 2.0], 0.2))


def test_a_notebook_shows_no_markup_of_others():
    class Tags(HTMLParser):
        found: set[str] = set()  # noqa: RUF012 - of this test alone

        def handle_starttag(self, tag, attrs):
            self.found.add(tag)

    certificate = report()["certificate"] | {"metric": PAYLOAD}
    page = parsed(certificate=certificate, warnings=[PAYLOAD])._repr_html_()
    Tags().feed(page)
    assert Tags.found == {"table", "tr", "th", "td", "p"}
    assert "44.1 ms" in page


@pytest.mark.parametrize("hostile", ["\x1b[2J", "\u202e", "Ⓜ", "\x9b31m"])
def test_names_of_others_cannot_steer_a_terminal(hostile):
    said = str(parsed(model=f"a{hostile}b"))
    assert said.isascii() and said.replace("\n", "").isprintable()
