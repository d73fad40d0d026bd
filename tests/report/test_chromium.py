"""The page in a real browser: what it shows, and that it asks nobody for anything."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest

from slimline.report.page import html
from tests.report.example import hostile, report

CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--timeout=20000",
)  # fmt: skip
BROWSERS_OWN = re.compile(r"https?://[^/]*\.(google|googleapis|gvt1|gstatic)\.com[/:]")


@pytest.fixture
def browse(tmp_path):
    """Loads a page in headless Chromium; gives the DOM, the console's lines and the URLs the page asked for."""
    if CHROMIUM is None:
        missing = "Chromium is not installed, so report.html was not looked at: run apt-get install chromium."
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)

    def load(text, *flags):
        page, log = tmp_path / "report.html", tmp_path / "net.json"
        page.write_text(text)
        own = (f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}", *flags, "--dump-dom", page.as_uri())
        done = subprocess.run([CHROMIUM, *FLAGS, *own], capture_output=True, text=True, timeout=90, check=True)
        console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
        urls = re.findall(r'"url":\s*"(https?:[^"]*)"', log.read_text())
        return done.stdout, console, {url for url in urls if not BROWSERS_OWN.match(url)}

    return load


def test_shows_the_figures_without_errors_or_requests(browse):
    dom, console, urls = browse(html(report()))
    text = re.sub(r"<style>.*?</style>", "", dom, flags=re.S)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text))
    for figure in (
        "94.31 %", "93.89 %", "−0.42 points", "2.81 MB", "221 kB", "12.7× smaller", "70.1 M", "44.1 ms", "11.9 ms",
        "3.71× faster", "91.0 MB", "the true drop is at most 0.71 points", "budget 1.00 points", "99.80 %",
        "stages.2.0.conv1", "128 → 64", "avx512_vnni", "'runs/my run'", "round_to: 16", "made batch 32 slower by 3 %",
    ):  # fmt: skip
        assert figure in text, figure
    assert dom.count("<svg") == 5  # the certificate, two batch sizes, score and loss
    assert console == []
    assert urls == set()


def test_runs_nothing_a_report_holds(browse):
    dom, console, urls = browse(html(hostile()))
    assert "<script" not in dom and not re.findall(r"<title>(.*?)</title>", dom)[0].startswith("owned")
    assert console == []
    assert urls == set()


@pytest.mark.parametrize("name", ["plain", "averyverylongname" * 60, "a b " * 200], ids=["plain", "long", "words"])
@pytest.mark.parametrize("width", [380, 700, 1100])
def test_no_name_breaks_the_layout(browse, name, width):
    measuring = (
        "<script>document.title = ['body', ...['section', 'header'].flatMap(t => [...document.querySelectorAll(t)])]"
        ".map(e => e === 'body' ? document.documentElement.scrollWidth - innerWidth : e.scrollWidth - e.clientWidth)"
        ".join(' ')</script>"
    )
    page = re.sub(r"<meta http-equiv=[^>]*>", "", html(hostile(name))).replace("</body>", f"{measuring}</body>")
    dom, _, _ = browse(page, f"--window-size={width},900")
    beyond = [int(part) for part in re.findall(r"<title>([-\d ]+)</title>", dom)[0].split()]
    assert len(beyond) > 8 and max(beyond) <= 0, beyond


def test_the_browser_would_tell(browse):
    dom, console, urls = browse(
        "<title>.</title><img src=https://example.org/x><script>document.title='owned';console.error('told')</script>"
    )
    assert "<title>owned</title>" in dom
    assert any("told" in line for line in console)
    assert urls == {"https://example.org/x"}
