"""Kernels within kernels by enumeration, least squares in closed form, the choice of all layers by brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimline.methods import kernels


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_windows_are_all_arithmetic_progressions(size):
    expected = {
        subset
        for n in range(1, size + 1)
        for subset in itertools.combinations(range(size), n)
        if len(set(np.diff(subset))) < 2
    }
    found = [tuple(kernels.along(w)[0].tolist()) for w in kernels.windows((size,))]
    assert set(found) == expected
    assert len(found) == len(expected)
    assert found[0] == tuple(range(size))
    neighbours = {s for s in expected if len(s) == s[-1] - s[0] + 1}
    assert {tuple(kernels.along(w)[0].tolist()) for w in kernels.windows((size,), dilated=False)} == neighbours


def test_a_mask_is_the_product_of_its_sides():
    window = ((0, 2, 2), (1, 2, 1))
    assert kernels.count(window) == 4
    expected = [[False, True, True], [False, False, False], [False, True, True]]
    np.testing.assert_array_equal(kernels.mask(window, (3, 3)).reshape(3, 3), expected)


def test_what_is_lost_is_what_least_squares_leaves():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 200, 6)) @ rng.normal(size=(6, 6))
    weight = rng.normal(size=(2, 3, 6))
    stay = np.array([True, False, True, True, False, True])
    missed = wanted = 0.0
    for g in range(2):
        y = x[g] @ weight[g].T
        solved = np.linalg.lstsq(x[g][:, stay], y, rcond=None)[0]
        missed += np.square(y - x[g][:, stay] @ solved).sum()
        wanted += np.square(y).sum()
    gram = x.swapaxes(1, 2) @ x / 200
    assert kernels.lost(weight, gram, stay, 0.0) == pytest.approx(missed / wanted)
    assert kernels.lost(weight, gram, np.ones(6, bool), 0.0) == pytest.approx(0, abs=1e-9)


layers = st.lists(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 50)), min_size=1, max_size=5), min_size=1, max_size=4
)


@settings(max_examples=40, deadline=None)
@given(layers, st.floats(0, 1))
def test_the_choice_is_that_of_brute_force(options, part):
    errors = [np.array([e for e, _ in layer]) for layer in options]
    costs = [np.array([float(c) for _, c in layer]) for layer in options]
    limit = part * sum(c.max() for c in costs)
    every = list(itertools.product(*(range(len(layer)) for layer in options)))
    total = {p: sum(errors[k][i] for k, i in enumerate(p)) for p in every}
    legal = [p for p in every if sum(costs[k][i] for k, i in enumerate(p)) <= limit]
    found = kernels.cheapest(errors, costs, limit)
    if not legal:
        assert found is None
        return
    assert found is not None
    assert sum(costs[k][i] for k, i in enumerate(found)) <= limit + 1e-6
    assert total[tuple(found)] <= min(total[p] for p in legal) + 1e-5
