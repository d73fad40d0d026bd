import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimline.methods import schedules
from slimline.methods.schedules import dense_phase, ratios, regrown, sparsity, warmup_cosine


def test_the_rise_is_linear_and_the_fall_a_cosine():
    found = [warmup_cosine(i, 100, 0.1) for i in range(100)]
    rise = [(i + 1) / 10 for i in range(10)]
    fall = [(1 + math.cos(math.pi * i / 90)) / 2 for i in range(90)]
    assert found == pytest.approx(rise + fall)


@given(st.integers(1, 500), st.floats(0, 0.99))
def test_factors_stay_in_range_peak_at_one_and_end_at_zero(total, warmup):
    factors = warmup_cosine(np.arange(total + 3), total, warmup)
    assert factors.min() >= 0
    assert factors.max() == 1
    assert (factors[:total] > 0).all() or round(warmup * total) == total
    assert warmup_cosine(total, total, warmup) == pytest.approx(0, abs=1e-12) or round(warmup * total) == total
    assert [warmup_cosine(i, total, warmup) for i in range(total)] == factors[:total].tolist()


def test_no_steps_at_all_is_no_error():
    assert warmup_cosine(0, 0, 0.5) == 1.0


@given(st.integers(1, 20), st.floats(0.01, 0.99))
def test_rounds_are_equal_parts_that_end_at_the_target(rounds, target):
    found = ratios("iterative", rounds, target)
    assert len(found) == rounds
    assert found[-1] == target
    assert np.diff([0, *found]) == pytest.approx(target / rounds)
    assert ratios("uniform", rounds, target) == found
    assert ratios("oneshot", rounds, target) == [target]


def test_sparsity_schedules_end_at_the_target():
    for schedule in ("constant", "polynomial", "exponential"):
        assert sparsity(schedule, 1.0, 0.9) == pytest.approx(0.9)
    assert sparsity("polynomial", 0.0, 0.9) == 0
    assert sparsity("polynomial", 0.5, 0.9) == pytest.approx(0.9 * (1 - 0.5**3))
    assert sparsity("polynomial", 0.5, 0.9, power=1) == pytest.approx(0.45)
    assert sparsity("exponential", 0.5, 0.99) == pytest.approx(0.9)
    assert sparsity("exponential", 1.0, 1.0) == 1.0
    steps = [sparsity("polynomial", t, 0.8) for t in np.linspace(0, 1, 20)]
    assert all(a <= b for a, b in pairwise(steps))


def test_dense_and_sparse_phases_take_turns():
    dense = [dense_phase(step, 4, 12, 2) for step in range(16)]
    assert dense == [True] * 4 + [False, False, True, True, False, False, True, True] + [False] * 4


def test_what_is_exchanged_falls_to_nothing():
    assert regrown(0, 0.3) == pytest.approx(0.3)
    assert regrown(0.5, 0.3) == pytest.approx(0.15)
    assert regrown(1, 0.3) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("total", "warmup"), [(20, 0.3), (7, 0.5), (10, 0.2)])
def test_one_cycle_is_torchs(total, warmup):
    import torch

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    oracle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total, pct_start=warmup)
    for step in range(total):
        assert schedules.rate("one-cycle", step, total, warmup) == pytest.approx(optimizer.param_groups[0]["lr"]), step
        optimizer.step()
        if step < total - 1:
            oracle.step()


def test_one_cycle_without_a_rise_begins_at_the_top():
    rates = [schedules.rate("one-cycle", i, 5, 0.0) for i in range(5)]
    assert rates[0] == 1 and rates[-1] == pytest.approx(4e-6) and rates == sorted(rates, reverse=True)


def test_other_rates_rise_alike():
    rates = {kind: [schedules.rate(kind, i, 10, 0.2) for i in range(10)] for kind in ("linear", "constant", "plateau")}
    assert rates["linear"] == pytest.approx([0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    assert rates["constant"] == rates["plateau"] == [0.5, *[1] * 9]
    assert schedules.rate("cosine", 3, 10, 0.2) == schedules.warmup_cosine(3, 10, 0.2)


def test_a_plateau_lowers_the_rate_as_torchs_does():
    import torch

    scores = [1, 2, 2, 2, 3, 2, 3, 2, 1, 4, 4, 4, 4, 4.0]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    options = {"mode": "max", "patience": 1, "threshold": 0, "eps": 0}  # torch's patience is one less
    oracle = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **options)
    for i in range(len(scores)):
        oracle.step(scores[i])
        assert schedules.plateau(scores[: i + 1], 2) == pytest.approx(optimizer.param_groups[0]["lr"])
