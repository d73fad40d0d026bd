"""One judgement of limits for estimate, undo and report: a latency is as sure as its interval."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimline.measure import Cost, Latency, Part, latency_part, speedup
from slimline.measure.limits import judged_batch, limited, limits, worst
from slimline.recipe import Budget


def part(low, value, high):
    return Part(value=value, low=low, high=high, confidence=0.95)


@pytest.mark.parametrize(
    ("interval", "outcome"),
    [
        ((0.40, 0.45, 0.50), "met"),
        ((0.40, 0.45, 0.51), "unclear"),
        ((0.49, 0.55, 0.60), "unclear"),
        ((0.50, 0.55, 0.60), "unclear"),
        ((0.51, 0.55, 0.60), "missed"),
    ],
)
def test_a_latency_is_met_or_missed_where_its_whole_interval_is(interval, outcome):
    (limit,) = limits(Cost(latency={1: part(0.1, 0.1, 0.1), 32: part(*interval)}), Budget(max_latency=0.5))
    assert limit.outcome == worst([limit]) == outcome
    said = limit.sentence()
    assert f"{interval[0]:.3g} to {interval[2]:.3g} with 95 % confidence), the budget is 0.5" in said
    assert said.endswith("the clock cannot tell") == (outcome == "unclear")


def test_what_is_counted_has_no_slack_at_the_edge():
    cost = Cost(size=Part.exact(500, 1000), macs=Part.exact(501, 1000))
    size, macs = limits(cost, Budget(max_size=0.5, max_macs=0.5))
    assert (size.outcome, macs.outcome) == ("met", "missed")
    assert macs.sentence() == "MACs reaches 0.501 of the original's, the budget is 0.5"
    assert worst([size, macs]) == "missed"


def test_only_limits_that_are_set_and_measured_are_judged():
    assert limits(Cost(size=Part.exact(1, 2)), Budget(max_latency=0.5)) == ()
    assert worst(()) == "met"
    assert not limited(Budget(max_drop=0.01))
    assert all(limited(Budget(**{field: 0.5})) for field in ("max_latency", "max_size", "max_macs"))
    assert judged_batch((32, 1, 8)) == 32


@given(st.integers(0, 2**31), st.floats(0.2, 3))
def test_the_interval_is_that_of_the_speed_up(seed, ratio):
    rng = np.random.default_rng(seed)
    before = Latency.of(rng.normal(10, 0.5, 40).clip(5).tolist())
    after = Latency.of((ratio * rng.normal(10, 0.5, 40).clip(5)).tolist())
    found, faster = latency_part(before, after), speedup(before, after)
    assert found.low <= found.value <= found.high
    assert (found.low, found.high) == pytest.approx((1 / faster.high, 1 / faster.low))
    assert found.confidence == faster.confidence
