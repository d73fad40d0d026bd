"""One judgement of limits for estimate, undo and report: a latency is as sure as its interval."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimline.measure import (
    Amount,
    Cost,
    Latency,
    Limit,
    Memory,
    Part,
    latency_part,
    median_amount,
    memory_part,
    speedup,
)
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
    assert all(limited(Budget(**{field: 0.5})) for field in ("max_latency", "max_size", "max_memory", "max_macs"))
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
    assert found.amount == median_amount(after, found.confidence)


def timed(low, value, high):
    """A latency in ms; in parts it would be judged otherwise."""
    amount = Amount(value=value, low=low, high=high, confidence=0.95, unit="ms")
    return Part(value=0.5, low=0.5, high=0.5, confidence=0.95, amount=amount)


@pytest.mark.parametrize(
    ("interval", "outcome"),
    [
        ((4.2, 4.31, 4.4), "met"),
        ((4.2, 4.31, 5.0), "met"),
        ((4.9, 4.95, 5.01), "unclear"),
        ((5.0, 5.3, 5.5), "unclear"),
        ((5.01, 5.3, 5.5), "missed"),
    ],
)
def test_a_time_is_judged_by_the_artifact_s_own_interval_at_the_largest_batch(interval, outcome):
    cost = Cost(latency={1: timed(0.1, 0.1, 0.1), 32: timed(*interval)})
    (limit,) = limits(cost, Budget(max_latency="5 ms"))
    assert (limit.outcome, limit.limit, limit.unit, limit.batch) == (outcome, 5.0, "ms", 32)
    low, value, high = (f"{x:g}" for x in interval)
    said = f"latency is {value} ms ({low} to {high} with 95 % confidence) at batch 32, the budget is 5 ms"
    assert limit.sentence() == said + (": the clock cannot tell" if outcome == "unclear" else "")
    (part_,) = limits(cost, Budget(max_latency=0.4))
    assert part_.outcome == "missed" and part_.unit is None and part_.sentence().startswith("latency reaches 0.5 of")


@pytest.mark.parametrize(("bytes_", "outcome"), [(1_999_999, "met"), (2_000_000, "met"), (2_000_001, "missed")])
@pytest.mark.parametrize(("field", "what"), [("size", "size"), ("memory", "peak memory")])
def test_bytes_are_judged_to_the_byte_and_said_so_that_one_sees_it(field, what, bytes_, outcome):
    (limit,) = limits(Cost(**{field: Part.exact(bytes_, 10**7, "B")}), Budget(**{f"max_{field}": "2 MB"}))
    assert limit.outcome == outcome
    shown = {1_999_999: "1.999999 MB", 2_000_000: "2 MB", 2_000_001: "2.000001 MB"}[bytes_]
    assert limit.sentence() == f"{what} is {shown}, the budget is 2 MB"


def test_an_amount_that_was_not_measured_is_not_judged():
    assert limits(Cost(size=Part.exact(1, 2)), Budget(max_size="1 B")) == ()
    assert memory_part(Memory(None, None), Memory(5, 1)) is None
    assert memory_part(Memory(10, 1), Memory(5, 1)) == Part.exact(5, 10, "B")


def test_long_times_and_small_sizes_are_said_without_exponents():
    (limit,) = limits(Cost(latency={8: timed(12345.6, 12500, 13000)}), Budget(max_latency="2 s"))
    assert limit.sentence().startswith("latency is 12500 ms (12300 to 13000 with")
    (limit,) = limits(Cost(size=Part.exact(999, 10**4, "B")), Budget(max_size="1 kB"))
    assert limit.sentence() == "size is 999 B, the budget is 1 kB"


def test_a_limit_of_a_stranger_whose_units_differ_is_refused():
    exact = {"what": "{0.part}", "part": {"value": 1, "low": 1, "high": 1}, "limit": 1, "outcome": "met"}
    assert Limit.model_validate(exact).sentence() == "{0.part} reaches 1 of the original's, the budget is 1"
    with pytest.raises(ValueError, match="is in ms and what was measured is not"):
        Limit.model_validate({**exact, "unit": "ms"})


@given(st.integers(0, 2**31), st.integers(1, 60))
def test_the_interval_of_a_median_holds_it_and_scales_with_it(seed, rounds):
    samples = np.random.default_rng(seed).gamma(20, 0.5, rounds)
    one, double = (median_amount(Latency.of((k * samples).tolist()), seed=seed) for k in (1, 2))
    assert one.low <= one.value <= one.high
    assert one.value == pytest.approx(np.median(samples))
    assert (double.low, double.high) == pytest.approx((2 * one.low, 2 * one.high))


@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_the_interval_covers_the_median_about_as_often_as_it_says(correlation):
    held = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        noise = rng.normal(0, 1, 60)
        for i in range(1, 60):
            noise[i] = correlation * noise[i - 1] + (1 - correlation**2) ** 0.5 * noise[i]
        found = median_amount(Latency.of((10 + noise).tolist()), seed=seed, resamples=300)
        held += found.low <= 10 <= found.high
    assert held > 0.85 * 300
