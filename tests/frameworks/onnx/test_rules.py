"""Each operator rule on a graph written by hand: what is removed computes in ONNX Runtime what is masked does."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import slimline as sl
from slimline.frameworks.onnx.registry import RULES
from slimline.graph.units import Units
from tests.frameworks.onnx.graphs import exact, images, ints, model, tokens, weights

VECTOR = weights(s=(12,), b=(12,), mean=(12,)) | {"var": np.full(12, 0.8, np.float32)}

IMAGES = {
    **{name: (f"d = {name}(c)", 12) for name in (
        "Relu", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid", "LeakyRelu", "Elu", "Selu", "Softplus", "Erf", "Abs",
        "Neg", "Exp", "Floor", "Sign", "Identity", "GlobalMaxPool", "GlobalAveragePool")},
    "Clip": ("lo = Constant <value_float = 0.0> () hi = Constant <value_float = 6.0> () d = Clip(c, lo, hi)", 12),
    "Dropout": ("d = Dropout(c)", 12),
    "BatchNormalization": ("d = BatchNormalization <epsilon = 0.001> (c, s, b, mean, var)", 12),
    "InstanceNormalization": ("d = InstanceNormalization(c, s, b)", 12),
    "MaxPool": ("d = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (c)", 12),
    "AveragePool": ("d = AveragePool <kernel_shape = [2, 2]> (c)", 12),
    "Concat": ("r = Relu(c) d = Concat <axis = 1> (c, r)", 24),
    "residual": ("r = Conv <pads = [1, 1, 1, 1]> (c, k, b) d = Add(r, c)", 12),
    "depthwise": ("d = Conv <group = 12> (c, dw, b)", 12),
    "grouped": ("d = Conv <group = 3> (c, grouped, b)", 12),
    "transposed": ("d = ConvTranspose <strides = [2, 2]> (c, k, b)", 12),
    "transposed groups": ("d = ConvTranspose <group = 3> (c, grouped, b)", 12),
    "same padding": ('d = Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (c, k, b)', 12),
    "Slice": ("d = Slice(c, one, nine, one)", 8),
    "two slices": ("d = Slice(c, starts, ends, axes)", 8),
    "strided slice": ("d = Slice(c, one, twelve, one, two)", 6),
    "reversed": ("d = Slice(c, minus, least, one, minus)", 12),
    "Gather": ("d = Gather <axis = 1> (c, rows)", 5),
    "channel gate": ("g = GlobalAveragePool(c) h = Conv(g, pw, b) i = HardSigmoid(h) d = Mul(c, i)", 12),
    "shuffle": ("q = Reshape(c, apart) r = Transpose <perm = [0, 2, 1, 3, 4]> (q) d = Reshape(r, together)", 12),
    "DepthToSpace": ("d = DepthToSpace <blocksize = 2> (c)", 3),
    "DepthToSpace CRD": ('d = DepthToSpace <blocksize = 2, mode = "CRD"> (c)', 3),
    "SpaceToDepth": ("d = SpaceToDepth <blocksize = 2> (c)", 48),
    "PRelu": ("d = PRelu(c, slope)", 12),
    "scale by channel": ("d = Mul(c, slope)", 12),
    "divided by a constant": ("d = Div(c, positive)", 12),
    "Pad channels": ("d = Pad(c, widths)", 15),
    "Resize": ('d = Resize <mode = "nearest"> (c, , scales)', 12),
    "Resize to sizes": ('n = Shape(c) lead = Slice(n, zero, two) z = Concat <axis = 0> (lead, nines) '
                        'd = Resize <mode = "linear"> (c, , , z)', 12),
    "Tile": ("g = GlobalAveragePool(c) d = Tile(g, repeats)", 12),
    "Expand": ("g = GlobalAveragePool(c) d = Expand(g, large)", 12),
    "Where": ("m = Greater(c, slope) d = Where(m, c, slope)", 12),
    "LRN": ("r = Conv(c, k, b) d = Relu(r)", 12),
    "view by the batch": ("n = Shape(c) h = Gather(n, zero) j = Concat <axis = 0> (h, twelve, minus) q = Reshape(c, j) "
                          "d = Unsqueeze(q, last)", 12),
}  # fmt: skip
MORE = {
    **VECTOR,
    **weights(k=(12, 12, 3, 3), dw=(12, 1, 3, 3), grouped=(12, 4, 1, 1), pw=(12, 12, 1, 1), slope=(12, 1, 1)),
    **ints(one=[1], two=[2], nine=[9], twelve=[12], starts=[1, 0], ends=[9, 3], axes=[1, -1], minus=[-1], zero=[0]),
    **ints(least=[-(2**63) + 1], rows=[3, 1, 4, 8, 11], apart=[0, 3, 4, 4, 4], together=[0, 12, 4, 4], last=[3]),
    **ints(widths=[0, 1, 0, 0, 0, 2, 0, 0], repeats=[1, 1, 3, 2], large=[1, 12, 5, 5], nines=[9, 9]),
    "positive": np.linspace(0.5, 2, 12, dtype=np.float32).reshape(12, 1, 1),
    "scales": np.array([1, 1, 2, 2], np.float32),
}


@pytest.mark.parametrize("name", list(IMAGES))
def test_operators_on_images(name: str) -> None:
    body, width = IMAGES[name]
    used = {n: w for n, w in MORE.items() if n in body.replace("(", " ").replace(")", " ").replace(",", " ").split()}
    loaded = sl.load(images(body, width, more=used))
    assert loaded.adapter.free(loaded.native) == "batch"
    plan = exact(loaded)
    assert plan.parameters < 0.9 * plan.graph.size


TOKENS = {
    **{name: (f"u = {name}(t)", 12) for name in ("Gelu", "Mish", "Softmax", "LogSoftmax")},
    "LayerNormalization": ("u = LayerNormalization(t, s, b)", 12),
    "norm in parts": ("a = ReduceMean(t, last) d = Sub(t, a) q = Pow(d, two) v = ReduceMean(q, last) w = Add(v, eps) "
                      "z = Sqrt(w) n = Div(d, z) u = Mul(n, s)", 12),
    **{f"Reduce{name}": (f"r = Reduce{name}(t, last) u = Mul(t, r)", 12)
       for name in ("Mean", "Sum", "Max", "Min", "L1", "L2", "SumSquare", "LogSumExp", "Prod")},
    "mean over tokens": ("r = ReduceMean(t, middle) u = Add(t, r)", 12),
    "Split": ("g, h = Split <axis = -1> (t, halves) i = Sigmoid(g) u = Mul(i, h)", 6),
    "unequal parts": ("g, h = Split <axis = 2> (t, parts) u = Concat <axis = -1> (h, g)", 12),
    "heads": ("q = Reshape(t, heads) k = Transpose <perm = [0, 2, 1, 3]> (q) e = Transpose <perm = [0, 1, 3, 2]> (k) "
              "p = MatMul(k, e) a = Softmax(p) v = MatMul(a, k) w = Transpose <perm = [0, 2, 1, 3]> (v) "
              "u = Reshape(w, flat)", 12),
    "Einsum": ('p = Einsum <equation = "btc,bsc->bts"> (t, t) u = Einsum <equation = "bts,bsc->btc"> (p, t)', 12),
    "Einsum by a matrix": ('u = Einsum <equation = "btc,cd->btd"> (t, square)', 12),
    "Gather of one": ("g = Gather <axis = 1> (t, first) u = Unsqueeze(g, middle)", 12),
    "GatherND": ("g = GatherND(t, places) u = Unsqueeze(g, middle)", 12),
    "TopK": ("u, i = TopK <axis = 1> (t, three)", 12),
    "CumSum": ("u = CumSum(t, axis)", 12),
    "Squeeze": ("e = Unsqueeze(t, middle) u = Squeeze(e, middle)", 12),
}  # fmt: skip
TOKEN_MORE = {
    **VECTOR,
    **weights(square=(12, 12)),
    **ints(last=[-1], middle=[1], halves=[6, 6], parts=[5, 7], heads=[0, 6, 3, 4], flat=[0, 6, 12], first=2, axis=1),
    **ints(three=[3], places=[[0, 1], [1, 2], [1, 5]]),
    "two": np.float32(2),
    "eps": np.float32(1e-3),
}


@pytest.mark.parametrize("name", list(TOKENS))
def test_operators_on_tokens(name: str) -> None:
    body, width = TOKENS[name]
    words = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    opset = 20 if name == "Gelu" else 18
    used = {n: w for n, w in TOKEN_MORE.items() if n in words}
    loaded = sl.load(tokens(body, width, opset, used))
    exact(loaded)


@pytest.mark.parametrize("opset", [11, 13, 17])
def test_axes_as_attributes(opset: int) -> None:
    body = "r = ReduceMean <axes = [1], keepdims = 1> (c) q = Mul(c, r) h, g = Split <axis = 1, split = [5, 7]> (q) "
    if opset >= 13:
        body = "r = ReduceMean <axes = [1], keepdims = 1> (c) q = Mul(c, r) h, g = Split <axis = 1> (q, parts) "
    body += "d = Concat <axis = 1> (g, h)"
    exact(sl.load(images(body, 12, opset, ints(parts=[5, 7]) if opset >= 13 else None)))


def test_group_norm() -> None:
    vectors = {"gs": np.linspace(0.5, 2, 12, dtype=np.float32), "gb": np.linspace(-1, 1, 12, dtype=np.float32)}
    loaded = sl.load(images("d = GroupNormalization <num_groups = 3> (c, gs, gb)", 12, 21, vectors))
    assert {u.size for u in exact(loaded).units.units} == {3, 4}


def _frozen(proto: onnx.ModelProto) -> str:
    """Why nothing of a model can be pruned."""
    units = Units(sl.load(proto).graph)
    assert not units.units
    return " ".join(f.reason for f in units.frozen)


def test_what_has_no_rule_stays() -> None:
    assert "TfIdf" not in RULES and "NonZero" not in RULES
    turned = "t = Transpose <perm = [0, 2, 3, 1]> (c) q = LpNormalization <axis = 3> (t) "
    assert "LpNormalization" in _frozen(images(f"{turned} d = Transpose <perm = [0, 3, 1, 2]> (q)"))
    proto = images("d = com.microsoft.FastGelu(c)")
    proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    assert "com.microsoft" in _frozen(proto)
    assert "no rule" in _frozen(images("r = Relu(c) d = Det(r)", 12).__class__.FromString(_det()))


def _det() -> bytes:
    """A determinant over two dimensions of what a convolution makes."""
    body = "c = Conv(x, w, b) t = Transpose <perm = [0, 2, 3, 1]> (c) s = Slice(t, a, e, k) y = Det(s)"
    own = weights(w=(4, 3, 3, 3), b=(4,)) | ints(a=[0], e=[4], k=[1])
    return model(body, own, output="float[N,K] y").SerializeToString()


def test_numbers_of_the_batch_in_real_arithmetic() -> None:
    exact(sl.load(images("n = Shape(c) k = Cast <to = 1> (n) s = ReduceMean(k) d = Mul(c, s)")))


def test_graphs_inside_operators_freeze_what_they_read() -> None:
    body = """
    s = ReduceSum(x) z = Constant <value_float = 0.0> () q = Greater(s, z)
    e = If (q) <then_branch = a () => (float[N,12,4,4] i) { i = Mul(c, slope) },
                else_branch = b () => (float[N,12,4,4] j) { j = Neg(c) }> d = Relu(e)"""
    assert "If" in _frozen(images(body, 12, 18, weights(slope=(12, 1, 1))))


def test_embeddings_and_recurrent_layers() -> None:
    body = "e = Gather(table, x) t = Transpose <perm = [1, 0, 2]> (e) l, h = LSTM <hidden_size = 4> (t, w, r) "
    body += "s = Squeeze(h, zero) n = Relu(s) f = Gemm(n, a) y = Gemm(f, b)"
    own = weights(table=(9, 6), w=(1, 16, 6), r=(1, 16, 4), a=(4, 10), b=(10, 3)) | ints(zero=[0])
    plan = exact(sl.load(model(body, own, "int64[N,7] x")))
    assert sorted(u.size for u in plan.units.units) == [4, 6, 10]


def test_places_picked_row_by_row() -> None:
    body = "m = MatMul(x, first_w) t = Relu(m) g = GatherND <batch_dims = 1> (t, picks) y = MatMul(g, last_w)"
    own = weights(first_w=(8, 12), last_w=(12, 5)) | ints(picks=[[3], [1]])
    plan = exact(sl.load(model(body, own, "float[2,6,8] x")))
    assert sum(u.size for u in plan.units.units) == 12
