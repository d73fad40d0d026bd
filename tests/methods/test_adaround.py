"""AdaRound against exhaustive search, rounding to nearest and GPTQ."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimline.methods.adaround import adaround
from slimline.methods.formats import IntegerGrid
from slimline.methods.gptq import gptq, nearest_of, sweeps
from slimline.methods.obs import damped
from slimline.methods.scales import least_squares, widest


def problem(seed: int, outputs: int, inputs: int, bits: int = 4) -> tuple[np.ndarray, np.ndarray, IntegerGrid]:
    """Weights, the Gram matrix of inputs that go together and are never negative, and a grid."""
    rng = np.random.default_rng(seed)
    rows = np.maximum(rng.normal(size=(300, inputs)) @ rng.normal(size=(inputs, inputs)) / np.sqrt(inputs) + 0.5, 0)
    weight = rng.normal(size=(outputs, inputs)).astype(np.float32)
    grid = least_squares(weight, widest(weight, f"int{bits}", (1, None)))
    assert isinstance(grid, IntegerGrid)
    return weight, damped(rows.T @ rows / 300, 0.01), grid


def solved(weight: np.ndarray, h: np.ndarray, grid: IntegerGrid, keep: np.ndarray | None = None) -> np.ndarray:
    scale = np.broadcast_to(grid.scale, weight.shape).astype(np.float64)
    low, high = (np.full(weight.shape, float(end)) for end in (grid.low, grid.high))
    return adaround(weight, h, scale, low, high, keep, steps=100)


def errors(weight: np.ndarray, rounded: np.ndarray, h: np.ndarray) -> np.ndarray:
    return np.asarray(np.einsum("oi,ij,oj->o", weight - rounded, h, weight - rounded))


@pytest.mark.parametrize("seed", range(3))
def test_it_is_near_the_best_of_all_choices(seed: int) -> None:
    weight, h, grid = problem(seed, 8, 9)
    down = np.clip(np.floor(weight / grid.scale), grid.low, grid.high)
    choices = np.array(list(itertools.product((0, 1), repeat=9)))
    every = np.clip(down[:, None] + choices, grid.low, grid.high) * grid.scale[:, None]
    changes = weight[:, None] - every
    best = np.einsum("oki,ij,okj->ok", changes, h, changes).min(axis=1)
    found = errors(weight, solved(weight, h, grid), h)
    assert (found >= best - 1e-9).all()
    assert found.sum() <= 1.35 * best.sum() < 0.8 * errors(weight, grid.round(weight), h).sum()


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 3, 4, 8]))
def test_each_weight_goes_up_or_down_and_no_output_is_worse_than_to_nearest(seed: int, bits: int) -> None:
    weight, h, grid = problem(seed, 4, 12, bits)
    rounded = solved(weight, h, grid)
    codes = rounded / grid.scale
    assert np.allclose(codes, np.rint(codes), atol=1e-6)
    exact = np.clip(weight / grid.scale, grid.low, grid.high)
    assert (np.abs(codes - exact) < 1 + 1e-6).all()
    assert (errors(weight, rounded, h) <= errors(weight, grid.round(weight), h) * 1.0001 + 1e-6).all()


def test_it_is_as_good_as_gptq_with_sweeps_on_a_larger_layer() -> None:
    weight, h, grid = problem(7, 16, 72)
    scale, zero = np.broadcast_to(grid.scale, weight.shape), np.zeros(weight.shape)
    code = nearest_of(grid, scale, zero)
    other = errors(weight, sweeps(weight, gptq(weight, h, code), h, code), h).sum()
    assert errors(weight, solved(weight, h, grid), h).sum() <= 1.05 * other


def test_what_is_masked_stays_zero() -> None:
    weight, h, grid = problem(3, 6, 10)
    keep = np.random.default_rng(0).random(weight.shape) > 0.4
    rounded = solved(weight * keep, h, grid, keep)
    assert not rounded[~keep].any() and rounded[keep].any()
