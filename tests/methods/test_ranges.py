"""Ranges and grids against closed forms, numpy, and exhaustive search."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import entropy

from slimline.basics.errors import SlimlineError
from slimline.methods import ranges
from slimline.methods.ranges import (
    MSE,
    Entropy,
    MinMax,
    MovingAverage,
    Percentile,
    affine_grid,
    centred_grid,
    float_format,
    observer,
    symmetric_grid,
)

OBSERVERS = ("minmax", "moving_average", "percentile", "mse", "entropy")

few = settings(deadline=None, max_examples=25)
reals = st.floats(-1e4, 1e4, width=32)


@given(reals, reals, st.booleans(), st.sampled_from([4, 8]))
@few
def test_affine_grid_holds_zero_and_the_range(a: float, b: float, signed: bool, bits: int) -> None:
    low, high = min(a, b), max(a, b)
    grid = affine_grid(low, high, bits, signed)
    scale = float(grid.scale)
    assert grid.high - grid.low == 2**bits - 1
    assert grid.low <= grid.zero <= grid.high
    assert np.float32(scale) == scale > 0
    assert grid.round(np.zeros(1))[0] == 0.0
    # Zero is moved onto the grid, so each end may be half a step short, and no more.
    assert (grid.low - grid.zero) * scale <= min(low, 0) + 0.501 * scale
    assert (grid.high - grid.zero) * scale >= max(high, 0) - 0.501 * scale


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=5), elements=reals))
@few
def test_rounding_inside_the_range_is_off_by_half_a_step(x: np.ndarray) -> None:
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    grid = affine_grid(low, high)
    inside = np.clip(x, (grid.low - grid.zero) * grid.scale, (grid.high - grid.zero) * grid.scale)
    assert np.abs(grid.round(x) - inside).max() <= grid.scale * 0.5001 + 1e-6
    assert np.array_equal(grid.round(grid.round(x)), grid.round(x))


def test_one_sided_range_keeps_zero_at_the_end() -> None:
    assert affine_grid(0.0, 6.0).zero == 0
    assert affine_grid(1.0, 6.0) == affine_grid(0.0, 6.0)
    assert affine_grid(0.0, 6.0, signed=True).zero == -128
    assert affine_grid(-6.0, 0.0).zero == 255


@pytest.mark.parametrize("low, high", [(0.0, 0.0), (0.0, 1e-45), (-1e-40, 1e-40)])
def test_degenerate_ranges_are_safe(low: float, high: float) -> None:
    grid = affine_grid(low, high)
    assert np.isfinite(np.float32(1.0) / np.float32(grid.scale))
    assert grid.round(np.zeros(3, np.float32)).tolist() == [0, 0, 0]


def test_symmetric_grid_per_channel_in_closed_form() -> None:
    weight = np.array([[1.27, -0.3], [0.0, 0.0], [-254.0, 2.0]], np.float32)
    grid = symmetric_grid(weight, 0)
    assert (grid.low, grid.high, grid.axis) == (-127, 127, 0)
    assert np.allclose(grid.scale, [[0.01], [2.0], [2.0]])  # the row of zeros takes the largest
    assert grid.encode(weight).tolist() == [[127, -30], [0, 0], [-127, 1]]
    assert symmetric_grid(weight, 1).scale.ravel() == pytest.approx([2.0, 2.0 / 127])
    assert float(symmetric_grid(weight, None).scale) == pytest.approx(2.0)
    assert symmetric_grid(np.zeros((2, 2), np.float32), 0).scale.tolist() == [[1.0], [1.0]]


def test_symmetric_grid_refuses_nan() -> None:
    with pytest.raises(SlimlineError, match="NaN"):
        symmetric_grid(np.array([[np.nan]], np.float32), 0)


@given(st.lists(hnp.arrays(np.float32, st.integers(1, 20), elements=reals), min_size=1, max_size=5), st.randoms())
@few
def test_the_order_of_batches_does_not_matter(batches: list[np.ndarray], random: object) -> None:
    shuffled = sorted(batches, key=lambda b: random.random())  # type: ignore[attr-defined]
    for name in ("minmax", "percentile", "mse", "entropy"):
        one, other = observer(name, 99.0), observer(name, 99.0)
        for batch in batches:
            one.see(batch)
        for batch in shuffled:
            other.see(batch)
        assert one.range() == other.range()


@given(hnp.arrays(np.float32, st.integers(1, 200), elements=reals))
@few
def test_no_observer_answers_a_range_wider_than_what_it_saw(x: np.ndarray) -> None:
    for name in OBSERVERS:
        found = observer(name, 99.0)
        found.see(x)
        low, high = found.range()
        assert min(float(x.min()), 0.0) <= low <= high <= max(float(x.max()), 0.0)


@pytest.mark.parametrize("name", ["percentile", "mse", "entropy"])
def test_numbers_are_counted_in_chunks_of_any_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).normal(size=(7, 100)).astype(np.float32)
    x[x < -1] = 0
    counts = []
    for chunk in (1, 64, 10_000):
        monkeypatch.setattr(ranges, "_CHUNK", chunk)
        each = observer(name)
        each.see(x)
        counts.append((each.zeros, each.range(), each.counts.tolist()))  # type: ignore[attr-defined]
    assert counts[0] == counts[1] == counts[2]
    zeros, _, held = counts[0]
    assert zeros == (x == 0).sum() and sum(held) == (x != 0).sum()


def test_minmax_is_exact() -> None:
    x = np.random.default_rng(0).normal(size=(7, 50)).astype(np.float32)
    found = MinMax()
    for batch in x:
        found.see(batch)
    assert found.range() == (float(x.min()), float(x.max()))


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_percentile_agrees_with_numpy(percentile: float) -> None:
    x = np.random.default_rng(1).normal(size=(10, 5000)).astype(np.float32)
    found = Percentile(percentile)
    for scale, batch in zip((0.001, *[1.0] * 9), x, strict=True):  # the histogram must widen after the first
        found.see(batch * scale)
        batch *= scale
    limit = np.percentile(np.abs(x), percentile)
    assert found.range() == pytest.approx((-limit, limit), rel=0.01)


def _error(x: np.ndarray, low: float, high: float) -> float:
    return float(np.mean((x - affine_grid(low, high).round(x)) ** 2))


@pytest.mark.parametrize("kind", ["normal", "laplace", "outlier", "skewed", "uniform"])
def test_mse_is_as_good_as_exhaustive_search_over_both_ends(kind: str) -> None:
    rng = np.random.default_rng(2)
    x = {
        "normal": lambda: rng.normal(size=5000),
        "laplace": lambda: rng.laplace(size=5000),
        "outlier": lambda: np.append(rng.normal(size=5000), [60.0, 50.0]),
        "skewed": lambda: rng.gamma(2.0, size=5000) - 1.0,
        "uniform": lambda: rng.uniform(-1, 3, size=5000),
    }[kind]()
    found = MSE()
    for part in np.array_split(x, 4):
        found.see(part)
    ends = np.linspace(0.05, 1.0, 39)
    best = min(_error(x, x.min() * a, x.max() * b) for a in ends for b in ends)
    assert _error(x, *found.range()) <= best * 1.03


def test_mse_of_a_one_sided_tensor_keeps_zero_and_clips_the_tail() -> None:
    rng = np.random.default_rng(3)
    x = np.maximum(rng.standard_t(3, size=20000), 0)
    found = MSE()
    found.see(x)
    low, high = found.range()
    best = min(_error(x, 0.0, t) for t in np.linspace(0.01, 1, 1000) * x.max())
    assert low == 0.0
    assert high < x.max()
    assert _error(x, low, high) <= best * 1.03


@given(hnp.arrays(np.float32, st.integers(2, 60), elements=reals))
@few
def test_a_symmetric_range_has_its_zero_in_the_middle(x: np.ndarray) -> None:
    found = observer("mse", symmetric=True)
    found.see(x)
    low, high = found.range()
    assert low == 0 <= high or low == -high or (high == 0 and x.max() <= 0)
    signed, unsigned = centred_grid(low, high, signed=True), centred_grid(low, high)
    assert (signed.low, signed.high, int(signed.zero)) == (-128, 127, 0)
    assert unsigned.zero == (0 if low == 0 else 128)
    for grid in (signed, unsigned):
        inside = np.clip(x, low, high)
        assert np.abs(grid.round(inside) - inside).max() <= grid.scale * 0.501


def test_the_symmetric_range_of_least_error_is_that_of_exhaustive_search() -> None:
    x = np.append(np.random.default_rng(0).normal(size=4000) + 0.3, [20.0, -9.0])
    found = observer("mse", symmetric=True)
    found.see(x)
    low, high = found.range()
    best = min(_error(x, -20 * f, 20 * f) for f in np.linspace(0.02, 1, 500))
    assert _error(x, low, high) <= best * 1.02


@given(reals, reals)
@few
def test_floats_reach_from_the_largest_number_to_its_negative(a: float, b: float) -> None:
    each, top = float_format(min(a, b), max(a, b)), max(abs(a), abs(b))
    if top > 1e-30:
        assert float(each.scale) == np.float32(top / 448)
        ends = np.array([-top, 0, top / 2, top], np.float32)  # of which all but rounding is held
        np.testing.assert_allclose(each.round(ends), ends, rtol=1e-6, atol=0)
        np.testing.assert_allclose(each.round(3 * ends), [-top, 0, top, top], rtol=1e-6)
    elif top == 0:
        assert each.scale == 1


@pytest.mark.parametrize("name", ["mse", "entropy"])
def test_the_range_of_floats_clips_no_more_than_pays(name: str) -> None:
    rng = np.random.default_rng(7)
    x = np.append(rng.standard_t(3, size=20000), 60.0)

    def error(top: float) -> float:
        return float(np.mean((x - float_format(-top, top).round(x)) ** 2))

    found = observer(name, grid=float_format, symmetric=True)
    found.see(x)
    low, high = found.range()
    assert 0 < max(-low, high) <= 60.0
    if name == "mse":
        assert error(max(-low, high)) <= 1.02 * min(error(60 * f) for f in np.linspace(0.02, 1, 400))


def test_a_moving_average_in_closed_form() -> None:
    found = MovingAverage()
    for batch in ([-1.0, 2.0], [-3.0, 1.0], [0.0, 100.0]):
        found.see(np.array(batch, np.float32))
    low, high = -1.0, 2.0
    for bottom, top in ((-3.0, 1.0), (0.0, 100.0)):
        low, high = 0.9 * low + 0.1 * bottom, 0.9 * high + 0.1 * top
    assert found.range() == pytest.approx((low, high))


def _divergence(x: np.ndarray, width: float, low: float, high: float, bits: int) -> float:
    """Kullback and Leibler's, number by number, from its definition."""
    grid = affine_grid(low, high, bits)
    bins: dict[int, int] = {}
    inside: dict[int, int] = {}
    for number in x.tolist():
        index = math.floor(number / width)
        first, last = round(low / width), round(high / width) - 1
        at = min(max(index, first), last)
        bins[at] = bins.get(at, 0) + 1
        inside[at] = inside.get(at, 0) + (at == index)
    code = {at: int(grid.encode(np.clip(np.array((at + 0.5) * width), low, high))) for at in bins}
    members = Counter(code.values())
    mass = Counter[int]()
    for at, count in inside.items():
        mass[code[at]] += count
    p = np.array([bins[at] for at in bins], np.float64)
    q = np.array([max(mass[code[at]] / members[code[at]], 1e-4) for at in bins], np.float64)
    return float(entropy(p, q))


