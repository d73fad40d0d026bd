"""Structured OBS against what least squares gives when every choice is tried."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimline.methods.reconstruction import reconstruct
from slimline.methods.removal import Consumer, removal_order


def data(seed: int, inputs: int, outputs: int, rows: int = 60):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, inputs)) @ rng.normal(size=(inputs, inputs)) + rng.normal(size=inputs)
    return x, rng.normal(size=(outputs, inputs))


def error_without(x: np.ndarray, w: np.ndarray, gone: tuple[int, ...], constant: bool) -> float:
    """Mean square of the error in the outputs, the other columns (and a constant) fitted by least squares."""
    left = np.delete(x, gone, axis=1)
    if constant:
        left = np.hstack([left, np.ones((len(x), 1))])
    y = x @ w.T
    found = np.linalg.lstsq(left, y, rcond=None)[0]
    return float(np.square(y - left @ found).sum() / len(x))


def gram(x: np.ndarray, constant: bool) -> np.ndarray:
    centred = x - x.mean(0) * constant
    return (centred.T @ centred / len(x))[None]


@pytest.mark.parametrize("constant", [False, True])
@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6))
def test_the_first_removal_is_the_best_of_all_and_its_error_is_least_squares(constant, seed):
    x, w = data(seed, 6, 4)
    columns = np.array([[0, 1], [2, 3], [4, 5]])
    consumer = Consumer(w[None], gram(x, constant), columns)
    order, errors = removal_order([consumer], damping=0)
    tried = [error_without(x, w, tuple(c), constant) for c in columns]
    assert order[0] == np.argmin(tried)
    np.testing.assert_allclose(errors[0] * consumer.energy, min(tried), rtol=1e-5)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6))
def test_errors_add_up_to_the_error_of_the_whole_set(seed):
    x, w = data(seed, 6, 3)
    consumer = Consumer(w[None], gram(x, False), np.arange(6)[:, None])
    order, errors = removal_order([consumer], damping=0)
    for k in range(1, 6):
        expected = error_without(x, w, tuple(order[:k].tolist()), False)
        np.testing.assert_allclose(errors[:k].sum() * consumer.energy, expected, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(errors.sum(), 1, rtol=1e-6)


def test_greedy_removal_is_near_the_best_pair():
    worse = []
    for seed in range(30):
        x, w = data(seed, 6, 4)
        consumer = Consumer(w[None], gram(x, False), np.arange(6)[:, None])
        order, _ = removal_order([consumer], damping=0)
        best = min(error_without(x, w, pair, False) for pair in combinations(range(6), 2))
        worse.append(error_without(x, w, tuple(order[:2].tolist()), False) / best)
    assert np.median(worse) < 1.01


def test_consumers_are_summed_relative_to_their_outputs_and_groups_go_together():
    x, w = data(1, 4, 3)
    z, v = data(2, 8, 2)
    columns = np.arange(4)[:, None]
    first = Consumer(w[None], gram(x, False), columns)
    grouped = Consumer(
        np.stack([v[:, :4], v[:, 4:]]), np.concatenate([gram(z[:, :4], False), gram(z[:, 4:], False)]), columns
    )
    order, errors = removal_order([first, grouped], damping=0)

    def cost(i: int) -> float:
        halves = error_without(z[:, :4], v[:, :4], (i,), False) + error_without(z[:, 4:], v[:, 4:], (i,), False)
        return error_without(x, w, (i,), False) / first.energy + halves / grouped.energy

    costs = [cost(i) for i in range(4)]
    assert order[0] == np.argmin(costs)
    np.testing.assert_allclose(errors[0], min(costs), rtol=1e-6)


def test_rounds_of_several_positions_keep_the_sum():
    x, w = data(3, 12, 5)
    consumer = Consumer(w[None], gram(x, False), np.arange(12)[:, None])
    order, errors = removal_order([consumer], damping=0, steps=4)
    assert sorted(order.tolist()) == list(range(12))
    expected = error_without(x, w, tuple(order[:6].tolist()), False)
    np.testing.assert_allclose(errors[:6].sum() * consumer.energy, expected, rtol=1e-4)


def test_positions_without_columns_and_of_unequal_width():
    x, w = data(4, 5, 3)
    columns = np.array([[0, 1], [2, -1], [-1, -1], [3, 4]])
    consumer = Consumer(w[None], gram(x, False), columns)
    order, errors = removal_order([consumer], damping=0)
    assert order[0] == 2
    assert errors[0] == 0
    tried = {i: error_without(x, w, tuple(c for c in columns[i] if c >= 0), False) for i in (0, 1, 3)}
    assert order[1] == min(tried, key=tried.__getitem__)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6))
def test_reconstruction_is_ridge_least_squares(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(40, 3)), rng.normal(size=(40, 2))
    ones = np.hstack([x, np.ones((40, 1))])
    start = rng.normal(size=(2, 4))
    second, cross = ones.T @ ones / 40, y.T @ ones / 40
    exact = reconstruct(start[None], second[None], cross[None], 0, constant=True)[0]
    np.testing.assert_allclose(exact, np.linalg.lstsq(ones, y, rcond=None)[0].T, atol=1e-8)
    pulled = reconstruct(start[None], second[None], cross[None], 0.1, constant=True)[0]
    strength = 0.1 * np.mean(x**2)
    rows = np.vstack([ones, np.sqrt(40 * strength) * np.eye(4)[:3]])
    targets = np.vstack([y, np.sqrt(40 * strength) * start.T[:3]])
    np.testing.assert_allclose(pulled, np.linalg.lstsq(rows, targets, rcond=None)[0].T, atol=1e-8)


def test_reconstruction_of_what_did_not_change_is_what_was_there():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(2, 3, 4))
    x = rng.normal(size=(2, 30, 4))
    x[:, :, 3] = 0  # a dead input
    second = x.swapaxes(1, 2) @ x / 30
    np.testing.assert_allclose(reconstruct(weight, second, weight @ second), weight, atol=1e-8)
