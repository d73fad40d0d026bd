"""Sizes that an ONNX file leaves free stay so through pruning, masks, rounding, files and artifacts, where the network
takes others; ONNX Runtime's answer to the file itself is the oracle."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.runtimes.base import runtime
from tests.frameworks.onnx.graphs import Array, ints, model, weights

RNG = np.random.default_rng(3)


def floats(*shape: int) -> Array:
    return RNG.normal(size=shape).astype(np.float32)


def answers(proto: onnx.ModelProto, *inputs: Array) -> list[Array]:
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    given = {i.name: x for i, x in zip(session.get_inputs(), inputs, strict=True)}
    return list(session.run(None, given))


def same(left: sl.Model, right: sl.Model | onnx.ModelProto, *inputs: Array) -> None:
    """Equal answers, all outputs."""
    expected = right.outputs(*inputs) if isinstance(right, sl.Model) else answers(right, *inputs)
    for a, b in zip(left.outputs(*inputs), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


HEADS = """
m = MatMul(x, first_w) t = Add(m, first_b) n = Shape(t) b = Gather(n, zero) s = Gather(n, one) w = Gather(n, two)
hd = Div(w, four) b1 = Unsqueeze(b, zero1) s1 = Unsqueeze(s, zero1) h1 = Unsqueeze(hd, zero1)
z = Concat <axis = 0> (b1, s1, four1, h1) q = Reshape(t, z) k = Transpose <perm = [0, 2, 1, 3]> (q)
e = Transpose <perm = [0, 1, 3, 2]> (k) p = MatMul(k, e) a = Softmax(p) v = MatMul(a, k)
o = Transpose <perm = [0, 2, 1, 3]> (v) w1 = Unsqueeze(w, zero1) f = Concat <axis = 0> (b1, s1, w1)
r = Reshape(o, f) y = MatMul(r, last_w)"""
FOLDED = """
m = MatMul(x, first_w) t = Add(m, first_b) n = Shape(t) b = Slice(n, zero1, one1) s = Slice(n, one1, two1)
bs = Mul(b, s) z = Concat <axis = 0> (bs, twelve) q = Reshape(t, z) g = Gemm(q, square) r = Relu(g)
o = Concat <axis = 0> (b, s, twelve) u = Reshape(r, o) y = MatMul(u, last_w)"""
BEAMS = """
m = MatMul(x, first_w) t = Add(m, first_b) n = Shape(x) b = Slice(n, zero1, one1) s = Slice(n, one1, two1)
i = Concat <axis = 0> (b, s, four1, three1) q = Reshape(t, i) k = Transpose <perm = [0, 2, 1, 3]> (q)
bh = Mul(b, four1) j = Concat <axis = 0> (bh, s, three1) c = Reshape(k, j)
e = Transpose <perm = [0, 2, 1]> (c) p = MatMul(c, e) a = Softmax(p) v = MatMul(a, c)
l = Concat <axis = 0> (b, four1, s, three1) d = Reshape(v, l) o = Transpose <perm = [0, 2, 1, 3]> (d)
f = Concat <axis = 0> (b, s, twelve) r = Reshape(o, f) y = MatMul(r, last_w)"""
PLACES = """
m = MatMul(x, first_w) t = Add(m, first_b) n = Shape(x) s = Slice(n, one1, two1)
k = Slice(table, zero1, s, zero1) u = Add(t, k) g = Concat <axis = 0> (one1, s, one1) c = ConstantOfShape(g)
d = Add(u, c) r = Relu(d) y = MatMul(r, last_w)"""
SHAPED = """
m = MatMul(x, first_w) t = Add(m, first_b) n = Shape(t) r = Relu(t) w = Unsqueeze(r, one1) u = Reshape(w, n)
y = MatMul(u, last_w)"""
SEQUENCES = {
    "as another is": SHAPED,
    "heads": HEADS,
    "places in one dimension": FOLDED,
    "batch and heads in one": BEAMS,
    "positions": PLACES,
}
NUMBERS = ints(
    zero=0, one=1, two=2, four=4, zero1=[0], one1=[1], two1=[2], three1=[3], four1=[4], twelve=[12]
) | weights(first_w=(8, 12), first_b=(12,), square=(12, 12), last_w=(12, 5), table=(40, 12))


def sequence(name: str) -> onnx.ModelProto:
    body = SEQUENCES[name]
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    return model(body, {n: w for n, w in NUMBERS.items() if n in words}, "float[N,T,8] x", "float[N,T,K] y")


UPSAMPLED = """
c = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, conv_w, conv_b) r = Relu(c) n = Shape(x)
hw = Slice(n, two1, four1) m = Shape(r) bc = Slice(m, zero1, two1) z = Concat <axis = 0> (bc, hw)
d = Resize <mode = "nearest"> (r, , , z) k = Conv <pads = [1, 1, 1, 1]> (d, other_w, conv_b) y = Conv(k, last_w)"""
POOLED = """
c = Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (x, conv_w, conv_b) r = Relu(c) n = Shape(r)
b = Slice(n, zero1, one1) w = Slice(n, one1, two1) z = Concat <axis = 0> (b, w, minus) f = Reshape(r, z)
t = Transpose <perm = [0, 2, 1]> (f) u = MatMul(t, square) p = ReduceMean(u, one1) q = Flatten(p)
y = Gemm(q, fc)"""
PICTURES = {"upsampled": (UPSAMPLED, "float[N,5,H,W] y"), "pooled": (POOLED, "float[N,5] y")}
KERNELS = ints(zero1=[0], one1=[1], two1=[2], four1=[4], minus=[-1]) | weights(
    conv_w=(12, 3, 3, 3), conv_b=(12,), other_w=(12, 12, 3, 3), last_w=(5, 12, 1, 1), square=(12, 12), fc=(12, 5)
)


def picture(name: str) -> onnx.ModelProto:
    body, output = PICTURES[name]
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    return model(body, {n: w for n, w in KERNELS.items() if n in words}, "float[N,3,H,W] x", output)


CASES = {
    **{name: (sequence, (2, 6, 8), [(3, 6, 8), (2, 13, 8), (1, 2, 8), (4, 31, 8)]) for name in SEQUENCES},
    **{name: (picture, (2, 3, 8, 8), [(3, 3, 8, 8), (1, 3, 9, 14), (2, 3, 33, 5)]) for name in PICTURES},
}


@pytest.mark.parametrize("name", list(CASES))
def test_free_sizes_stay_through_everything(name: str, tmp_path: Path) -> None:
    make, shape, others = CASES[name]
    proto = make(name)
    loaded = sl.load(proto, (floats(*shape),))
    free = loaded.inputs[0].shape
    assert loaded.adapter.free(loaded.native) == "sizes" and free.count(None) == len(free) - 1
    plan = sl.plan(loaded, sl.ChannelPruning(ratio=0.4, criterion="l2", factors="all"))
    assert plan.parameters < 0.8 * plan.graph.size
    small, masked = plan.apply(loaded), plan.mask(loaded)
    again = sl.load(small.save(tmp_path / "small.onnx"))
    assert again.inputs == small.inputs == loaded.inputs
    again.save(tmp_path / "again.onnx")
    assert (tmp_path / "small.onnx").read_bytes() == (tmp_path / "again.onnx").read_bytes()
    artifact = runtime("onnxruntime").load(Path(sl.export(again, "onnxruntime", tmp_path / "out.onnx")))
    assert runtime("onnxruntime").input_specs(tmp_path / "out.onnx")[0][1] == free
    for other in others:
        x = floats(*other)
        same(loaded, proto, x)
        same(small, masked, x)
        same(again, small, x)
        np.testing.assert_allclose(artifact.outputs((x,))[0], small.outputs(x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("bound", "at"), [("Min", 9), ("Max", 30), ("Min", 200), ("Max", 3)])
def test_a_number_that_follows_a_size_to_a_limit_does_so_beyond_it(bound: str, at: int) -> None:
    body = f"""n = Shape(x) s = Slice(n, one1, two1) l = {bound}(s, limit) p = ReduceSum(l) f = Cast <to = 1> (p)
    m = MatMul(x, first_w) u = Mul(m, f) y = MatMul(u, last_w)"""
    own = {name: NUMBERS[name] for name in ("one1", "two1", "first_w", "last_w")} | ints(limit=[at])
    proto = model(body, own, "float[N,T,8] x", "float[N,T,K] y")
    loaded = sl.load(proto, (floats(2, 12, 8),))
    assert loaded.inputs[0].shape == (None, None, 8)
    for length in (2, 4, 12, 40, 300):
        same(loaded, proto, floats(2, length, 8))


@pytest.mark.parametrize(("operator", "at"), [("Min", 4), ("Max", 150)])
def test_a_length_that_stops_growing_is_no_constant(operator: str, at: int) -> None:
    body = f"""n = Shape(x) s = Slice(n, one1, two1) l = {operator}(s, limit) b = Slice(n, zero1, one1)
    m = MatMul(x, first_w) t = ReduceMean(m, one1) z = Concat <axis = 0> (b, l, twelve) u = Expand(t, z)
    y = MatMul(u, last_w)"""
    own = {name: NUMBERS[name] for name in ("zero1", "one1", "two1", "twelve", "first_w", "last_w")} | ints(limit=[at])
    proto = model(body, own, "float[N,T,8] x", "float[N,S,K] y")
    loaded = sl.load(proto, (floats(2, 12, 8),))
    plan = sl.plan(loaded, sl.ChannelPruning(ratio=0.4, criterion="l2"))
    small, masked = plan.apply(loaded), plan.mask(loaded)
    for length in (2, 12, 40, 300):
        same(loaded, proto, floats(3, length, 8))
        same(small, masked, floats(3, length, 8))


def test_what_has_to_be_fixed_is_said(caplog: pytest.LogCaptureFixture) -> None:
    own = {name: NUMBERS[name] for name in ("first_w", "last_w")} | {"places": NUMBERS["table"][:6]}
    proto = model(
        "m = MatMul(x, first_w) t = Add(m, places) y = MatMul(t, last_w)", own, "float[N,T,8] x", "float[N,T,K] y"
    )
    with caplog.at_level(logging.WARNING):
        loaded = sl.load(proto, (floats(2, 6, 8),))
    assert loaded.inputs[0].shape == (None, 6, 8)
    assert "takes no other size than 6 where its file leaves T free" in caplog.text
    with pytest.raises(SlimlineError, match="no size of its inputs free but the batch"):
        sl.load(proto, (floats(2, 6, 8),), dynamic=True)


def test_sizes_that_change_together_are_one() -> None:
    proto = model(
        "z = Mul(x, k) y = MatMul(z, first_w)", {"first_w": NUMBERS["first_w"]}, "float[N,A,8] x, float[N,B,8] k",
        "float[N,A,K] y",
    )  # fmt: skip
    loaded = sl.load(proto, (floats(2, 6, 8), floats(2, 6, 8)))
    assert [i.shape for i in loaded.inputs] == [(None, None, 8)] * 2
    same(loaded, proto, floats(3, 9, 8), floats(3, 9, 8))


def test_a_single_number_beside_a_free_size(tmp_path: Path) -> None:
    own = {"first_w": NUMBERS["first_w"]}
    proto = model("z = Mul(x, rate) y = MatMul(z, first_w)", own, "float[N,T,8] x, float rate", "float[N,T,K] y")
    loaded = sl.load(proto, (floats(2, 6, 8), np.array(2, np.float32)))
    assert loaded.inputs[0].shape == (None, None, 8)
    sl.export(loaded, "onnxruntime", tmp_path / "out.onnx")


def test_rounding_and_compensation_at_any_length() -> None:
    loaded = sl.load(sequence("heads"), (floats(2, 6, 8),))
    data = sl.Data(
        calibration=(floats(40, 9, 8), np.arange(40 * 9).reshape(40, 9) % 5),
        test=(floats(40, 9, 8), np.arange(40 * 9).reshape(40, 9) % 5),
    )
    step = sl.ChannelPruning(ratio=0.3, criterion="l2", compensate=True)
    small = sl.apply(loaded, [step, sl.StaticQuantization(undo=False)], data)
    assert small.inputs == loaded.inputs and small.quantization is not None
    assert np.isfinite(small.predict(floats(3, 17, 8))).all()


@pytest.mark.parametrize("free", [True, False])
def test_branches_that_sizes_decide_are_taken(free: bool) -> None:
    """As exporters write a squeeze: where the dimension is 1."""
    body = """
    m = MatMul(x, first_w) t = Add(m, first_b) n = Shape(t) d = Gather(n, last) q = Equal(d, LENGTH)
    e = If (q) <then_branch = a () => (float[N,T,12] i) { k = Constant <value_float = 2.0> () i = Mul(t, k) },
                else_branch = b () => (float[N,T,12] j) { i = Neg(t) j = Mul(i, scale) }>
    g = If (q) <then_branch = c () => (float[N,T,12] i) { i = Identity(e) },
                else_branch = d () => (float[N,T,12] j) { i = Neg(e) j = Mul(i, scale) }>
    r = Relu(g) y = MatMul(r, last_w)"""
    own = {name: NUMBERS[name] for name in ("first_w", "first_b", "last_w")} | weights(scale=(12,))
    for length, taken in (("is_12", 12), ("is_7", 7)):
        numbers = ints(**{length: taken}, last=2)
        inputs, output = ("float[N,T,8] x", "float[N,T,K] y") if free else ("float[N,6,8] x", "float[N,6,K] y")
        text = body.replace("LENGTH", length)
        proto = model(text, own | numbers, inputs, output)
        loaded = sl.load(proto, (floats(2, 6, 8),))
        same(loaded, proto, floats(3, 9 if free else 6, 8))
        plan = sl.plan(loaded, sl.ChannelPruning(ratio=0.4, criterion="l2"))
        same(plan.apply(loaded), plan.mask(loaded), floats(3, 9 if free else 6, 8))
        assert not any("If" in f.reason for f in plan.units.frozen)


@pytest.mark.parametrize(("axis", "asked"), [(1, "Greater(s, limit)"), (0, "Greater(s, limit)"), (0, "Equal(s, one)")])
def test_branches_that_follow_a_size_stay(axis: int, asked: str) -> None:
    body = f"""
    m = MatMul(x, first_w) n = Shape(x) s = Gather(n, dim) q = {asked}
    e = If (q) <then_branch = a () => (float[N,T,12] i) {{ i = Relu(m) }},
                else_branch = b () => (float[N,T,12] j) {{ j = Neg(m) }}> y = MatMul(e, last_w)"""
    own = {name: NUMBERS[name] for name in ("first_w", "last_w")} | ints(dim=axis)
    own |= ints(one=1) if "one" in asked else ints(limit=100)
    proto = model(body, own, "float[N,T,8] x" if axis else "float[N,6,8] x", "float[N,T,K] y")
    loaded = sl.load(proto, (floats(2, 6, 8),))
    for length in (1, 6, 99, 200):
        same(loaded, proto, floats(2, length, 8) if axis else floats(length, 6, 8))


@pytest.mark.parametrize("name", list(CASES))
def test_training_at_free_sizes_is_exact_or_refused(name: str) -> None:
    pytest.importorskip("torch")
    make, shape, others = CASES[name]
    loaded = sl.load(make(name), (floats(*shape),))
    obstacle = loaded.adapter.untrainable(loaded.native)
    assert (obstacle is not None) == (name in ("positions", "upsampled", "pooled"))
    if obstacle is None:
        trainer = loaded.adapter.trainer(loaded.native, None, sl.Distillation(alpha=0.0), 0, 4)
        labels = np.zeros(others[0][:2], np.int64)
        trainer.step(((floats(*others[0]),), labels), 1e-3)
        native = trainer.native()
        for other in others:
            x = floats(*other)
            expected = loaded.adapter.outputs(native, (x,))[0]
            np.testing.assert_allclose(trainer.outputs((x,))[0], expected, rtol=1e-4, atol=1e-5)
