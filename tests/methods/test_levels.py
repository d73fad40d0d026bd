"""Scales of levels against exhaustive search and closed forms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from slimline.basics.errors import SlimlineError
from slimline.methods.formats import Levels, along
from slimline.methods.levels import FOUR, best_scale, fitted, levels

CODEBOOKS = [(-1, 1), (-1, 0, 1), FOUR, (-1, -0.5, 0, 0.5, 1), (-0.3, 0.1, 1)]
numbers = st.floats(-4, 4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)


def least(weights, codebook):
    """The least squared error over all ways to give each weight a level, each with its own best positive scale."""
    found = float(weights @ weights)
    for levels_ in itertools.product(codebook, repeat=len(weights)):
        q = np.array(levels_)
        if (product := float(weights @ q)) > 0:
            found = min(found, float(weights @ weights) - product**2 / float(q @ q))
    return found


@pytest.mark.parametrize("codebook", CODEBOOKS, ids=str)
@given(weights=arrays(np.float32, st.integers(1, 5), elements=numbers))
def test_no_other_scale_and_no_other_choice_of_levels_is_better(codebook, weights):
    each = Levels(np.float32(best_scale(weights, np.array(codebook))), (), np.array(codebook, np.float32))
    error = float(((weights - each.round(weights)).astype(np.float64) ** 2).sum())
    assert error <= least(weights.astype(np.float64), codebook) + 1e-4 * (1 + error)


@given(weights=arrays(np.float32, (3, 7), elements=numbers))
def test_binary_and_ternary_have_the_closed_forms_of_the_papers(weights):
    each = fitted(weights, levels("binary"), along(0, 2))  # XNOR-Net
    np.testing.assert_allclose(each.scale.ravel(), np.abs(weights).mean(1), rtol=1e-5, atol=1e-30)
    each = fitted(weights, levels("ternary"), along(0, 2))  # TWN: the mean of what is above the threshold
    for row, scale in zip(np.abs(weights), each.scale.ravel(), strict=True):
        large = np.sort(row)[::-1]
        gains = np.cumsum(large) ** 2 / np.arange(1, 8)
        assert scale == pytest.approx(np.cumsum(large)[gains.argmax()] / (gains.argmax() + 1) or 1, rel=1e-4)


def test_scales_lie_in_blocks():
    weights = np.random.default_rng(0).normal(size=(3, 10)).astype(np.float32)
    each = fitted(weights, levels("ternary"), (1, 4))
    assert each.scale.shape == (3, 3)
    for row, start in itertools.product(range(3), range(0, 10, 4)):
        part = weights[row, start : start + 4]
        assert each.scale[row, start // 4] == pytest.approx(best_scale(part, np.array([-1, 0, 1])))
    with pytest.raises(SlimlineError, match="NaN"):
        fitted(weights * np.nan, levels("ternary"), ())


@pytest.mark.parametrize(
    ("dtype", "bits", "narrow"),
    [("binary", 2, True), ("ternary", 2, True), (FOUR, 2, False), ("pow2", 8, True), ((0.0, 1.5, 3.0), 4, True)],
)
def test_integer_grids_hold_the_same_numbers(dtype, bits, narrow):
    unit = levels(dtype)
    each = Levels(np.float32(0.37), (), unit.codebook)
    grid = each.grid
    assert (grid.bits, grid.narrow) == (bits, narrow)
    rounded = each.round(np.linspace(-2, 2, 99, dtype=np.float32))
    np.testing.assert_array_equal(grid.round(rounded), rounded)


@pytest.mark.parametrize("codebook", [(-0.3, 0.1, 1), (0, 1, 1000)], ids=str)
def test_levels_that_no_grid_holds(codebook):
    assert levels(codebook).grid is None


def test_no_list_of_levels():
    assert levels("int4") is None
    with pytest.raises(SlimlineError, match="A codebook holds 2"):
        levels((1.0, 1.0))
