"""Recurrent operators: hidden and input widths are removed exactly, whichever gates, directions and options there are.

The oracle is a network whose tensors are cut by hand, computed by ONNX Runtime.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import slimline as sl
from slimline.graph.cost import macs
from slimline.graph.units import Units
from slimline.plans import Plan
from tests.frameworks.onnx.graphs import Array, exact, ints, model, weights

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
STEPS, WIDTH, HIDDEN = 5, 6, 4
X = np.random.default_rng(1).standard_normal((3, STEPS, 3)).astype(np.float32)


def tensors(kind: str, directions: int) -> dict[str, Array]:
    """Of the largest network of a kind: rows of every tensor are (direction, gate, hidden)."""
    d, k, h = directions, GATES[kind], HIDDEN
    return weights(
        first_w=(3, WIDTH), first_b=(WIDTH,), w=(d, k * h, WIDTH), r=(d, k * h, h), bias=(d, 2 * k * h),
        peepholes=(d, 3 * h), h=(d, 1, h), c=(d, 1, h), last_w=(d * h, 2),
    )  # fmt: skip


def cut(held: dict[str, Array], hidden: list[int], width: list[int]) -> dict[str, Array]:
    """The positions that stay, by hand."""
    d = len(held["w"])

    def gates(array: Array) -> Array:
        rows = array.reshape(d, -1, HIDDEN, *array.shape[2:])[:, :, hidden]
        return rows.reshape(d, -1, *array.shape[2:])

    changed = {name: gates(held[name]) for name in ("w", "r", "bias", "peepholes")}
    changed["w"], changed["r"] = changed["w"][..., width], changed["r"][..., hidden]
    changed |= {name: held[name][..., width] for name in ("first_w", "first_b")}
    changed |= {name: held[name][..., hidden] for name in ("h", "c")}
    return changed | {"last_w": held["last_w"].reshape(d, HIDDEN, 2)[:, hidden].reshape(-1, 2)}


def network(kind: str, own: dict[str, Array], inputs: set[str], options: str = "", last: bool = False) -> sl.Model:
    """A linear layer over the steps, a recurrent one with these of its optional inputs, a linear layer over all that it
    gives, or its last state. The batch is free, with states too."""
    order = ["bias", "lengths", "h0", "c0", "peepholes"] if kind == "LSTM" else ["bias", "lengths", "h0"]
    directions, hidden = len(own["w"]), own["r"].shape[2]
    way = ("forward", "bidirectional")[directions - 1]
    given = ", ".join(["t", "w", "r", *(name if name in inputs else "" for name in order)])
    results, flat = (", q", "p = Transpose <perm = [1, 0, 2]> (q)"), [0, -1]
    if not last:
        results, flat = ("q", "p = Transpose <perm = [2, 0, 1, 3]> (q)"), [0, 0, -1]
    body = f"""
    m = MatMul(x, first_w) a = Add(m, first_b) t = Transpose <perm = [1, 0, 2]> (a)
    n = Shape(x) b = Slice(n, zero, one)
    size = Concat <axis = 0> (dirs, b, one) h0 = Expand(h, size) c0 = Expand(c, size) lengths = Expand(steps, b)
    {results[0]} = {kind} <hidden_size = {hidden}, direction = "{way}" {options}> ({given})
    {results[1]} f = Reshape(p, flat) y = MatMul(f, last_w)"""
    numbers = ints(zero=[0], one=[1], dirs=[directions], flat=flat) | {"steps": np.array([3], np.int32)}
    output = "float[N,K] y" if last else "float[N,S,K] y"
    return sl.load(model(body, {**own, **numbers}, f"float[N,{STEPS},3] x", output), (X[:2],))


OPTIONS = {
    "LSTM": ("", ", input_forget = 1", ", clip = 0.4", "HardSigmoid Relu Tanh"),
    "GRU": ("", ", linear_before_reset = 1", ", clip = 0.4", "HardSigmoid Relu"),
    "RNN": ("", ", clip = 0.4", "Relu"),
}
INPUTS = ("bias", "lengths", "h0", "c0", "peepholes")


@given(st.data())
@settings(max_examples=15, deadline=None, phases=(Phase.explicit, Phase.generate))
def test_gates_and_directions_lose_the_same_positions(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(GATES)))
    directions, last = data.draw(st.integers(1, 2)), data.draw(st.booleans())
    inputs = set(data.draw(st.lists(st.sampled_from(INPUTS), unique=True)))
    if kind != "LSTM":
        inputs -= {"c0", "peepholes"}
    options = data.draw(st.sampled_from(OPTIONS[kind]))
    if options and not options.startswith(","):
        names = ", ".join(f'"{name}"' for name in options.split() * directions)
        options = f", activations = [{names}]"
    own = tensors(kind, directions)
    loaded = network(kind, own, inputs, options, last)
    sizes = {u.size: u.name for u in Units(loaded.graph).units}
    assert set(sizes) == {WIDTH, HIDDEN}
    hidden = sorted(data.draw(st.sets(st.integers(0, HIDDEN - 1), min_size=1)))
    width = sorted(data.draw(st.sets(st.integers(0, WIDTH - 1), min_size=1)))
    gone = {sizes[n]: tuple(sorted({*range(n)} - {*stay})) for n, stay in ((HIDDEN, hidden), (WIDTH, width))}
    plan = Plan(Units(loaded.graph), gone)
    small = plan.apply(loaded)
    answer = network(kind, cut(own, hidden, width), inputs, options, last).outputs(X)[0]
    assert np.array_equal(small.outputs(X)[0], answer)
    assert np.allclose(plan.mask(loaded).outputs(X)[0], answer, atol=1e-6)
    assert macs(small.graph) == plan.macs
    d, k, h, i = directions, GATES[kind], len(hidden), len(width)
    assert plan.macs == STEPS * (3 * i + d * k * h * (i + h) + d * h * 2 * (not last)) + d * h * 2 * last


@pytest.mark.parametrize("kind", sorted(GATES))
def test_by_a_criterion(kind: str) -> None:
    plan = exact(network(kind, tensors(kind, 2), {"bias"}), 0.3)
    assert plan.parameters < 0.8 * plan.graph.size


def test_states_of_the_user_keep_their_width() -> None:
    body = "q, h, c = LSTM <hidden_size = 4> (x, w, r, , , h0, c0) s = Squeeze(q, one) y = MatMul(s, last_w)"
    own = tensors("LSTM", 1)
    held = {name: own[name] for name in ("w", "r", "last_w")} | ints(one=[1])
    inputs = f"float[{STEPS},2,{WIDTH}] x, float[1,2,4] h0, float[1,2,4] c0"
    units = Units(sl.load(model(body, held, inputs, "float[S,N,K] y")).graph)
    assert not units.units and any("the model's input" in f.reason for f in units.frozen)
    giving = f"float[S,N,K] y, float[1,2,{HIDDEN}] h"
    units = Units(sl.load(model(body.replace(", h0, c0", ""), held, f"float[{STEPS},2,{WIDTH}] x", giving)).graph)
    assert not units.units and any("the model's output" in f.reason for f in units.frozen)
