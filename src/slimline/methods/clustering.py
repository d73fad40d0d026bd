"""Codebooks: the few values, or vectors, that stand for many, by k-means.

On a line clusters are intervals, so that the best ones can be computed and not only searched for: `optimal` does it by
dynamic programming (Wang and Song 2011, doi:10.32614/RJ-2011-015), with divide and conquer over the ends of intervals.
`lloyd` improves any start (Lloyd 1982); the starts are those of Deep Compression (Han et al. 2016, arXiv:1510.00149)
and of k-means++ (Arthur and Vassilvitskii 2007). Of vectors (`vector_codebook`) nobody can compute the best codebook in
useful time: those are k-means++ and Lloyd's iterations, each number of a vector with an importance of its own.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from slimline.methods.formats import Levels

Array = np.ndarray[Any, np.dtype[Any]]
Start = Literal["optimal", "linear", "density", "random", "k-means++"]

EXACT = 4096
"""Distinct values up to which the best codebook is computed; of more, that of so many groups of neighbours."""
_ITERATIONS = 300
_VECTOR_ITERATIONS = 50
_DRAWN = 1 << 15
"""Vectors among which k-means++ draws."""
_ROWS = 1 << 14
"""Vectors that are compared with a codebook at a time."""
_LEAST = 1e-6  # of the mean importance: what none of the data reads still has to be stored as something


def codebook(
    values: Array,
    clusters: int,
    importance: Array | None = None,
    start: Start = "optimal",
    seed: int = 0,
) -> Array:
    """At most `clusters` values, such that the squared distances of `values` to the nearest of them are small.

    Where there are zeros among `values`, one of the clusters is zero.

    Parameters
    ----------
    values : of any shape and float dtype, finite.
    importance : of each value, not negative, of the shape of `values`; None for the same of all.
    start : ``optimal``: the least sum of squared distances there is, where at most `EXACT` values other than zero are
        distinct, else nearly. ``linear``, ``density``, ``random`` and ``k-means++`` are improved by `lloyd`.
    seed : of ``random`` and ``k-means++``.

    Returns
    -------
    float32, ascending, each once.
    """
    points, weights = _distinct(values, importance)
    if len(points) <= clusters:
        return np.unique(points.astype(np.float32))
    zero = bool((points == 0).any())
    others, own = (points[points != 0], weights[points != 0]) if zero else (points, weights)
    count = clusters - zero
    if count == 0:
        return np.zeros(1, np.float32)
    if start == "optimal":
        groups = _grouped(others, own, EXACT) if len(others) > EXACT else (others, own)
        first = optimal(*groups, count)
        exact = len(others) <= EXACT and not zero
    else:
        first, exact = starting(others, own, count, start, seed), False
    centroids = first if exact else lloyd(points, weights, np.append(first, 0.0) if zero else first, zero)
    return np.unique(centroids.astype(np.float32))


def shared(values: Array, book: Array) -> Array:
    """`values`, each replaced by the nearest of the codebook; of the same shape and dtype. Zero stays zero."""
    if len(book) == 1:
        return np.full_like(values, book[0])
    return Levels(np.ones((), np.float32), (), book).round(values)


def vector_codebook(vectors: Array, clusters: int, importance: Array | None = None, seed: int = 0) -> Array:
    """At most `clusters` vectors, such that the squared distances of `vectors` to the nearest of them are small.

    Where some of `vectors` are zero, one of the clusters is. Zeros in other vectors count for nothing, as they stay
    zero whatever their cluster says.

    Parameters
    ----------
    vectors : ``(n, length)``, float, finite.
    importance : of each number, not negative, of their shape; None for the same of all.
    seed : of k-means++.

    Returns
    -------
    float32, ``(clusters, length)``.
    """
    points = np.asarray(vectors, np.float64)
    filled = (points != 0).any(axis=1)
    zero = not filled.all()
    points = points[filled]
    own = np.ones_like(points) if importance is None else np.asarray(importance, np.float64)[filled]
    mean = own.mean() if own.size else 0.0
    own = np.maximum(own, _LEAST * mean) if mean > 0 else np.ones_like(points)
    own = np.where(points == 0, 0.0, own)
    distinct = np.unique(points.astype(np.float32), axis=0)
    count = clusters - zero
    nothing = np.zeros((int(zero), points.shape[1]))
    if len(distinct) <= count:
        return np.concatenate([nothing, distinct]).astype(np.float32)
    if count == 0:
        return nothing.astype(np.float32)
    rng = np.random.default_rng(seed)
    book = np.concatenate([nothing, _spread(points, own, count, rng)])
    numbers = np.full(len(points), -1)
    for _ in range(_VECTOR_ITERATIONS):
        before = numbers
        numbers, error = _nearest(points, own, book)
        if np.array_equal(before, numbers):
            break
        weight, total = (
            np.stack([np.bincount(numbers, column, len(book)) for column in part.T], axis=1)
            for part in (own, own * points)
        )
        moved = np.divide(total, weight, out=book.copy(), where=weight > 0)
        unused = np.flatnonzero(np.bincount(numbers, minlength=len(book)) == 0)
        unused = unused[unused >= int(zero)]
        moved[unused] = points[np.argsort(-error, kind="stable")[: len(unused)]]
        moved[: int(zero)] = 0.0
        book = moved
    return book.astype(np.float32)


def vector_shared(vectors: Array, book: Array, importance: Array | None = None) -> Array:
    """`vectors` ``(n, length)``, each replaced by the nearest of the codebook, as `importance` counts; of the same
    dtype. Zeros stay zero."""
    own = np.ones(vectors.shape) if importance is None else np.asarray(importance, np.float64)
    own = np.maximum(own, _LEAST * own.mean()) if own.size and own.mean() > 0 else np.ones(vectors.shape)
    numbers, _ = _nearest(np.asarray(vectors, np.float64), np.where(vectors == 0, 0.0, own), book.astype(np.float64))
    empty = ~(vectors != 0).any(axis=1)
    return np.where((vectors == 0) | empty[:, None], 0.0, book[numbers]).astype(vectors.dtype)


def _nearest(points: Array, own: Array, book: Array) -> tuple[Array, Array]:
    """Of each vector the number of the nearest in a codebook, and the weighted square of its distance."""
    numbers, error = np.empty(len(points), np.int64), np.empty(len(points))
    for start in range(0, len(points), _ROWS):
        part = slice(start, start + _ROWS)
        x, h = points[part], own[part]
        distance = h @ (book.T**2) - 2 * (h * x) @ book.T
        numbers[part] = distance.argmin(axis=1)
        least = np.take_along_axis(distance, numbers[part][:, None], 1)[:, 0]
        error[part] = np.maximum(least + (h * x * x).sum(axis=1), 0.0)
    return numbers, error


def _spread(points: Array, own: Array, count: int, rng: np.random.Generator) -> Array:
    """Vectors for Lloyd's iterations to begin with, by k-means++."""
    if len(points) > max(_DRAWN, 8 * count):
        few = rng.choice(len(points), max(_DRAWN, 8 * count), replace=False)
        points, own = points[few], own[few]
    drawn = [points[rng.choice(len(points), p=own.sum(axis=1) / own.sum())]]
    distance = (own * (points - drawn[0]) ** 2).sum(axis=1)
    while len(drawn) < count and distance.sum() > 0:
        drawn.append(points[rng.choice(len(points), p=distance / distance.sum())])
        distance = np.minimum(distance, (own * (points - drawn[-1]) ** 2).sum(axis=1))
    return np.asarray(drawn)


