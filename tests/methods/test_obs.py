"""The optimal brain surgeon against closed forms and against every mask there is."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimline.methods import obs
from slimline.methods.sparsity import lowest


def problem(outputs=3, inputs=6, seed=0, spread=0.5):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(40, inputs)) @ (np.eye(inputs) + spread * rng.normal(size=(inputs, inputs)))
    return rng.normal(size=(outputs, inputs)), obs.damped(x.T @ x / len(x), 1e-3)


def error(change, h):
    """The mean square of what a change of the weights does to the outputs."""
    return np.trace(change @ h @ change.T)


def best(w, h, keep):
    """Least squares on what stays, by the normal equations of the output error."""
    root = np.linalg.cholesky(h).T
    at = np.flatnonzero(keep)
    found = np.zeros(len(w))
    found[at] = np.linalg.lstsq(root[:, at], root @ w, rcond=None)[0]
    return found


def test_saliency_is_what_a_removal_costs():
    w, h = problem()
    found = obs.saliency(w, h)
    for row, j in np.ndindex(*w.shape):
        keep = np.arange(w.shape[1]) != j
        assert found[row, j] == pytest.approx(error((w[row] - best(w[row], h, keep))[None], h))


def test_saliency_of_runs_is_what_removing_them_costs():
    w, h = problem()
    found = obs.saliency(w, h, 3)
    for row, run in np.ndindex(*found.shape):
        keep = np.arange(6) // 3 != run
        assert found[row, run] == pytest.approx(error((w[row] - best(w[row], h, keep))[None], h))


@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(0, 127))
@settings(max_examples=40, deadline=None)
def test_refit_is_least_squares(seed, inputs, bits):
    w, h = problem(2, inputs, seed)
    keep = np.array([(bits >> j) & 1 for j in range(inputs)], bool)[None].repeat(2, 0)
    found = obs.refit(w, keep, h)
    for row in range(2):
        np.testing.assert_allclose(found[row], best(w[row], h, keep[row]), atol=1e-6)


def test_refit_to_other_inputs_is_least_squares_on_their_rows():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(50, 5))
    y = x + 0.3 * rng.normal(size=x.shape)
    w, keep = rng.normal(size=(1, 5)), np.array([[True, False, True, True, False]])
    found = obs.refit(w, keep, y.T @ y / 50, x.T @ y / 50)
    expected = np.linalg.lstsq(y[:, keep[0]], x @ w[0], rcond=None)[0]
    np.testing.assert_allclose(found[0, keep[0]], expected, atol=1e-8)


def greedy(w, h):
    """The trace of one row, each removal chosen by trying all that are left."""
    keep, costs, before = np.ones(len(w), bool), np.zeros(len(w)), 0.0
    for _ in range(len(w)):
        tried = {}
        for j in np.flatnonzero(keep):
            keep[j] = False
            tried[j] = error((w - best(w, h, keep))[None], h)
            keep[j] = True
        j = min(tried, key=tried.get)
        costs[j], before, keep[j] = tried[j] - before, tried[j], False
    return costs


@pytest.mark.parametrize("block", [2, 64])
def test_traces_are_those_of_trying_all(block, monkeypatch):
    monkeypatch.setattr(obs, "BLOCK", block)
    w, h = problem(3, 7)
    found = obs.traces(w, h)
    for row in range(3):
        costs = greedy(w[row], h)
        order = np.argsort(found[row], kind="stable")
        # The same order, and the largest cost so far.
        np.testing.assert_allclose(found[row][order], np.maximum.accumulate(costs[order]), rtol=1e-6, atol=1e-9)
        assert np.all(np.diff(found[row][order]) >= 0)


def test_traces_come_close_to_the_best_of_all_masks():
    worse = []
    for seed in range(10):
        w, h = problem(2, 4, seed)
        costs = [
            error(w - np.stack([best(w[0], h, k[:4]), best(w[1], h, k[4:])]), h)
            for gone in combinations(range(8), 4)
            for k in [~np.isin(np.arange(8), gone)]
        ]
        keep = lowest(obs.traces(w, h), 4)
        found = error(w - obs.refit(w, keep, h), h)
        assert found >= min(costs) - 1e-9
        worse.append(found / min(costs))
    assert np.median(worse) < 1.05


def test_traces_leave_n_of_m():
    w, h = problem(4, 8)
    found = obs.traces(w, h, group=(1, 4))
    assert (np.isfinite(found).reshape(4, 2, 4).sum(2) == 3).all()
    assert (np.isfinite(obs.traces(w, h, most=5)).sum(1) == 5).all()


@pytest.mark.parametrize("block", [3, 8])
def test_blockwise_passes_errors_to_the_right(block):
    w, h = problem(5, 8)
    new, keep = obs.blockwise(w, h, 12, block=block)
    assert (~keep).sum() == 12
    assert not new[~keep].any()
    # What is left of the last removal is the optimum for the columns behind it: with one removal it is closed form.
    single, kept = obs.blockwise(w[:1], h, 1, block=8)
    j = int(np.flatnonzero(~kept[0])[0])
    change = obs.inverse(h[j:, j:])
    np.testing.assert_allclose(single[0, :j], w[0, :j])
    np.testing.assert_allclose(single[0, j:], w[0, j:] - w[0, j] / change[0, 0] * change[0], atol=1e-9)


def test_blockwise_leaves_n_of_m_and_beats_magnitude():
    w, h = problem(16, 32, spread=0.3)
    new, keep = obs.blockwise(w, h, 0, group=(2, 4), block=10)
    assert (keep.reshape(16, 8, 4).sum(2) == 2).all()
    order = np.argsort(np.abs(w).reshape(16, 8, 4), axis=2)
    plain = np.ones((16, 8, 4), bool)
    np.put_along_axis(plain, order[:, :, :2], False, axis=2)
    assert error(w - new, h) < error(w - w * plain.reshape(w.shape), h)


def test_exact_is_better_than_blocks_and_than_magnitude():
    for seed in range(4):
        w, h = problem(8, 24, seed, spread=0.2)
        exact = obs.refit(w, lowest(obs.traces(w, h), 96), h)
        block, keep = obs.blockwise(w, h, 96)
        plain = lowest(np.abs(w), 96)
        others = [block, obs.refit(w, keep, h), np.where(plain, w, 0), obs.refit(w, plain, h)]
        assert error(w - exact, h) < min(error(w - other, h) for other in others)


def test_inputs_that_are_zero_are_no_division_by_zero():
    h = obs.damped(np.zeros((3, 3)), 0.01)
    assert np.isfinite(obs.traces(np.ones((2, 3)), h)).all()
