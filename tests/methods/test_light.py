"""Lighter convolutions: closed forms, gradients, general optimisers and the plain fits as oracles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from slimline.methods.light import Separable, grouped, relative_error, separable, spread

NONE = 1e-12  # of damping: what is asked is the exact optimum


def problem(seed: int, groups: int, outputs: int, channels: int, kernel: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    inputs = channels * kernel
    mixed = rng.normal(size=(groups, 4 * inputs, inputs)) @ rng.normal(size=(groups, inputs, inputs))
    return rng.normal(size=(groups, outputs, inputs)), mixed.swapaxes(1, 2) @ mixed / (4 * inputs)


def plain(weight: np.ndarray, kernel: int, multiplier: int) -> np.ndarray:
    """The truncated decomposition of every channel's block, by numpy."""
    groups, outputs, _ = weight.shape
    blocks = weight.reshape(groups, outputs, -1, kernel).swapaxes(1, 2)
    left, values, right = np.linalg.svd(blocks, full_matrices=False)
    low = (left[..., :multiplier] * values[..., None, :multiplier]) @ right[..., :multiplier, :]
    return low.swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("multiplier", [1, 2])
def test_without_data_it_is_the_decomposition_of_every_channel(multiplier: int) -> None:
    weight, _ = problem(0, 2, 5, 3, 4)
    fit = separable(weight, None, 4, multiplier)
    np.testing.assert_allclose(fit.product, plain(weight, 4, multiplier), atol=1e-10)
    assert fit.depthwise.shape == (2, 3, multiplier, 4) and fit.pointwise.shape == (2, 5, 3, multiplier)


def test_where_channels_are_not_tied_the_loss_is_the_discarded_singular_values() -> None:
    weight, second = problem(1, 1, 6, 3, 4)
    second *= np.kron(np.eye(3), np.ones((4, 4)))
    fit = separable(weight, second, 4, damping=NONE)
    lost = total = 0.0
    for c in range(3):
        block = slice(4 * c, 4 * c + 4)
        values = np.linalg.svd(weight[0][:, block] @ np.linalg.cholesky(second[0][block, block]), compute_uv=False)
        lost, total = lost + np.square(values[1:]).sum(), total + np.square(values).sum()
    assert relative_error(weight, fit.product, second, NONE) == pytest.approx(lost / total, rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    groups=st.integers(1, 2),
    outputs=st.integers(2, 6),
    channels=st.integers(1, 4),
    multiplier=st.integers(1, 2),
)
def test_it_never_loses_more_than_the_plain_fit(
    seed: int, groups: int, outputs: int, channels: int, multiplier: int
) -> None:
    weight, second = problem(seed, groups, outputs, channels, 4)
    errors = [
        relative_error(weight, separable(weight, second, 4, multiplier, NONE, sweeps).product, second, NONE)
        for sweeps in (0, 1, 2, 12)
    ]
    bound = relative_error(weight, plain(weight, 4, multiplier), second, NONE)
    assert all(after <= before * (1 + 1e-9) + 1e-12 for before, after in zip([bound, *errors], errors, strict=False))


def test_it_ends_where_no_gradient_is_left() -> None:
    weight, second = problem(2, 1, 5, 3, 4)
    fit = separable(weight, second, 4, damping=NONE, sweeps=2000)

    def error(flat: np.ndarray) -> float:
        depthwise, pointwise = flat[:12].reshape(1, 3, 1, 4), flat[12:].reshape(1, 5, 3, 1)
        return relative_error(weight, Separable(depthwise, pointwise).product, second, NONE)

    start = np.concatenate([fit.depthwise.ravel(), fit.pointwise.ravel()])
    better = optimize.minimize(error, start, method="BFGS")
    assert better.fun >= 0.98 * error(start)
    # A general optimiser from many random starts finds nothing much better.
    rng = np.random.default_rng(3)
    others = [optimize.minimize(error, rng.normal(size=start.size), method="BFGS").fun for _ in range(6)]
    assert error(start) <= 1.05 * min(others)


def test_a_separable_convolution_is_found_again() -> None:
    rng = np.random.default_rng(4)
    true = Separable(rng.normal(size=(2, 3, 1, 9)), rng.normal(size=(2, 7, 3, 1)))
    _, second = problem(4, 2, 7, 3, 9)
    fit = separable(true.product, second, 9)
    np.testing.assert_allclose(fit.product, true.product, atol=1e-8)
    norms = np.linalg.norm(fit.depthwise, axis=3), np.linalg.norm(fit.pointwise, axis=1)
    np.testing.assert_allclose(*norms, rtol=1e-8)


def test_channels_that_say_nothing_are_no_trouble() -> None:
    weight, second = problem(5, 1, 4, 3, 4)
    weight[..., 4:8] = 0
    second[:, 8:] = second[:, :, 8:] = 0
    fit = separable(weight, second, 4)
    assert np.isfinite(fit.product).all() and relative_error(weight, fit.product, second) < 1


@pytest.mark.parametrize("before", [1, 2])
def test_groups_are_the_regression_on_what_they_read(before: int) -> None:
    weight, second = problem(6, before, 6, 4, 3)
    fit = grouped(weight, second, 2, NONE)
    assert fit.shape == (2 * before, 3, 6)
    for b in range(before):
        lower = np.linalg.cholesky(second[b])
        for g in range(2):
            outs, ins = slice(3 * g, 3 * g + 3), slice(6 * g, 6 * g + 6)
            solved, *_ = np.linalg.lstsq(lower.T[:, ins], (weight[b, outs] @ lower).T, rcond=None)
            np.testing.assert_allclose(fit[2 * b + g], solved.T, rtol=1e-6, atol=1e-8)
    cut = spread(grouped(weight, None, 2), 2)
    np.testing.assert_array_equal(cut[cut != 0], weight[cut != 0])
    assert relative_error(weight, spread(fit, 2), second, NONE) <= relative_error(weight, cut, second, NONE)
