"""Factorisation against closed forms, other decompositions, random competitors and exhaustive search."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimline.methods.factorization import (
    Canonical,
    Factorization,
    Tucker,
    allocate,
    alternating,
    expanded,
    signal_rank,
)
from slimline.methods.gram import diagonal_loading

TINY = 1e-13  # damping that changes no figure here


def case(seed: int, groups: int, outputs: int, inputs: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(groups, rows, inputs)) * rng.lognormal(size=inputs) + rng.normal(size=inputs)
    return rng.normal(size=(groups, outputs, inputs)), x.swapaxes(1, 2) @ x / rows


def loss(weight: np.ndarray, other: np.ndarray, second: np.ndarray) -> float:
    change = weight - other
    return float(np.trace(change @ second @ change.swapaxes(1, 2), axis1=1, axis2=2).sum())


SIZES = st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7), st.integers(1, 20))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), SIZES, st.integers(1, 7))
def test_the_loss_under_h_is_the_sum_of_the_discarded_singular_values_squared(seed, sizes, rank):
    weight, second = case(seed, *sizes)
    damping = 1e-3
    damped = second + diagonal_loading(second, damping)[:, None, None] * np.eye(sizes[2])
    f = Factorization(weight, second, damping=damping)
    rank = min(rank, f.most)
    first, last = f.factors(rank)
    lost = loss(weight, last @ first, damped)
    total = loss(weight, 0 * weight, damped)
    whole = np.linalg.svd(weight @ np.linalg.cholesky(damped), compute_uv=False)
    assert lost == pytest.approx(np.square(whole[:, rank:]).sum(), rel=1e-7, abs=1e-9 * total)
    assert f.error(rank) * total == pytest.approx(lost, rel=1e-7, abs=1e-9 * total)
    assert first.shape == (sizes[0], rank, sizes[2]) and last.shape == (sizes[0], sizes[1], rank)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), SIZES, st.integers(1, 4))
def test_no_other_product_of_the_rank_loses_less(seed, sizes, rank):
    weight, second = case(seed, *sizes)
    rng = np.random.default_rng(seed + 1)
    f = Factorization(weight, second, damping=TINY)
    rank = min(rank, f.most)
    first, last = f.factors(rank)
    best = loss(weight, last @ first, second)
    slack = 1e-6 * loss(weight, 0 * weight, second)
    for scale in (1e-3, 0.1, 1.0):
        near = (a + scale * rng.normal(size=a.shape) for a in (last, first))
        left, right = near
        assert loss(weight, left @ right, second) >= best - slack
        # … not even where the other factor is the least-squares fit.
        hidden = right @ second @ right.swapaxes(1, 2)
        fit = weight @ second @ right.swapaxes(1, 2) @ np.linalg.pinv(hidden, hermitian=True)
        assert loss(weight, fit @ right, second) >= best - slack


def test_without_h_it_is_the_truncated_svd():
    (weight,), _ = case(0, 1, 6, 9, 4)
    left, values, right = np.linalg.svd(weight, full_matrices=False)
    f = Factorization(weight[None])
    for rank in range(1, 7):
        first, last = f.factors(rank)
        np.testing.assert_allclose((last @ first)[0], left[:, :rank] * values[:rank] @ right[:rank], atol=1e-12)
        assert f.error(rank) == pytest.approx(np.square(values[rank:]).sum() / np.square(weight).sum())
        assert np.linalg.norm(first) == pytest.approx(np.linalg.norm(last))


@pytest.mark.parametrize("rest", [1, 2, 3, 6])
@pytest.mark.parametrize("data", [True, False])
def test_at_full_rank_nothing_is_lost(rest, data):
    weight, second = case(1, 2, 5, 12, 40)
    f = Factorization(weight, second if data else None, rest)
    np.testing.assert_allclose(f.product(f.factors(f.most)), weight, atol=1e-8)
    assert f.error(f.most) == pytest.approx(0, abs=1e-12)


def test_singular_h_and_inputs_that_are_always_zero():
    weight, second = case(2, 1, 5, 8, 3)  # three rows of eight inputs
    f = Factorization(weight, second, damping=1e-9)
    assert f.error(3) == pytest.approx(0, abs=1e-6)
    assert f.error(2) > 1e-3
    zero = Factorization(weight, 0 * second)
    assert np.isfinite(zero.product(zero.factors(2))).all() and np.isfinite(zero.error(2))


@pytest.mark.parametrize("rest", [2, 3])
def test_the_factor_with_the_kernel_is_the_least_squares_fit(rest):
    weight, second = case(3, 2, 4, 12, 50)
    f = Factorization(weight, second, rest, TINY)
    plain = Factorization(weight, None, rest)
    errors = [f.error(rank) for rank in range(1, f.most + 1)]
    assert errors == sorted(errors, reverse=True)
    for rank in range(1, f.most):
        first, last = f.factors(rank)
        wide = expanded(first, rest)
        # Normal equations: what is missing is orthogonal to what the first factor leaves.
        gap = (weight - last @ wide) @ second @ wide.swapaxes(1, 2)
        assert np.abs(gap).max() < 1e-6
        assert f.error(rank) <= f.error_of(plain.product(plain.factors(rank))) + 1e-12


def test_expanded_contracts_the_leading_inputs():
    first = np.arange(6.0).reshape(1, 2, 3)
    x = np.random.default_rng(0).normal(size=(3, 4))  # channels x kernel
    np.testing.assert_allclose(expanded(first, 4)[0] @ x.reshape(-1), (first[0] @ x).reshape(-1))


def test_tucker():
    weight, second = case(4, 2, 6, 5 * 4, 200)
    t = Tucker(weight, second, 4, TINY)
    assert t.error(6, 5) == pytest.approx(0, abs=1e-10)
    first, core, last = t.factors(3, 2)
    assert (first.shape, core.shape, last.shape) == ((2, 2, 5), (2, 3, 8), (2, 6, 3))
    assert t.error(3, 2) == pytest.approx(
        loss(weight, last @ core @ expanded(first, 4), second) / loss(weight, 0 * weight, second), rel=1e-6
    )
    # All channels in: what is left is the exact one.
    exact = Factorization(weight, second, damping=TINY)
    assert t.error(3, 5) == pytest.approx(exact.error(3), rel=1e-6)
    assert t.error(3, 2) >= exact.error(3)


def test_cp_recovers_a_sum_of_products():
    errors = []
    for seed in range(5):  # now and then it stays in a local minimum
        rng = np.random.default_rng(seed)
        planted = [rng.normal(size=(size, 3)) for size in (8, 7, 3, 3)]
        tensor = np.einsum("or,cr,kr,lr->ockl", *planted)
        recovered = np.einsum("or,cr,kr,lr->ockl", *alternating(tensor, 3))
        errors.append(np.square(recovered - tensor).sum() / np.square(tensor).sum())
    assert np.median(errors) < 1e-4


def test_cp_loses_least_in_its_last_factor():
    weight, second = case(5, 2, 6, 36, 80)
    for data in (second, None):
        cp = Canonical(weight, data, (3, 3), damping=1e-9)
        errors = [cp.error(rank) for rank in (1, 4, 12, 36)]
        assert errors[-1] < 1e-6 and all(a > b for a, b in pairwise(errors))
        factors = cp.factors(4)
        assert [f.shape for f in factors] == [(2, 4, 4), (2, 4, 3), (2, 4, 3), (2, 6, 4)]
        by_hand = np.einsum("gor,grc,grk,grl->gockl", factors[3], *factors[:3]).reshape(weight.shape)
        np.testing.assert_allclose(cp.product(factors), by_hand)
        metric = np.broadcast_to(np.eye(36), second.shape) if data is None else second
        whole = loss(weight, np.zeros_like(weight), metric)
        assert cp.error(4) == pytest.approx(loss(weight, by_hand, metric) / whole, rel=1e-5)
        for seed in range(5):  # no other outputs lose less
            moved = factors[3] + 1e-3 * np.random.default_rng(seed).normal(size=factors[3].shape)
            assert loss(weight, cp.product((*factors[:3], moved)), metric) > loss(weight, by_hand, metric)
    assert Canonical(weight, second, (3, 3)).error(4) < Factorization(weight, second).error_of(
        Canonical(weight, None, (3, 3)).product(Canonical(weight, None, (3, 3)).factors(4))
    )


def test_cp_of_a_matrix_is_as_good_as_its_svd():
    """Of two dimensions the best sum of products is known."""
    weight, second = case(7, 1, 9, 5, 60)
    for data in (second, None):
        best = Factorization(weight, data)
        canonical = Canonical(weight, data, (1,))
        for rank in (1, 2, 4):
            assert best.error(rank) - 1e-9 <= canonical.error(rank) <= best.error(rank) * 1.02 + 1e-6


@pytest.mark.parametrize("sides", [(40, 60), (60, 40), (30, 30)])
@pytest.mark.parametrize("rank", [0, 1, 5, 10])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_a_planted_rank_is_found_in_noise(sides, rank, scale):
    rng = np.random.default_rng(rank)
    planted = rng.normal(size=(sides[0], rank)) @ rng.normal(size=(rank, sides[1]))
    values = np.linalg.svd(scale * (planted + 0.3 * rng.normal(size=sides)), compute_uv=False)
    assert signal_rank(values, sides) == rank


def test_a_matrix_of_zeros_or_one_row_has_a_rank_too():
    assert signal_rank(np.zeros(4), (4, 6)) == 0
    assert signal_rank(np.ones(1), (1, 6)) in (0, 1)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 9), st.integers(0, 50)), min_size=1, max_size=4), min_size=1, max_size=4
    ),
    st.floats(0, 1),
)
def test_a_budget_is_shared_out_as_exhaustive_search_does(layers, part):
    costs, errors = ([[float(o[i]) for o in layer] for layer in layers] for i in (0, 1))
    least, most = sum(map(min, costs)), sum(map(max, costs))
    budget = least + part * (most - least)
    taken = allocate(costs, errors, budget)
    assert taken is not None
    assert sum(c[i] for c, i in zip(costs, taken, strict=True)) <= budget + 1e-6
    best = min(
        sum(e[i] for e, i in zip(errors, choice, strict=True))
        for choice in product(*(range(len(c)) for c in costs))
        if sum(c[i] for c, i in zip(costs, choice, strict=True)) <= budget
    )
    assert sum(e[i] for e, i in zip(errors, taken, strict=True)) == pytest.approx(best)
    assert allocate(costs, errors, least - 0.5) is None
