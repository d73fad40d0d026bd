"""Scales of channels and means of clipped numbers against closed forms and samples."""

from __future__ import annotations

import numpy as np
import pytest

from slimline.methods.equalization import clipped_normal_mean, equal_scales


def test_scales_make_both_sides_equal_and_leave_empty_channels() -> None:
    first, second = np.array([4.0, 0.0, 0.5, 3.0]), np.array([1.0, 2.0, 8.0, 0.0])
    scale = equal_scales(first, second)
    assert scale.tolist() == [2.0, 1.0, 0.25, 1.0]
    assert (first / scale)[[0, 2]] == pytest.approx((second * scale)[[0, 2]])


@pytest.mark.parametrize(("low", "high"), [(0.0, np.inf), (0.0, 6.0), (-np.inf, np.inf), (-1.0, 1.0)])
def test_the_mean_of_clipped_numbers_is_that_of_many(low: float, high: float) -> None:
    mean, deviation = np.array([-2.0, 0.0, 1.5, 7.0]), np.array([1.0, 0.5, 3.0, 2.0])
    many = np.random.default_rng(0).normal(size=(200_000, 4)) * deviation + mean
    assert clipped_normal_mean(mean, deviation, low, high) == pytest.approx(np.clip(many, low, high).mean(0), abs=0.03)
    assert clipped_normal_mean(mean, np.zeros(4), low, high) == pytest.approx(np.clip(mean, low, high))
