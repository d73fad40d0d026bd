"""Scales, GPTQ, coordinate sweeps and HQQ against exhaustive search and slow references."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize_scalar

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.graph.matrix import matrices
from slimline.methods.formats import FloatFormat, IntegerGrid, spread
from slimline.methods.gptq import gptq, nearest_of, sweeps
from slimline.methods.gram import Gram
from slimline.methods.hqq import half_quadratic, norm_error
from slimline.methods.obs import damped
from slimline.methods.scales import fitting_blocks, least_squares, per_block, rounding_error, widest
from slimline.steps.weight_rounding import WeightRounding
from tests.frameworks.onnx import graphs

DTYPES = ("int8", "int4", "int3", "int2", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
BLOCKS = ((), (1, None), (1, 4), (3, 1), (2, 5), (None, None), (7, 100))

weights = arrays(np.float32, (6, 11), elements=st.floats(-8, 8, width=32).map(lambda x: float(np.float32(round(x, 3)))))


@settings(max_examples=30)
@given(weights, st.sampled_from(BLOCKS))
def test_reductions_over_blocks_are_those_of_slices(weight, blocks):
    sizes = [n if b is None else b for n, b in zip(weight.shape, blocks or (None, None), strict=True)]
    slow = [
        [weight[i : i + sizes[0], j : j + sizes[1]].max() for j in range(0, 11, sizes[1])]
        for i in range(0, 6, sizes[0])
    ]
    fast = per_block(np.maximum, weight, blocks)
    assert np.array_equal(fast if blocks else fast.reshape(1, 1), slow)


@settings(max_examples=30)
@given(weights, st.sampled_from(DTYPES), st.sampled_from(BLOCKS), st.booleans())
def test_rounded_weights_are_numbers_of_their_format_for_ever(weight, dtype, blocks, symmetric):
    each = widest(weight, dtype, blocks, symmetric)
    for fitted in (each, least_squares(weight, each)):
        rounded = fitted.round(weight)
        assert np.array_equal(fitted.round(rounded), rounded)
        assert np.array_equal(fitted.decode(fitted.encode(rounded)), rounded)
        assert not rounded[weight == 0].any()


@settings(max_examples=30)
@given(weights, st.sampled_from([d for d in DTYPES if d.startswith("int")]), st.sampled_from(BLOCKS), st.booleans())
def test_the_widest_grid_holds_every_weight_to_half_a_step(weight, dtype, blocks, symmetric):
    each = widest(weight, dtype, blocks, symmetric)
    step = spread(each.scale, each.blocks, weight.shape)
    # A zero point is rounded, by which the ends of the grid move up to half a step.
    assert (np.abs(each.round(weight) - weight) <= step * (0.501 if symmetric else 1.001)).all()


@settings(max_examples=30)
@given(weights, st.sampled_from(DTYPES), st.booleans())
def test_searched_scales_are_never_worse_in_any_block(weight, dtype, symmetric):
    each = widest(weight, dtype, (1, 4), symmetric)
    importance = np.abs(weight[:1]) + 0.1

    def energy(error):
        return error**2 * importance

    better = least_squares(weight, each, energy)
    assert (rounding_error(weight, better, energy) <= rounding_error(weight, each, energy)).all()


@pytest.mark.parametrize(("bits", "gain"), [(2, 0.5), (3, 0.8), (4, 0.9)])
def test_the_search_finds_the_best_scale(bits, gain):
    weight = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    each = widest(weight, f"int{bits}", (1, None))
    fitted = least_squares(weight, each)
    assert rounding_error(weight, fitted).sum() < gain * rounding_error(weight, each).sum()
    for row, error in zip(weight, rounding_error(weight, fitted).ravel(), strict=True):
        top = float(widest(row[None], f"int{bits}", (1, None)).scale.item())

        def cost(scale, row=row):
            return float(rounding_error(row[None], replace(fitted, scale=np.full((1, 1), scale, np.float32))).item())

        exhaustive = min(cost(scale) for scale in np.linspace(0.3 * top, top, 500))
        assert error <= exhaustive * 1.02
        local = minimize_scalar(cost, bounds=(0.3 * top, top), method="bounded").fun
        assert error <= max(local, exhaustive) * 1.02


@pytest.mark.parametrize(
    ("shape", "roles", "size", "blocks"),
    [
        ((10, 100), ((0,), (1,), ()), None, (1, None)),
        ((10, 100), ((0,), (1,), ()), 64, (1, 64)),
        ((10, 100), ((0,), (1,), ()), 128, (1, None)),
        ((100, 10), ((1,), (0,), ()), 32, (32, 1)),
        ((8, 16, 3, 3), ((0,), (1,), (2, 3)), 64, (1, 7, None, None)),
        ((8, 16, 3, 3), ((0,), (1,), (2, 3)), 4, (1, 1, None, None)),
        ((8, 16, 3, 3), ((0,), (1,), (2, 3)), 144, (1, None, None, None)),
        ((3, 3, 16, 8), ((3,), (2,), (0, 1)), 64, (None, None, 7, 1)),
        ((8, 1, 3, 3), ((0,), (), (2, 3)), 64, (1, None, None, None)),
        ((4, 16, 32), ((2,), (0, 1), ()), 32, (2, None, 1)),
        ((4, 16, 32), ((2,), (0, 1), ()), 8, (1, 8, 1)),
    ],
)
def test_groups_hold_whole_kernels(shape, roles, size, blocks):
    assert fitting_blocks(shape, *roles, size) == blocks


def layer(seed, outputs=5, inputs=12, rows=200):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, inputs)) @ rng.standard_normal((inputs, inputs))
    weight = rng.standard_normal((outputs, inputs)).astype(np.float32)
    return weight, damped(x.T @ x / rows, 0.01)


def cost(weight, rounded, h):
    change = np.asarray(weight - rounded, np.float64)
    return np.einsum("oi,ij,oj->o", change, h, change)


def spread_nearest(each, weight):
    zero = each.zero if isinstance(each, IntegerGrid) else np.zeros(each.scale.shape, np.int32)
    return nearest_of(
        each,
        *(np.broadcast_to(spread(x, each.blocks, weight.shape), weight.shape) for x in (each.scale, zero)),
    )


def textbook(weight, h, each):
    """GPTQ as its paper derives it: one input after the other, the inverse of what is left computed anew each time."""
    w = np.array(weight, np.float64)
    left = sorted(range(w.shape[1]), key=lambda i: -h[i, i])
    nearest = spread_nearest(each, weight)
    while left:
        q = left[0]
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        value = nearest(w[:, [q]], np.array([q]))[:, 0]
        w[:, left] -= np.outer((w[:, q] - value) / inverse[0, 0], inverse[0])
        w[:, q] = value
        left = left[1:]
    return w


@pytest.mark.parametrize("dtype", ["int4", "int3", "float8_e4m3fn"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [1, 5, 64])
def test_gptq_is_that_of_the_textbook(dtype, symmetric, block):
    weight, h = layer(0)
    each = widest(weight, dtype, (1, 4), symmetric)
    fast = gptq(weight, h, spread_nearest(each, weight), block=block)
    assert np.allclose(fast, textbook(weight, h, each), atol=1e-6)
    assert np.allclose(each.round(fast.astype(np.float32)), fast, atol=1e-6)


def test_with_uncorrelated_inputs_gptq_is_rounding_to_nearest():
    weight, _ = layer(1)
    each = widest(weight, "int3", (1, None))
    assert np.allclose(gptq(weight, np.diag(np.arange(1.0, 13.0)), spread_nearest(each, weight)), each.round(weight))


@pytest.mark.parametrize("seed", range(3))
def test_gptq_comes_near_the_best_of_all_roundings(seed):
    weight, h = layer(seed, outputs=3, inputs=6)
    each = least_squares(weight, widest(weight, "int2", (1, None)), lambda error: error**2 * np.diag(h))
    nearest = spread_nearest(each, weight)
    greedy = sweeps(weight, gptq(weight, h, nearest), h, nearest)
    for row in range(3):
        levels = np.arange(each.low, each.high + 1) * each.scale[row, 0]
        every = np.array(list(itertools.product(levels, repeat=6)))
        best = cost(weight[row], every, h).min()
        nearby = cost(weight[row : row + 1], each.round(weight)[row : row + 1], h)[0]
        assert best - 1e-9 <= cost(weight[row : row + 1], greedy[row : row + 1], h)[0] <= max(nearby, 1.5 * best)


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.sampled_from(["int4", "int2", "float8_e5m2"]))
def test_sweeps_never_cost(seed, dtype):
    weight, h = layer(seed, 4, 8, 40)
    each = widest(weight, dtype, (1, 3))
    nearest = spread_nearest(each, weight)
    start = each.round(weight)
    swept = sweeps(weight, start, h, nearest)
    assert (cost(weight, swept, h) <= cost(weight, start, h) * (1 + 1e-4) + 1e-9).all()
    assert np.allclose(each.round(swept.astype(np.float32)), swept, atol=1e-6)


def test_what_is_pruned_stays_zero_and_the_others_make_up_for_it():
    weight, h = layer(0)
    keep = np.random.default_rng(0).random(weight.shape) > 0.5
    pruned = np.where(keep, weight, 0)
    nearest = spread_nearest(widest(pruned, "int4", (1, None)), weight)
    rounded = gptq(pruned, h, nearest, keep)
    assert not rounded[~keep].any()
    assert not sweeps(pruned, rounded, h, nearest, keep)[~keep].any()
    assert cost(pruned, rounded, h).sum() < cost(pruned, np.where(keep, gptq(pruned, h, nearest), 0), h).sum()


@settings(max_examples=30)
@given(weights, st.sampled_from(["int4", "int3", "int2"]), st.booleans())
def test_half_quadratic_scales_are_never_worse_in_the_norm(weight, dtype, symmetric):
    start = widest(weight, dtype, (1, 5), symmetric)
    fitted = half_quadratic(weight, start)
    assert (norm_error(weight, fitted) <= norm_error(weight, start)).all()
    assert np.array_equal(fitted.round(fitted.round(weight)), fitted.round(weight))


@pytest.mark.parametrize("symmetric", [True, False])
def test_half_quadratic_scales_ignore_outliers(symmetric):
    rng = np.random.default_rng(0)
    weight = rng.standard_t(4, (64, 64)).astype(np.float32)
    start = widest(weight, "int4", (1, None), symmetric)
    fitted = half_quadratic(weight, start)
    assert norm_error(weight, fitted).sum() < 0.99 * norm_error(weight, start).sum()


@pytest.mark.parametrize("symmetric", [True, False])
def test_half_quadratic_scales_do_not_clip_what_the_squared_error_misses(symmetric):
    """A language model, whose answers hang on a few great weights, was lost by it."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((16, 64)).astype(np.float32)
    weight[:, 0] *= 12
    start = widest(weight, "int4", (1, None), symmetric)
    squares = [((weight - each.round(weight)) ** 2).sum(1) for each in (half_quadratic(weight, start), start)]
    assert (squares[0] <= squares[1] * (1 + 1e-5)).all()


