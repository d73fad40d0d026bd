"""Equations against numpy: an equation of `reshape` must name the very numbers that numpy moves."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimline.graph import ops
from slimline.graph.equation import Equation


def positions(dims, sizes):
    """For every element of a tensor with these axes, in row-major order, the position along each axis."""
    letters = [x for group in dims for x in group if x != "1"]
    shape = [sizes[x] for x in letters]
    grid = np.indices(shape).reshape(len(shape), -1)
    return dict(zip(letters, grid, strict=True))


def factorings(n: int):
    return st.permutations(_primes(n)).flatmap(lambda ps: _grouped(ps))


def _primes(n: int) -> list[int]:
    found, p = [], 2
    while n > 1:
        while n % p == 0:
            found.append(p)
            n //= p
        p += 1
    return found


@st.composite
def _grouped(draw, primes):
    shape = []
    for p in primes:
        if shape and draw(st.booleans()):
            shape[-1] *= p
        else:
            shape.append(p)
    for _ in range(draw(st.integers(0, 2))):
        shape.insert(draw(st.integers(0, len(shape))), 1)
    return tuple(shape)


@given(st.sampled_from([2, 6, 8, 12, 30, 36, 64, 72]).flatmap(lambda n: st.tuples(factorings(n), factorings(n))))
def test_reshape_keeps_row_major_order(shapes):
    before, after = shapes
    equation: Equation = ops.reshape(before, after)["equation"]
    ins, outs = equation.inputs[0], equation.outputs[0]
    assert [math.prod(equation.sizes.get(x, 1) for x in g) for g in ins if g != (".",)] == [
        n for n, g in zip(before, ins, strict=True) if g != (".",)
    ]
    if any(g == (".",) for g in (*ins, *outs)):
        return
    left, right = positions(ins, equation.sizes), positions(outs, equation.sizes)
    assert left.keys() == right.keys()
    for letter in left:
        np.testing.assert_array_equal(left[letter], right[letter])


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        ((2, 12, 5), (2, 3, 4, 5), "r1 (r2 r3) r4 -> r1 r2 r3 r4"),
        ((2, 8, 4, 4), (2, 128), "r1 r2 r3 r4 -> r1 (r2 r3 r4)"),
        ((3, 4), (2, 6), ". . -> . ."),
        ((2, 3, 4), (2, 2, 6), "r1 . . -> r1 . ."),
        ((2, 1, 7), (2, 7), "r1 1 r2 -> r1 r2"),
    ],
)
def test_reshape_text(before, after, text):
    assert str(ops.reshape(before, after)["equation"]) == text


def test_elementwise_broadcasting():
    equation = ops.elementwise([(2, 8, 4, 4), (8, 1, 1)], "mul")["equation"]
    assert str(equation) == "a0 a1 a2 a3, a1 1 1 -> a0 a1 a2 a3"


def test_matmul_broadcasting():
    equation = ops.matmul((2, 1, 4, 5), (3, 5, 6))["equation"]
    assert str(equation) == "a0 1 m k, a1 k n -> a0 a1 m n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"spatial": 2}, "b i . ., o i . ., o -> b o . ."),
        ({"spatial": 2, "groups": 4}, "b (g i) . ., (g o) i . ., (g o) -> b (g o) . ."),
        ({"spatial": 1, "transposed": True}, "b i ., i o ., o -> b o ."),
        ({"spatial": 2, "channels_last": True}, "b . . i, . . i o, o -> b . . o"),
        ({"spatial": 2, "channels_last": True, "transposed": True}, "b . . i, . . o i, o -> b . . o"),
        ({"spatial": 2, "channels_last": True, "depthwise": True}, "b . . g, . . g o, (g o) -> b . . (g o)"),
        ({"spatial": 2, "channels_last": True, "groups": 2}, "b . . (g i), . . i (g o), (g o) -> b . . (g o)"),
    ],
)
def test_convolutions(arguments, text):
    assert str(ops.conv(**arguments)["equation"]) == text
