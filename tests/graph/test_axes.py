"""The axis algebra against brute force: whatever it answers must satisfy every equality it was told."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimline.graph import ops
from slimline.graph.atoms import Atoms, Axis
from slimline.graph.ir import Graph, Node, Value
from slimline.graph.units import Units
from slimline.plans import Plan


def make(sizes):
    atoms = Atoms()
    return atoms, [atoms.fresh(Axis(n, "n", "l", "x")) for n in sizes]


@st.composite
def equalities(draw):
    """Label matrices over a few axes: single columns and products, in random pairs of equal length."""
    atoms, axes = make([4, 4, 4, 2, 2, 2, 2])
    flat = [a[:, 0] for a in axes]
    tall = [flat[0], flat[1], flat[2]]
    pairs = []
    for _ in range(draw(st.integers(1, 5))):
        sides = []
        for _ in range(2):
            if draw(st.booleans()):
                sides.append(draw(st.sampled_from(tall))[draw(st.permutations(range(4)))][:, None])
            else:
                h, d = draw(st.permutations(flat[3:]))[:2]
                sides.append(np.stack([np.repeat(h, 2), np.tile(d, 2)], axis=1))
        pairs.append(tuple(sides))
    return atoms, pairs


@given(equalities())
@settings(max_examples=100, deadline=None)
def test_every_equality_holds_under_every_selection(case):
    atoms, pairs = case
    for left, right in pairs:
        atoms.equate(left, right, "test")
    free = atoms.free()
    choices = np.array(list(itertools.islice(itertools.product([False, True], repeat=len(free)), 4096)))
    gone = np.zeros((len(choices), len(atoms.axis)), bool)
    gone[:, free] = choices
    for left, right in pairs:
        a, b = (gone[:, atoms.resolve(x)].any(axis=2) for x in (left, right))
        np.testing.assert_array_equal(a, b)


def test_equal_axes_stay_fully_prunable():
    atoms, (a, b) = make([5, 5])
    atoms.equate(a, b, "add")
    assert len(atoms.free()) == 5


def test_an_axis_read_as_a_product_keeps_both_factors():
    atoms, (flat, h, d) = make([12, 3, 4])
    product = np.stack([np.repeat(h[:, 0], 4), np.tile(d[:, 0], 3)], axis=1)
    atoms.equate(flat, product, "heads")
    assert len(atoms.free()) == 7
    gone = np.zeros(len(atoms.axis), bool)
    gone[h[1, 0]] = True
    np.testing.assert_array_equal(np.flatnonzero(gone[atoms.resolve(flat)].any(axis=1)), [4, 5, 6, 7])


def test_frozen_atoms_freeze_what_they_meet_and_say_why():
    atoms, (a, b) = make([3, 3])
    atoms.freeze(a, "because")
    atoms.equate(a, b, "add")
    assert len(atoms.free()) == 0
    assert atoms.reason(atoms.find(b[:, 0])) == ["because"] * 3


class Builder:
    """A few lines to write a neutral graph by hand."""

    def __init__(self, x):
        self.values = {"x": Value("x", x)}
        self.nodes, self.parameters = [], []

    def weight(self, name, shape):
        self.values[name] = Value(name, shape)
        self.parameters.append(name)
        return name

    def node(self, kind, inputs, outputs, attributes, layer=""):
        for name, shape in outputs.items():
            self.values[name] = Value(name, shape)
        self.nodes.append(Node(f"n{len(self.nodes)}", kind, tuple(inputs), tuple(outputs), attributes, layer, kind))
        return next(iter(outputs))

    def conv(self, x, out, name, width, groups=1):
        b, c, h, w = self.values[x].shape
        weight = self.weight(f"{name}.weight", (width, c // groups, 3, 3))
        return self.node("conv", (x, weight, None), {out: (b, width, h, w)}, ops.conv(2, groups), name)

    def units(self, output):
        return Units(
            Graph(
                tuple(self.nodes), self.values, tuple(self.parameters), frozenset(self.parameters), ("x",), (output,), 2
            )
        )


def test_residual_addition_ties_and_output_freezes():
    b = Builder((2, 3, 8, 8))
    b.conv("x", "a", "conv1", 8)
    b.conv("a", "c", "conv2", 8)
    s = b.node("add", ("a", "c"), {"s": (2, 8, 8, 8)}, ops.elementwise([(2, 8, 8, 8)] * 2, "add"))
    b.conv(s, "y", "conv3", 5)
    units = b.units("y")
    (unit,) = units.units
    assert unit.size == 8
    assert unit.layers == ("conv1", "conv2")
    assert set(unit.carriers) == {("conv1.weight", 0), ("conv2.weight", 0), ("conv2.weight", 1), ("conv3.weight", 1)}
    assert [(f.name, f.reason) for f in units.frozen] == [("conv3 (o)", "the model's output")]


def test_concatenation_keeps_units_apart():
    b = Builder((2, 3, 8, 8))
    b.conv("x", "a", "conv1", 4)
    b.conv("x", "c", "conv2", 6)
    b.node("concat", ("a", "c"), {"s": (2, 10, 8, 8)}, ops.concat(1))
    b.weight("scale", (10,))
    b.node("batch_norm", ("s", "scale"), {"n": (2, 10, 8, 8)}, ops.batch_norm(4, 1, 1), "bn")
    b.conv("n", "y", "conv3", 5)
    units = b.units("y")
    assert [(u.name, u.size) for u in units.units] == [("conv1", 4), ("conv2", 6)]
    plan = Plan(units, {"conv2": (1, 5)})
    np.testing.assert_array_equal(plan.retained("conv3.weight")[1], [0, 1, 2, 3, 4, 6, 7, 8])
    np.testing.assert_array_equal(plan.retained("scale")[0], [0, 1, 2, 3, 4, 6, 7, 8])
    assert plan.shape("s") == (2, 8, 8, 8)


def test_grouped_convolution_prunes_groups_or_places_within_them():
    b = Builder((2, 3, 8, 8))
    b.conv("x", "a", "conv1", 8)
    b.conv("a", "c", "conv2", 12, groups=4)
    b.conv("c", "y", "conv3", 5)
    units = b.units("y")
    sizes = sorted(u.size for u in units.units)
    assert sizes == [2, 3, 4]  # in-width, out-width, groups
    groups = next(u for u in units.units if u.size == 4)
    plan = Plan(units, {groups.name: (2,)})
    np.testing.assert_array_equal(plan.retained("conv1.weight")[0], [0, 1, 2, 3, 6, 7])
    np.testing.assert_array_equal(plan.retained("conv2.weight")[0], [0, 1, 2, 3, 4, 5, 9, 10, 11])
    assert plan.retained("conv2.weight")[1] is None
    assert plan.axis_size("n1", "g") == 3


def test_channel_shuffle_ties_both_halves():
    b = Builder((2, 3, 4, 4))
    b.conv("x", "a", "conv1", 12)
    b.node("reshape", ("a",), {"r": (2, 2, 6, 4, 4)}, ops.reshape((2, 12, 4, 4), (2, 2, 6, 4, 4)))
    b.node("permute", ("r",), {"p": (2, 6, 2, 4, 4)}, ops.permute((0, 2, 1, 3, 4)))
    b.node("reshape", ("p",), {"q": (2, 12, 4, 4)}, ops.reshape((2, 6, 2, 4, 4), (2, 12, 4, 4)))
    b.conv("q", "y", "conv2", 5)
    units = b.units("y")
    big = max(units.units, key=lambda u: u.size)
    assert big.size == 6
    plan = Plan(units, {big.name: (1,)})
    np.testing.assert_array_equal(plan.retained("conv1.weight")[0], [0, 2, 3, 4, 5, 6, 8, 9, 10, 11])
    np.testing.assert_array_equal(plan.retained("conv2.weight")[1], [0, 1, 4, 5, 6, 7, 8, 9, 10, 11])


def test_unknown_operator_freezes_with_its_name():
    b = Builder((2, 3, 4, 4))
    b.conv("x", "a", "conv1", 6)
    b.node("unknown", ("a",), {"u": (2, 6, 4, 4)}, ops.unknown(), "mystery")
    b.conv("u", "y", "conv2", 5)
    units = b.units("y")
    assert units.units == ()
    assert "mystery" in units.frozen[0].reason


def test_selecting_a_position_keeps_that_position():
    b = Builder((2, 3, 4, 4))
    b.conv("x", "a", "conv1", 6)
    b.node("select", ("a",), {"s": (2, 4, 4)}, ops.select(1, 2))
    b.conv("a", "y", "conv2", 5)
    (unit,) = b.units("y").units
    assert (unit.size, unit.frozen) == (5, 1)


def test_padding_channels_may_go_with_what_they_are_added_to():
    b = Builder((2, 3, 4, 4))
    b.conv("x", "a", "conv1", 4)
    b.node("pad", ("a",), {"p": (2, 6, 4, 4)}, ops.pad([(0, 0), (1, 1), (0, 0), (0, 0)]))
    b.conv("a", "c", "conv2", 6)
    b.node("add", ("p", "c"), {"s": (2, 6, 4, 4)}, ops.elementwise([(2, 6, 4, 4)] * 2, "add"))
    b.conv("s", "y", "conv3", 5)
    units = b.units("y")
    assert sum(u.size for u in units.units) == 6


@pytest.mark.parametrize("statistic", ["mean", "max"])
def test_reducing_over_channels_is_reported_to_the_mask(statistic):
    b = Builder((2, 3, 4, 4))
    b.conv("x", "a", "conv1", 6)
    b.node("reduce", ("a",), {"m": (2, 1, 4, 4)}, ops.reduce(4, (1,), True, statistic))
    b.conv("m", "y", "conv2", 5)
    units = b.units("y")
    plan = Plan(units, {units.units[0].name: (0, 3)})
    ((index, dim, mask),) = plan.statistics("n1")
    assert (index, dim) == (0, 1)
    np.testing.assert_array_equal(mask, [False, True, True, False, True, True])


def test_plan_round_trips_through_json():
    b = Builder((2, 3, 8, 8))
    b.conv("x", "a", "conv1", 8)
    b.conv("a", "y", "conv2", 5)
    units = b.units("y")
    plan = Plan(units, {"conv1": (1, 2)})

    class Stub:
        graph = units.graph

    again = Plan.from_json(plan.to_json(), Stub())
    assert again.removed == plan.removed
    assert again.macs == plan.macs == 8 * 8 * 9 * (3 * 6 + 6 * 5)