def _distinct(values: Array, importance: Array | None) -> tuple[Array, Array]:
    """Distinct values, ascending, and the sum of the importances of each, both float64."""
    flat = np.asarray(values, np.float64).ravel()
    points, inverse, counts = np.unique(flat, return_inverse=True, return_counts=True)
    if importance is None:
        return points, counts.astype(np.float64)
    own = np.asarray(importance, np.float64).ravel()
    mean = own.mean() if own.size else 0.0
    floored = np.maximum(own, _LEAST * mean) if mean > 0 else np.ones_like(own)
    return points, np.bincount(inverse.ravel(), floored, len(points))


def _grouped(points: Array, weights: Array, count: int) -> tuple[Array, Array]:
    """Neighbours merged into at most `count` groups, none of many points and none wide: means and weights."""
    many = np.linspace(0, len(points), count // 2, endpoint=False).astype(np.int64)
    wide = np.searchsorted(points, np.linspace(points[0], points[-1], count // 2))
    starts = np.union1d(many, wide)
    total = np.add.reduceat(weights, starts)
    return np.add.reduceat(weights * points, starts) / total, total


class _Sums:
    """Sums over runs of sorted points, from which costs and means of intervals follow."""

    def __init__(self, points: Array, weights: Array) -> None:
        self.middle = float(points @ weights / weights.sum())  # near it squares lose no digits
        centred = points - self.middle
        self.weight, self.first, self.second = (
            np.concatenate([[0.0], np.cumsum(part)]) for part in (weights, weights * centred, weights * centred**2)
        )

    def cost(self, start: Array, end: Array) -> Array:
        """Of one centroid for the points from `start` to before `end`: the weighted sum of squared distances."""
        first = self.first[end] - self.first[start]
        spread = self.second[end] - self.second[start] - first**2 / (self.weight[end] - self.weight[start])
        return np.asarray(np.maximum(spread, 0.0))

    def means(self, bounds: Array) -> Array:
        """Of the intervals between neighbouring `bounds`, none of them empty."""
        weight = np.diff(self.weight[bounds])
        return np.asarray(np.diff(self.first[bounds]) / weight + self.middle)


def optimal(points: Array, weights: Array, clusters: int) -> Array:
    """The `clusters` centroids with the least weighted sum of squared distances, ascending.

    Parameters
    ----------
    points : ``(n,)``, ascending and distinct, with n > `clusters`.
    weights : ``(n,)``, positive.
    """
    count, sums = len(points), _Sums(points, weights)
    ends = np.arange(count + 1)
    best = np.full(count + 1, np.inf)
    best[1:] = sums.cost(np.zeros(count, np.int64), ends[1:])
    best[0] = 0.0
    choices = []
    for layer in range(1, clusters):
        best, choice = _next_layer(best, sums, layer, count)
        choices.append(choice)
    bounds = [count]
    for choice in reversed(choices):
        bounds.append(int(choice[bounds[-1]]))
    return sums.means(np.array([0, *reversed(bounds)]))


def _next_layer(best: Array, sums: _Sums, layer: int, count: int) -> tuple[Array, Array]:
    """The least cost of the first n points in one cluster more, for every n, and where the last cluster begins.

    Where it begins grows with n. So n in the middle is solved first, then the middles of both halves within the bounds
    that it sets, and so on: all of one level at once.
    """
    cost = np.full(count + 1, np.inf)
    choice = np.full(count + 1, layer, np.int64)
    step = 1 << count.bit_length()
    while step:
        end = np.arange(step, count + 1, 2 * step)
        end = end[end > layer]
        if end.size:
            low = np.maximum(choice[end - step], layer)
            high = np.minimum(np.where(end + step <= count, choice[np.minimum(end + step, count)], count), end - 1)
            high = np.maximum(high, low)
            cost[end], choice[end] = _least(best, sums, end, low, high)
        step //= 2
    return cost, choice


def _least(best: Array, sums: _Sums, end: Array, low: Array, high: Array) -> tuple[Array, Array]:
    """For each `end` the least of ``best[i] + cost(i, end)`` over `low` <= i <= `high`, and the first such i."""
    lengths = high - low + 1
    first = np.cumsum(lengths) - lengths
    starts = np.arange(lengths.sum()) + np.repeat(low - first, lengths)
    costs = best[starts] + sums.cost(starts, np.repeat(end, lengths))
    least = np.minimum.reduceat(costs, first)
    reached = np.flatnonzero(costs == np.repeat(least, lengths))
    owner = np.searchsorted(first, reached, side="right") - 1
    chosen = np.empty(len(end), np.int64)
    chosen[owner[::-1]] = starts[reached[::-1]]  # of several the first, which is written last
    return least, chosen


def lloyd(points: Array, weights: Array, centroids: Array, zero: bool = False) -> Array:
    """Centroids moved to the means of what is nearest to them, again and again until none moves.

    Parameters
    ----------
    points, weights : as of `optimal`.
    centroids : to begin with; those that are nearest to nothing go.
    zero : whether the centroid at zero stays where it is.
    """
    sums = _Sums(points, weights)
    centroids = np.unique(centroids)
    for _ in range(_ITERATIONS):
        middles = (centroids[:-1] + centroids[1:]) / 2
        bounds = np.concatenate([[0], np.searchsorted(points, middles, side="right"), [len(points)]])
        used = np.diff(bounds) > 0
        means = np.where(used, 0.0, centroids)
        means[used] = sums.means(np.append(bounds[:-1][used], len(points)))
        fixed = (centroids == 0) & zero
        means[fixed] = 0.0
        moved = np.unique(means[used | fixed])
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    return centroids


def starting(points: Array, weights: Array, clusters: int, start: Start, seed: int) -> Array:
    """Centroids for `lloyd` to begin with: ``linear``, evenly between the ends; ``density``, evenly in the weights'
    distribution; ``random``, some of the points; ``k-means++``, points far from those that were drawn before."""
    if start == "linear":
        return np.linspace(points[0], points[-1], clusters)
    if start == "density":
        reached = np.cumsum(weights)
        parts = (np.arange(clusters) + 0.5) / clusters * reached[-1]
        return np.unique(points[np.searchsorted(reached, parts)])
    rng = np.random.default_rng(seed)
    if start == "random":
        return np.sort(rng.choice(points, clusters, replace=False))
    drawn = [points[rng.choice(len(points), p=weights / weights.sum())]]
    distance = (points - drawn[0]) ** 2
    for _ in range(clusters - 1):
        chance = weights * distance
        drawn.append(points[rng.choice(len(points), p=chance / chance.sum())])
        distance = np.minimum(distance, (points - drawn[-1]) ** 2)
    return np.sort(np.asarray(drawn))