@pytest.mark.parametrize(("dtype", "size"), [("int4", 16), ("int3", None)])
@pytest.mark.parametrize("transposed", [False, True])
def test_least_squares_in_pieces_is_that_of_the_whole(dtype, size, transposed):
    """With the energy of the outputs too, whichever dimension of the weight they lie along."""
    rng = np.random.default_rng(0)
    weight = rng.standard_t(4, (1500, 96)).astype(np.float32)
    source = "y = Gemm<transB=1>(x, w)" if not transposed else "y = MatMul(x, w)"
    stored = weight.T.copy() if transposed else weight
    x = rng.standard_normal((8, 96)).astype(np.float32)
    model = sl.load(graphs.model(source, {"w": stored}, "float[N,96] x", "float[N,1500] y"), x)
    (layer,) = matrices(model.graph)
    gram = Gram(1, 96)
    gram.see(rng.standard_normal((1, 400, 96)).astype(np.float32))
    stored = model.parameters()[layer.weight]
    blocks = tuple(1 if n == 1500 else size for n in stored.shape)
    rounding, start = WeightRounding(stored, layer, gram), widest(stored, dtype, blocks)
    whole = least_squares(stored, start, rounding._energy(start))
    np.testing.assert_allclose(rounding.fitted(start, "mse").scale, whole.scale, rtol=1e-6)
    assert (whole.scale < start.scale).any()