@pytest.mark.parametrize("kind", ["normal", "rectified", "outlier"])
def test_entropy_is_that_of_the_definition(kind: str) -> None:
    rng = np.random.default_rng(5)
    x = {
        "normal": rng.normal(size=900),
        "rectified": np.maximum(rng.laplace(size=900), 0),
        "outlier": np.append(rng.normal(size=900), 40.0),
    }[kind]
    found = Entropy(partial(affine_grid, bits=4))
    for part in np.array_split(x, 3):
        found.see(part)
    low, high = found.range()
    others = np.linspace(0.05, 1, 15) * max(-x.min(), x.max())
    grid_ends = [round(t / found.width) * found.width for t in others]
    limits = [(max(min(x.min(), 0.0), -t), min(x.max(), t)) for t in grid_ends]
    held = x[x != 0]
    chosen = _divergence(held, found.width, *_edges(low, high, found.width), 4)
    exhaustive = min(_divergence(held, found.width, *_edges(a, b, found.width), 4) for a, b in limits)
    assert chosen <= exhaustive * 1.05 + 1e-6


def _edges(low: float, high: float, width: float) -> tuple[float, float]:
    return math.floor(low / width) * width, math.ceil(high / width) * width


def test_entropy_clips_an_outlier_and_nothing_of_what_is_even() -> None:
    rng = np.random.default_rng(6)
    far, even = Entropy(), Entropy()
    far.see(np.append(rng.normal(size=20000), 100.0))
    even.see(rng.uniform(-1, 1, size=20000))
    assert 3 < far.range()[1] < 30
    assert even.range()[1] > 0.97


def test_all_zero_and_constant_tensors() -> None:
    for name in OBSERVERS:
        found = observer(name)
        found.see(np.zeros((4, 4), np.float32))
        assert found.range() == (0.0, 0.0)
        found = observer(name)
        found.see(np.full(100, 3.0, np.float32))
        assert _error(np.full(3, 3.0), *found.range()) < 1e-9


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", OBSERVERS)
def test_numbers_that_are_none_are_refused_by_name(name: str, bad: float) -> None:
    found = observer(name, value="value 'relu_3'")
    with pytest.raises(SlimlineError, match="relu_3"):
        found.see(np.array([1.0, bad], np.float32))


def test_nothing_seen_and_unknown_observer() -> None:
    with pytest.raises(SlimlineError, match="at least one calibration batch"):
        observer("mse").range()
    with pytest.raises(SlimlineError, match="did you mean 'minmax'"):
        observer("min-max")
