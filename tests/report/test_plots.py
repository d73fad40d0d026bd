from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimline.basics import text
from slimline.measure.certificate import Certificate
from slimline.measure.figures import Latency
from slimline.report import plots
from tests.report.example import report


@given(st.floats(-100, 100), st.floats(1e-3, 1e5), st.integers(2, 8))
def test_ticks_are_few_round_and_inside(low, spread, most):
    ticks = plots._ticks(low, low + spread, most)
    assert len(ticks) <= most + 1
    for tick in ticks:
        assert low - 1e-6 * spread <= tick <= low + spread * (1 + 1e-6)
    if len(ticks) > 2:
        gaps = np.diff(ticks)
        leading = float(f"{gaps[0]:.6e}".split("e")[0])
        assert leading == pytest.approx(round(leading)) and round(leading) in (1, 2, 5, 10)


def positions(svg, kind):
    """Where the vertical marks of a class stand."""
    return [float(x) for x in re.findall(rf'<path class="{kind}" d="M([\d.]+) ', svg)]


def certificate(**changes):
    return Certificate.model_validate(report()["certificate"] | changes)


def test_the_scale_of_the_certificate_is_linear():
    svg = str(plots.certificate_scale(certificate(), str))
    (observed,), (bound,), (budget,) = (positions(svg, k) for k in ("leader", "bound", "budget"))
    assert (bound - observed) / (budget - observed) == pytest.approx((0.0071 - 0.0042) / (0.01 - 0.0042), abs=0.01)


def test_without_a_budget_none_is_drawn():
    svg = str(plots.certificate_scale(certificate(max_drop=None, verdict="measured"), str))
    assert "budget" not in svg and positions(svg, "bound")


def test_nothing_lost_and_nothing_gained_still_draws():
    flat = certificate(observed_drop=0.0, bound=0.0, lower_bound=0.0, max_drop=0.0)
    assert "nan" not in str(plots.certificate_scale(flat, str))


NUMBERS = st.one_of(
    st.floats(-1e99, 1e99), st.floats(-1, 1), st.floats(-1e-12, 1e-12), st.sampled_from([0.0, 5e-324, -1e-300, 1e99])
)


@given(NUMBERS, NUMBERS, NUMBERS, st.none() | NUMBERS, st.sampled_from(["accuracy", "rmse"]))
def test_no_two_words_of_the_certificate_overlap(observed, one, other, budget, metric):
    changes = {"observed_drop": observed, "bound": max(one, other), "lower_bound": min(one, other)}
    drawn = certificate(**changes, max_drop=budget, metric=metric)
    svg = str(plots.certificate_scale(drawn, lambda v: text.drop(v, metric)[:40]))
    assert "nan" not in svg and "inf" not in svg
    words = re.findall(r'<text class="[^"]*" x="([-\d.]+)" y="([-\d.]+)" text-anchor="(\w+)">([^<]*)<', svg)
    assert len(words) >= 3
    places = []
    for x, y, anchor, said in words:
        width = 5.6 * len(said)
        left = float(x) - {"start": 0, "middle": width / 2, "end": width}[anchor]
        places.append((left, left + width, float(y) - 9, float(y) + 2))
    for i, a in enumerate(places):
        assert a[0] >= -1 and a[1] <= plots.WIDTH + 1
        for b in places[:i]:
            assert a[1] <= b[0] or b[1] <= a[0] or a[3] <= b[2] or b[3] <= a[2], svg
    verticals = re.findall(r'<path class="(?:bound|budget|leader)" d="M[\d.]+ (\d+)V(\d+)"/>', svg)
    assert verticals and all(int(low) < min(p[2] for p in places) + 9 for _, low in verticals)


def test_every_sample_is_a_dot_and_late_ones_are_counted():
    times = [1.0] * 98 + [50.0, 60.0]
    svg = str(plots.latencies(Latency.of(times), Latency.of([0.5] * 100)))
    dots = re.findall(r'class="dots \w+" d="([^"]*)"', svg)
    assert [d.count("h0") for d in dots] == [100, 100]
    assert "2 samples lie beyond" in svg
    xs = [float(x) for d in dots for x in re.findall(r"M([\d.]+) ", d)]
    assert max(xs) <= plots.WIDTH - plots.MARGIN


def test_medians_stand_in_proportion():
    svg = str(plots.latencies(Latency.of([4.0] * 50), Latency.of([1.0] * 50)))
    slow, fast = positions(svg, "median original") + positions(svg, "median compressed")
    assert (slow - plots.MARGIN) / (fast - plots.MARGIN) == pytest.approx(4, rel=0.01)


def test_many_samples_are_thinned():
    svg = str(plots.latencies(Latency.of(np.linspace(1, 2, 10_000)), None))
    assert svg.count("h0") <= plots.MOST_DOTS


def test_a_curve_skips_what_is_no_number_and_survives_one_point():
    assert str(plots.curve([(0, float("nan"))], "loss", str)) == ""
    svg = str(plots.curve([(0, 0.5), (1, float("inf"))], "score", str, 0))
    assert svg.count("<circle") == 1 and "nan" not in svg
