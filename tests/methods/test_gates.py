"""Hard-concrete gates against samples and differences."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimline.methods import gates

parameters = st.floats(-4, 4)
U = (np.arange(200_000) + 0.5) / 200_000


@pytest.mark.parametrize("a", [-3.0, -0.5, 0.0, 1.0, gates.OPEN])
def test_the_distribution_is_that_of_the_samples(a):
    z = gates.sampled(np.full(U.shape, a), U)
    assert z.min() >= 0
    assert z.max() <= 1
    for at in (0.0, 0.2, 0.5, 0.9):
        assert gates.cdf(np.array(a), at) == pytest.approx(np.mean(z <= at), abs=1e-4)
    assert gates.open_probability(np.array(a)) == pytest.approx(np.mean(z > 0), abs=1e-4)


@given(parameters)
def test_the_expected_l0_is_that_of_the_paper(a):
    paper = 1 / (1 + np.exp(-(a - gates.BETA * np.log(-gates.GAMMA / gates.ZETA))))
    assert gates.open_probability(np.array(a)) == pytest.approx(paper, rel=1e-9)


@given(parameters, st.floats(0.01, 0.99))
def test_slopes_are_differences(a, u):
    h = 1e-6
    at, uniform = np.array([a - h, a, a + h]), np.full(3, u)
    low, middle, high = gates.sampled(at, uniform)
    if 1e-3 < middle < 1 - 1e-3:
        assert gates.slope(at, uniform)[1] == pytest.approx((high - low) / (2 * h), rel=1e-4)
    elif low == high:
        assert gates.slope(at, uniform)[1] == 0
    low, _, high = gates.open_probability(at)
    assert gates.open_slope(at)[1] == pytest.approx((high - low) / (2 * h), rel=1e-4)


def test_gates_begin_open_and_can_close():
    np.testing.assert_array_equal(gates.expected(np.array([gates.OPEN, 8.0, -2.4, -8.0])), [1, 1, 0, 0])
    assert 0 < gates.expected(np.array([0.0]))[0] < 1