@pytest.mark.parametrize("rounding", ["mse", "gptq", "adaround"])
@pytest.mark.parametrize("paired", [False, True])
def test_outputs_are_rounded_a_few_at_a_time(rounding, paired, monkeypatch):
    """As all at once: one does not look at another."""
    rng = np.random.default_rng(0)
    stored = rng.standard_normal((20, 24)).astype(np.float32)
    x = rng.standard_normal((300, 24)).astype(np.float32)
    model = sl.load(graphs.model("y = Gemm<transB=1>(x, w)", {"w": stored}, "float[N,24] x", "float[N,20] y"), x[:2])
    (layer,) = matrices(model.graph)
    gram = Gram(1, 24, 20 if paired else None)
    gram.see(
        (x + 0.1 * rng.standard_normal(x.shape).astype(np.float32))[None], (x @ stored.T)[None] if paired else None
    )
    start = widest(stored, "int3", (1, 8))
    keep = rng.random(stored.shape) > 0.2

    def done():
        worker = WeightRounding(np.where(keep, stored, 0), layer, gram, keep)
        each = worker.fitted(start, rounding)
        rounded = worker.rounded(each, rounding)
        return worker.target, rounded, worker.error(rounded)

    whole = done()
    monkeypatch.setattr("slimline.steps.weight_rounding._PIECE", 3 * 24)
    for one, other in zip(whole, done(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert 0 < whole[2] < 1


def test_half_quadratic_pieces_are_those_of_the_whole():
    """Output by output, wherever outputs lie, and however many go through the cache at a time."""
    weight = np.random.default_rng(0).standard_t(4, (2000, 48)).astype(np.float32)
    start = widest(weight, "int4", (1, 16))
    whole, turned = half_quadratic(weight, start), half_quadratic(weight.T, widest(weight.T, "int4", (16, 1)))
    np.testing.assert_array_equal(turned.scale, whole.scale.T)
    alone = half_quadratic(weight[1500:1501], widest(weight[1500:1501], "int4", (1, 16)))
    np.testing.assert_array_equal(alone.scale, whole.scale[1500:1501])


def test_weights_that_no_format_holds_are_refused():
    with pytest.raises(SlimlineError, match="NaN or infinity"):
        widest(np.array([[np.nan]], np.float32), "int4", (1, None))
    with pytest.raises(SlimlineError, match="beyond float16: choose bfloat16"):
        widest(np.array([[1e5]], np.float32), "float16", ())
    assert widest(np.array([[1e5]], np.float32), "bfloat16", ()) == FloatFormat.plain("bfloat16")


def test_blocks_of_zeros_have_a_scale():
    each = widest(np.zeros((2, 8), np.float32), "int4", (1, 4), symmetric=False)
    assert np.array_equal(each.scale, np.ones((2, 2), np.float32))
    assert not each.round(np.zeros((2, 8), np.float32)).any()


@settings(max_examples=20)
@given(st.integers(0, 1000), st.sampled_from([1, 3, 5, 12, 64]), st.booleans())
def test_sweeps_in_blocks_of_inputs_are_those_of_one_input_after_the_other(seed, block, pruned):
    weight, h = layer(seed)
    keep = np.random.default_rng(seed).random(weight.shape) < 0.7 if pruned else None
    each = widest(weight, "int3", (1, 4))
    nearest = spread_nearest(each, weight)
    start = each.round(weight).astype(np.float64)
    current = start if keep is None else np.where(keep, start, 0.0)
    for _ in range(2):
        for j in sorted(range(12), key=lambda i: -h[i, i]):
            slope = (current - weight) @ h[:, j]
            value = nearest((current[:, j] - slope / h[j, j])[:, None], np.array([j]))[:, 0]
            current = np.array(current)
            current[:, j] = value if keep is None else np.where(keep[:, j], value, 0.0)
    begin = start if keep is None else np.where(keep, start, 0.0)
    swept = sweeps(weight, begin, h, nearest, keep, block=block)
    # A weight that lies between two numbers may go either way.
    assert np.allclose(cost(weight, swept, h), cost(weight, current, h), rtol=1e-6)


@pytest.mark.parametrize("size", [4, 5, None])
def test_scales_are_searched_for_the_error_of_what_the_weights_of_one_scale_make_together(size):
    weight, h = layer(3)
    matrix = next(m for m in matrices(torch_graph(weight)) if m.shape == (1, *weight.shape))
    gram = Gram(1, weight.shape[1])
    gram.see(np.linalg.cholesky(h).T[None] * np.sqrt(len(h)))
    each = widest(weight, "int3", (1, size))
    fitted = WeightRounding(weight, matrix, gram, damping=1e-9).fitted(each, "mse")
    for start in range(0, 12, size or 12):
        at = slice(start, start + (size or 12))

        def error(grid, at=at):
            return cost(weight[:, at], grid.round(weight)[:, at], h[at, at])

        assert (error(fitted) <= error(each) + 1e-12).all()
        block = 0 if size is None else start // size
        for factor in np.linspace(1, 0.3, 36):
            other = np.array(each.scale)
            other[:, block] *= np.float32(factor)
            assert (error(fitted) <= error(replace(each, scale=other)) * (1 + 1e-4) + 1e-9).all()


def torch_graph(weight):
    """The graph of a linear layer."""
    network = torch.nn.Linear(weight.shape[1], weight.shape[0])
    return sl.load(network, (np.zeros((2, weight.shape[1]), np.float32),)).graph
