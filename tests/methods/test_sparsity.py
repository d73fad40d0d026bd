"""Scores, patterns and densities against what they say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimline.basics.errors import SlimlineError
from slimline.methods import sparsity as S
from slimline.methods.gram import Gram

RNG = np.random.default_rng(0)
W = RNG.normal(size=(2, 4, 8))


def test_scores():
    rng = np.random.default_rng(1)
    g = rng.normal(size=W.shape)
    x = rng.normal(size=(2, 30, 8))
    gram = Gram(2, 8)
    gram.see(x)
    np.testing.assert_allclose(S.score("l1", W), np.abs(W))
    np.testing.assert_allclose(S.score("l3", W), np.abs(W) ** 3)
    np.testing.assert_allclose(S.score("taylor", W, g), np.abs(W * g))
    np.testing.assert_allclose(S.score("movement", W, g), -W * g)
    norms = np.linalg.norm(x, axis=1) / np.sqrt(30)
    np.testing.assert_allclose(S.score("wanda", W, None, gram), np.abs(W) * norms[:, None], rtol=1e-5)
    np.testing.assert_array_equal(S.score("random", W, seed=3), S.score("random", W, seed=3))
    assert not np.array_equal(S.score("random", W, seed=3), S.score("random", W, seed=4))


@pytest.mark.parametrize("text", ["element", "1x4", "2x2", "4x1", "row"])
@given(part=st.floats(0, 1))
@settings(deadline=None)
def test_cells_go_whole_and_in_number(text, part):
    pattern = S.Pattern.parse(text)
    size = pattern.size(W.shape)
    keep = S.keep_mask(np.abs(W), round(part * W.size), pattern)
    cells = pattern.cells(keep.astype(float))
    assert set(np.unique(cells)) <= {0.0, 1.0}
    assert abs((~keep).sum() - part * W.size) <= size / 2 + 0.5
    means = pattern.cells(np.abs(W))
    if 0 < cells.sum() < cells.size:
        assert means[cells == 0].max() <= means[cells == 1].min()


def test_element_counts_are_exact():
    for gone in range(W.size + 1):
        assert (~S.keep_mask(np.abs(W), gone, S.Pattern.parse("element"))).sum() == gone


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "1:2"])
def test_n_of_m_keeps_the_largest(text):
    pattern = S.Pattern.parse(text)
    n, m = pattern.group
    keep = S.keep_mask(np.abs(W), 0, pattern).reshape(-1, m)
    assert (keep.sum(1) == n).all()
    groups = np.abs(W).reshape(-1, m)
    assert (np.where(keep, groups, np.inf).min(1) >= np.where(keep, 0, groups).max(1)).all()


def test_rows_lose_the_same():
    keep = S.keep_rows(np.abs(W), 0.25, S.Pattern.parse("element"))
    assert ((~keep).sum(2) == 2).all()
    assert ((~S.keep_rows(np.abs(W), 0.5, S.Pattern.parse("1x4"))).sum(2) == 4).all()


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.floats(0, 1), st.integers(0, 99))
@settings(deadline=None)
def test_global_counts_are_a_threshold(sizes, amount, seed):
    rng = np.random.default_rng(seed)
    scores = [rng.random((1, 1, n)) for n in sizes]
    counts = S.global_counts(scores, amount, S.Pattern.parse("element"))
    assert sum(counts) == round(amount * sum(sizes))
    gone = [np.sort(s.ravel())[:c] for s, c in zip(scores, counts, strict=True)]
    stay = [np.sort(s.ravel())[c:] for s, c in zip(scores, counts, strict=True)]
    assert max(np.concatenate(gone), default=0) <= min(np.concatenate(stay), default=1)


@given(st.floats(0, 1))
@settings(deadline=None)
def test_erk_keeps_in_proportion_and_in_sum(amount):
    shapes = [(16, 3, 3, 3), (64, 16, 3, 3), (128, 64, 3, 3), (10, 128)]
    sizes = [int(np.prod(s)) for s in shapes]
    counts = S.erk_counts(shapes, amount)
    assert sum(counts) == round(amount * sum(sizes))
    assert all(0 <= c <= n for c, n in zip(counts, sizes, strict=True))
    density = [1 - c / n for c, n in zip(counts, sizes, strict=True)]
    raw = [sum(s) / n for s, n in zip(shapes, sizes, strict=True)]
    if all(d < 0.99 for d in density) and amount < 0.99:
        np.testing.assert_allclose(np.array(density) / raw, density[2] / raw[2], rtol=0.05)


def test_allocation_is_the_cheapest():
    curves = [([0, 5, 10], [0.0, 1.0, 6.0]), ([0, 5, 10], [0.0, 2.0, 4.5]), ([0, 5, 10], [0.0, 9.0, 10.0])]

    def cost(counts):
        return sum(float(np.interp(c, *curve)) for c, curve in zip(counts, curves, strict=True))

    assert S.allocate(curves, 15) == [5, 10, 0]
    choices = [(a, b, 15 - a - b) for a in (0, 5, 10) for b in (0, 5, 10) if 0 <= 15 - a - b <= 10]
    assert cost(S.allocate(curves, 15)) == min(map(cost, choices))
    assert S.allocate(curves, 30) == [10, 10, 10]


@pytest.mark.parametrize("text", ["4:2", "0:4", "2:2", "0x4", "banana", "1x"])
def test_no_pattern(text):
    with pytest.raises(SlimlineError):
        S.Pattern.parse(text)


def test_what_does_not_divide_is_said():
    assert "9 inputs" in S.Pattern.parse("2:4").misfit((1, 4, 9))
    assert "10 outputs" in S.Pattern.parse("4x1").misfit((1, 10, 8))
    assert not S.Pattern.parse("4x1").misfit((1, 8, 9))
    assert not S.Pattern.parse("row").misfit((1, 7, 9))


def test_a_score_is_checked():
    with pytest.raises(SlimlineError, match="returned shape"):
        S.checked(np.zeros(3), (1, 3, 1), "mine")
    with pytest.raises(SlimlineError, match="NaN"):
        S.checked(np.array([np.nan]), (1,), "mine")
    with pytest.raises(SlimlineError, match="cannot go"):
        S.count(5, 4)


@pytest.mark.parametrize(
    ("split", "order", "outputs"), [((2, 3, 4, 5), (0, 1, 2, 3), 1), ((5, 2, 3, 4), (1, 3, 0, 2), 2)]
)
def test_axes_and_back(split, order, outputs):
    axes = S.Axes(split, order, outputs)
    weight = np.arange(np.prod(split)).reshape(split[0] * split[1], *split[2:])
    assert axes.matrix(weight).shape == axes.shape
    np.testing.assert_array_equal(axes.tensor(axes.matrix(weight), weight.shape), weight)
