"""Codebooks: the best there is, found by trying all; starts; zeros."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimline.methods import clustering
from slimline.methods.clustering import codebook, lloyd, optimal, shared, starting, vector_codebook, vector_shared


def loss(points: np.ndarray, weights: np.ndarray, centroids: np.ndarray) -> float:
    return float((weights * ((points[:, None] - centroids) ** 2).min(axis=1)).sum())


def exhaustive(points: np.ndarray, weights: np.ndarray, clusters: int) -> float:
    """The least loss over all ways to cut sorted points into intervals."""
    best = np.inf
    for cuts in combinations(range(1, len(points)), clusters - 1):
        bounds = [0, *cuts, len(points)]
        parts = [slice(a, b) for a, b in pairwise(bounds)]
        means = np.array([np.average(points[p], weights=weights[p]) for p in parts])
        best = min(
            best, sum(float((weights[p] * (points[p] - m) ** 2).sum()) for p, m in zip(parts, means, strict=True))
        )
    return best


@given(
    st.lists(st.integers(-50, 50), min_size=3, max_size=11, unique=True),
    st.integers(1, 6),
    st.integers(0, 2**31),
    st.sampled_from([1e-3, 1.0, 1e4]),
)
def test_the_optimum_is_that_of_an_exhaustive_search(
    numbers: list[int], clusters: int, seed: int, offset: float
) -> None:
    points = np.sort(np.array(numbers, np.float64)) + offset
    weights = np.random.default_rng(seed).exponential(size=len(points)) + 1e-3
    clusters = min(clusters, len(points) - 1)
    centroids = optimal(points, weights, clusters)
    assert len(centroids) == clusters and (np.diff(centroids) > 0).all()
    assert loss(points, weights, centroids) == pytest.approx(exhaustive(points, weights, clusters), abs=1e-6)


def test_of_many_points_too() -> None:
    """Against the plain quadratic recurrence."""
    rng = np.random.default_rng(1)
    points, weights = np.unique(rng.standard_normal(120)), rng.random(120) + 0.1
    cost = np.full((121, 121), np.inf)
    for i in range(120):
        for j in range(i + 1, 121):
            p, w = points[i:j], weights[i:j]
            cost[i, j] = (w * (p - np.average(p, weights=w)) ** 2).sum()
    best = cost[0].copy()
    for _ in range(11):
        best = (best[:, None] + cost).min(axis=0)
    assert loss(points, weights, optimal(points, weights, 12)) == pytest.approx(best[120])


@pytest.mark.parametrize("start", ["linear", "density", "random", "k-means++"])
def test_starts_are_improved_and_never_beat_the_optimum(start: clustering.Start) -> None:
    rng = np.random.default_rng(2)
    values, importance = rng.standard_normal((20, 40)), rng.exponential(size=(20, 40))
    flat, weights = values.ravel(), importance.ravel()
    order = np.argsort(flat)
    begun = starting(flat[order], weights[order], 16, start, 3)
    ended = lloyd(flat[order], weights[order], begun)
    best = loss(flat, weights, codebook(values, 16, importance))
    assert best * (1 - 1e-6) <= loss(flat, weights, ended) <= loss(flat, weights, begun)
    assert np.array_equal(codebook(values, 16, importance, start, 3), np.unique(ended.astype(np.float32)))
    assert loss(flat, weights, ended) < 1.6 * best


def test_beyond_the_limit_it_is_nearly_the_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(4).standard_normal(3000)
    exact = loss(values, np.ones(3000), codebook(values, 32))
    monkeypatch.setattr(clustering, "EXACT", 500)
    assert exact <= loss(values, np.ones(3000), codebook(values, 32)) < 1.01 * exact


@given(st.integers(2, 20), st.integers(0, 2**31), st.floats(0, 0.95), st.sampled_from(["optimal", "linear", "random"]))
def test_zeros_stay_and_few_values_are_all_there(clusters: int, seed: int, zeros: float, start: str) -> None:
    rng = np.random.default_rng(seed)
    values = np.where(rng.random((6, 9)) < zeros, 0, rng.standard_normal((6, 9))).astype(np.float32)
    book = codebook(values, clusters, rng.random((6, 9)), start)  # type: ignore[arg-type]
    new = shared(values, book)
    assert new.dtype == np.float32 and 1 <= len(book) <= clusters and len(np.unique(new)) <= clusters
    assert (new[values == 0] == 0).all() and not np.signbit(new[values == 0]).any()
    few = rng.choice(book, (5, 5))
    assert np.array_equal(shared(few, codebook(few, clusters)), few)


def test_importance_draws_the_codebook() -> None:
    values = np.array([0.1, 0.2, 1.0, 1.1, 1.2, 5.0])
    plain, drawn = codebook(values, 2), codebook(values, 2, np.array([100.0, 100, 100, 100, 100, 1e-9]))
    assert plain.max() == 5 and drawn.max() < 2
    assert np.array_equal(codebook(values, 2, np.zeros(6)), plain)


@given(st.sampled_from([2, 4]), st.integers(2, 12), st.integers(0, 2**31), st.floats(0, 0.9))
def test_vectors_are_coded_by_the_nearest_and_clusters_are_their_means(
    length: int, clusters: int, seed: int, zeros: float
) -> None:
    rng = np.random.default_rng(seed)
    vectors = np.where(rng.random((60, 1)) < zeros, 0, rng.standard_normal((60, length))).astype(np.float32)
    vectors[rng.random(vectors.shape) < zeros / 4] = 0
    importance = rng.exponential(size=vectors.shape) + 0.1
    book = vector_codebook(vectors, clusters, importance, seed)
    new = vector_shared(vectors, book, importance)
    assert book.dtype == new.dtype == np.float32 and len(book) <= clusters
    assert (new[vectors == 0] == 0).all()
    filled = (vectors != 0).any(axis=1)
    assert filled.all() or not book[0].any()
    own = np.where(vectors == 0, 0, importance)
    distance = (own[:, None] * (vectors[:, None].astype(float) - book) ** 2).sum(axis=2)
    error = (own * (vectors.astype(float) - new) ** 2).sum(axis=1)
    np.testing.assert_allclose(error[filled], distance.min(axis=1)[filled], atol=1e-9)
    numbers = distance.argmin(axis=1)
    for cluster in np.unique(numbers[filled]):
        members = filled & (numbers == cluster)
        weight = own[members].sum(axis=0)
        if not book[cluster].any():
            continue  # zero stays where it is
        total = (own[members] * vectors[members]).sum(axis=0)
        mean = np.divide(total, weight, where=weight > 0, out=book[cluster].astype(float))
        np.testing.assert_allclose(book[cluster], mean, atol=1e-5)


def test_vectors_that_lie_in_heaps_have_their_middles() -> None:
    rng = np.random.default_rng(0)
    middles = np.array([[0, 0, 9, 9], [5, -5, 0, 1], [-7, 2, 2, 2], [1, 1, -8, 1]], float)
    vectors = middles[rng.integers(0, 4, 400)] + 0.01 * rng.standard_normal((400, 4))
    for seed in range(3):
        book = vector_codebook(vectors, 4, seed=seed)
        np.testing.assert_allclose(book[np.lexsort(book.T)], middles[np.lexsort(middles.T)], atol=0.01)
    few = vectors[:3].astype(np.float32)
    np.testing.assert_array_equal(vector_shared(few, vector_codebook(few, 4)), few)
    assert not vector_codebook(np.zeros((5, 2)), 4).any()
    assert vector_codebook(np.array([[0, 0], [5, 6], [7, 8]]), 2).tolist() == [[0, 0], [6, 7]]


def test_numbers_of_a_vector_count_each_by_itself() -> None:
    vectors = np.array([[0.1, 5], [0.2, -5], [3, 5], [3.1, -5]])
    weights = [np.tile(row, (4, 1)) for row in ([1.0, 1e-4], [1e-4, 1.0])]
    first, second = (vector_shared(vectors, vector_codebook(vectors, 2, own), own) for own in weights)
    np.testing.assert_allclose(first[:, 0], [0.15, 0.15, 3.05, 3.05])
    np.testing.assert_allclose(second[:, 1], [5, -5, 5, -5])


def test_pairs_lose_less_than_single_values_of_as_many_bits() -> None:
    rng = np.random.default_rng(5)
    values = rng.standard_normal((200, 40))
    single = ((values - shared(values, codebook(values, 8))) ** 2).sum()
    pairs = values.reshape(-1, 2)
    assert ((pairs - vector_shared(pairs, vector_codebook(pairs, 64))) ** 2).sum() < 0.97 * single
