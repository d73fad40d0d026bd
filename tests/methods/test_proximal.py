"""Proximal steps against the definition: no other point has a lower value."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from slimline.methods.proximal import adaptive_weights, group_factors, ridge_factor, soft_threshold

values = st.floats(-5, 5)
amounts = st.floats(0, 3)


@given(values, amounts, values)
def test_soft_threshold_minimises(v, amount, other):
    w = float(soft_threshold(np.array([v]), amount)[0])
    assert 0.5 * (w - v) ** 2 + amount * abs(w) <= 0.5 * (other - v) ** 2 + amount * abs(other) + 1e-12


def test_soft_threshold_gives_exact_zeros_and_keeps_the_dtype():
    found = soft_threshold(np.array([-2, -0.5, 0, 0.5, 2], np.float32), 0.5)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [-1.5, 0, 0, 0, 1.5])


@given(values, amounts, values)
def test_ridge_minimises(v, amount, other):
    w = float(v * ridge_factor(amount))
    assert 0.5 * (w - v) ** 2 + amount / 2 * w**2 <= 0.5 * (other - v) ** 2 + amount / 2 * other**2 + 1e-12


@given(st.lists(st.lists(values, min_size=3, max_size=3), min_size=1, max_size=4), amounts)
def test_group_factors_minimise(groups, amount):
    rng = np.random.default_rng(0)
    v = np.array(groups)
    factors = group_factors(np.square(v).sum(axis=1), np.full(len(v), amount))
    w = v * factors[:, None]

    def value(at):
        return 0.5 * np.square(at - v).sum(axis=1) + amount * np.sqrt(np.square(at).sum(axis=1))

    for other in (v + rng.normal(size=v.shape), w + 1e-2 * rng.normal(size=v.shape), np.zeros_like(v)):
        assert (value(w) <= value(other) + 1e-12).all()


def test_a_group_goes_as_a_whole():
    np.testing.assert_array_equal(group_factors(np.array([4.0, 1.0, 0.0]), np.array([1.0, 1.0, 1.0])), [0.5, 0, 0])


def test_adaptive_weights_fall_from_one_to_a_sixteenth_in_each_unit():
    squares, sizes = np.array([1.0, 4.0, 9.0, 8.0, 8.0, 50.0]), np.array([1.0, 1.0, 1.0, 2.0, 2.0, 2.0])
    found = adaptive_weights(squares, sizes, np.array([0, 0, 0, 1, 1, 2]))
    np.testing.assert_allclose(found, [1, 1 / 4, 1 / 16, 1, 1, 1])
