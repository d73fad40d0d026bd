"""What slimline knows of each aten operator: the neutral operator it is.

A rule reads a `Call` and emits neutral operators. `rule_for` finds it by overload (``aten.min.other``),
then by name (``aten.min``), then by the name without the underscore of in-place operators, which read as
their functional twins: they keep the shape, so axes pass in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import fx

from slimline.frameworks.torch.call import Call
from slimline.frameworks.torch.native import packet
from slimline.graph import ops

Rule = Callable[[Call], None]
RULES: dict[str, Rule] = {}


def rule_for(node: fx.Node) -> Rule:
    """The rule of an operator; `unknown` where there is none."""
    overload, name = str(node.target), packet(node)
    for key in (overload, name, name.rstrip("_")):
        if key in RULES:
            return RULES[key]
    return unknown


def unknown(call: Call, reason: str = "slimline has no rule for it") -> None:
    """Freeze every axis it touches."""
    call.emit("unknown", call.tensors(), ops.unknown(reason))


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule under ``aten.NAME`` for each name."""

    def register(function: Rule) -> Rule:
        RULES.update({f"aten.{name}": function for name in names})
        return function

    return register


def _elementwise(function: str, first_only: bool = False) -> Rule:
    def apply(call: Call) -> None:
        names = call.tensors()[:1] if first_only else call.tensors()
        call.emit("elementwise", names, ops.elementwise([call.shape(n) for n in names], function))

    return apply


_UNARY = """relu relu6 gelu silu sigmoid tanh hardswish hardsigmoid leaky_relu elu selu celu softplus mish
log_sigmoid exp exp2 expm1 log log1p log2 sqrt rsqrt abs neg sign square reciprocal sin cos erf floor ceil round
trunc bitwise_not logical_not isnan isinf hardshrink softshrink threshold nan_to_num"""
_BINARY = """add sub mul div rsub pow eq ne lt gt ge le logical_and logical_or logical_xor bitwise_and bitwise_or
bitwise_xor maximum minimum atan2 remainder floor_divide where masked_fill lerp addcmul addcdiv copy min.other
max.other expand_as"""
_IDENTITY = """dropout feature_dropout alpha_dropout contiguous clone to alias detach lift_fresh_copy lift_fresh
_to_copy type_as positive fake_quantize_per_tensor_affine"""
_FILLED = "zeros_like ones_like full_like empty_like fill zero bernoulli rand_like randn_like"

RULES |= {f"aten.{name}": _elementwise(name.partition(".")[0]) for name in (*_UNARY.split(), *_BINARY.split())}
RULES |= {f"aten.{name}": _elementwise("identity", first_only=True) for name in _IDENTITY.split()}
RULES |= {f"aten.{name}": _elementwise("fill", first_only=True) for name in _FILLED.split()}


@rule("hardtanh", "clamp", "clamp_min", "clamp_max", "clip")
def _clip(call: Call) -> None:
    suffix = "_val" if call.target.startswith("aten.hardtanh") else ""
    low, high = (call[f"{end}{suffix}"] if call.takes(f"{end}{suffix}") else None for end in ("min", "max"))
    function = "relu6" if (low, high) == (0, 6) else "relu" if (low, high) == (0, None) else "clip"
    _elementwise(function)(call)


@rule("prelu")
def _prelu(call: Call) -> None:
    axis = 1 if call.rank > 1 else 0
    names = call.tensors("self", "weight")
    if call.shape(names[1]) == (1,):
        return _elementwise("prelu")(call)
    return call.emit("elementwise", names, _along(call.rank, [axis], "prelu"))


@rule("fake_quantize_per_channel_affine")
def _fake_quantize(call: Call) -> None:
    names = call.tensors("self", "scale", "zero_point")
    call.emit("elementwise", names, _along(call.rank, [call.axis("axis")] * 2, "identity"))


def _along(rank: int, axes: Sequence[int], function: str) -> ops.Attributes:
    """Element-wise with vectors along one dimension each."""
    x = " ".join(f"a{d}" for d in range(rank))
    vectors = ", ".join(f"a{d}" for d in axes)
    return {"equation": ops.parse(f"{x}, {vectors} -> {x}"), "function": function}


@rule("_weight_norm")
def _weight_norm(call: Call) -> None:
    axes = [f"a{d}" for d in range(call.rank)]
    dim = call.axis("dim")
    gain = " ".join(a if d == dim else "1" for d, a in enumerate(axes))
    text = f"{' '.join(axes)}, {gain} -> {' '.join(axes)}"
    attributes = {"equation": ops.parse(text), "function": "weight_norm"}
    call.emit("elementwise", call.tensors("v", "g"), attributes)


# -- layers with weights ---------------------------------------------------------------


def _conv(spatial: int, transposed: bool = False) -> Rule:
    def apply(call: Call) -> None:
        if call.rank != spatial + 2:
            return unknown(call, "an input without a batch dimension")
        attributes = ops.conv(spatial, int(call["groups"]), transposed)
        return call.emit("conv", call.tensors("input", "weight", "bias"), attributes)

    return apply


RULES |= {f"aten.conv{n}d": _conv(n) for n in (1, 2, 3)}
RULES |= {f"aten.conv_transpose{n}d": _conv(n, transposed=True) for n in (1, 2, 3)}


@rule("convolution")
def _convolution(call: Call) -> None:
    _conv(call.rank - 2, bool(call["transposed"]))(call)


@rule("linear")
def _linear(call: Call) -> None:
    call.emit("linear", call.tensors("input", "weight", "bias"), ops.linear(call.rank))


@rule("addmm")
def _addmm(call: Call) -> None:
    bias, left, right = call.tensors("self", "mat1", "mat2")
    if call["beta"] != 1 or call["alpha"] != 1 or len(call.shape(bias)) != 1:
        return unknown(call)
    return call.emit("linear", (left, right, bias), ops.linear(2, "i o"))


@rule("batch_norm")
def _batch_norm(call: Call) -> None:
    names = call.tensors("input", "weight", "bias", "running_mean", "running_var")
    call.emit("batch_norm", names, ops.batch_norm(call.rank))


@rule("layer_norm", "rms_norm")
def _layer_norm(call: Call) -> None:
    axes = range(call.rank - len(call["normalized_shape"]), call.rank)
    if call.target == "aten.rms_norm":
        names, attributes = call.tensors("input", "weight"), ops.layer_norm(call.rank, axes, 1, "rms")
    else:
        names, attributes = call.tensors("input", "weight", "bias"), ops.layer_norm(call.rank, axes)
    call.emit("layer_norm", names, attributes)


@rule("group_norm")
def _group_norm(call: Call) -> None:
    call.emit("group_norm", call.tensors("input", "weight", "bias"), ops.group_norm(call.rank, call["num_groups"]))


@rule("instance_norm")
def _instance_norm(call: Call) -> None:
    if not call["use_input_stats"]:
        return _batch_norm(call)
    if call.tensor("running_mean") is not None:
        return unknown(call, "it updates statistics while it normalises by the input's")
    names = call.tensors("input", "weight", "bias")
    return call.emit("group_norm", names, ops.group_norm(call.rank, call.input[1]))


@rule("embedding")
def _embedding(call: Call) -> None:
    names = call.tensors("indices", "weight")
    call.emit("embedding", names, ops.embedding(len(call.shape(names[0]))))


# -- products --------------------------------------------------------------------------


@rule("matmul", "bmm", "mm")
def _matmul(call: Call) -> None:
    names = call.tensors("self", "mat2" if call.target != "aten.matmul" else "other")
    shapes = [call.shape(n) for n in names]
    if min(map(len, shapes)) < 2:
        return unknown(call, "a product with a vector")
    return call.emit("matmul", names, ops.matmul(*shapes))


@rule("baddbmm")
def _baddbmm(call: Call) -> None:
    names = call.tensors("batch1", "batch2")
    product = call.between("matmul", names, ops.matmul(*(call.shape(n) for n in names)), call.output)
    both = [call.tensor("self"), product]
    call.emit("elementwise", both, ops.elementwise([call.shape(n) for n in both], "add"))


@rule("einsum")
def _einsum(call: Call) -> None:
    text = str(call["equation"]).replace(" ", "")
    names = [call.value(n) for n in call["tensors"]]
    terms = text.partition("->")[0].split(",")
    if "->" not in text or "." in text or any(len(set(t)) < len(t) for t in terms):
        return unknown(call, f"the equation {text}")
    return call.emit("einsum", names, ops.einsum(text, any(n.op == "get_attr" for n in call["tensors"])))


@rule("scaled_dot_product_attention")
def _attention(call: Call) -> None:
    names = call.tensors("query", "key", "value", "attn_mask")
    query, key, value = (call.shape(n) for n in names[:3])
    if not query[:-2] == key[:-2] == value[:-2]:
        return unknown(call, "heads that are shared or broadcast")
    mask = call.shape(names[3]) if names[3] is not None else None
    return call.emit("attention", names if mask is not None else names[:3], ops.attention(len(query), mask))


# -- reductions, pooling, softmax --------------------------------------------------------

_REDUCTIONS = {
    "mean": "mean", "sum": "sum", "amax": "max", "amin": "min", "max": "max", "min": "min",
    "linalg_vector_norm": "norm", "norm": "norm", "logsumexp": "logsumexp",
}  # fmt: skip


@rule(*_REDUCTIONS)
def _reduce(call: Call) -> None:
    if len(call.outputs) > 1:
        return unknown(call, "it answers with positions")
    axes = call.axes() if call.takes("dim") else list(range(call.rank))
    keep = bool(call["keepdim"]) if call.takes("keepdim") else False
    function = _REDUCTIONS[call.target.removeprefix("aten.")]
    return call.emit("reduce", call.tensors()[:1], ops.reduce(call.rank, axes, keep, function))


@rule("softmax", "_softmax", "log_softmax", "_log_softmax")
def _softmax(call: Call) -> None:
    call.emit("softmax", call.tensors("self"), ops.softmax(call.rank, call.axis()))


def _whole(function: str, axes: Callable[[Call], Sequence[int]]) -> Rule:
    """An operator that takes some dimensions whole and leaves the others alone."""

    def apply(call: Call) -> None:
        if len(call.outputs) > 1:
            return unknown(call, "it answers with positions")
        return call.emit("pool", call.tensors()[:1], ops.pool(call.rank, list(axes(call)), function))

    return apply


def _last(count: int) -> Callable[[Call], Sequence[int]]:
    return lambda call: range(call.rank - count, call.rank)


for _n in (1, 2, 3):
    RULES |= {f"aten.{name}_pool{_n}d": _whole("max", _last(_n)) for name in ("max", "adaptive_max")}
    RULES |= {f"aten.{name}_pool{_n}d": _whole("mean", _last(_n)) for name in ("avg", "adaptive_avg")}
for _name, _n in {"linear1d": 1, "nearest1d": 1, "bilinear2d": 2, "nearest2d": 2, "bicubic2d": 2,
                  "trilinear3d": 3, "nearest3d": 3, "_nearest_exact2d": 2}.items():  # fmt: skip
    RULES[f"aten.upsample_{_name}"] = _whole("resize", _last(_n))
RULES |= {f"aten.{name}": _whole("other", _last(2)) for name in ("tril", "triu")}
RULES |= {f"aten.{name}": _whole("other", lambda call: [call.axis()]) for name in ("cumsum", "cumprod")}
RULES["aten.roll"] = _whole("other", lambda call: call.axes("dims"))
RULES["aten.flip"] = _whole("other", lambda call: call.axes("dims"))


@rule("grid_sampler", "grid_sampler_2d")
def _grid_sampler(call: Call) -> None:
    dots = " ".join("." * (call.rank - 2))
    equation = ops.parse(f"b c {dots}, b {dots} . -> b c {dots}")
    call.emit("pool", call.tensors("input", "grid"), {"equation": equation, "function": "resize"})


# -- shapes ------------------------------------------------------------------------------


@rule(
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view", "view_as", "reshape_as", "ravel"
)
def _reshape(call: Call) -> None:
    call.emit("reshape", call.tensors()[:1], ops.reshape(call.input, call.output))


@rule("permute", "movedim", "transpose", "swapaxes", "swapdims", "t", "numpy_T", "mT", "adjoint")
def _permute(call: Call) -> None:
    rank, name = call.rank, call.target.removeprefix("aten.").rstrip("_")
    order = list(range(rank))
    if name == "permute":
        order = call.axes("dims")
    elif name == "movedim":
        sources, targets = ([x] if isinstance(x, int) else x for x in (call["source"], call["destination"]))
        pairs = sorted((t % rank, s % rank) for s, t in zip(sources, targets, strict=True))
        order = [d for d in order if d not in {s for _, s in pairs}]
        for target, source in pairs:
            order.insert(target, source)
    elif name in ("t", "numpy_T"):
        order.reverse()
    elif rank:
        first, second = {"swapaxes": ("axis0", "axis1")}.get(name, ("dim0", "dim1"))
        a, b = (rank - 2, rank - 1) if name in ("mT", "adjoint") else (call.axis(first), call.axis(second))
        order[a], order[b] = order[b], order[a]
    call.emit("permute", call.tensors()[:1], ops.permute(order))


@rule("expand")
def _expand(call: Call) -> None:
    call.emit("expand", call.tensors("self"), ops.expand(call.input, call.output))


@rule("repeat", "tile", "repeat_interleave")
def _repeat(call: Call) -> None:
    """Copies of a dimension: around it (``repeat``) or of each position (``repeat_interleave``)."""
    name = call.target.removeprefix("aten.")
    if name == "repeat_interleave" and (
        call.tensor("self") is None or call["dim"] is None or call.value(call["repeats"])
    ):
        return unknown(call)
    before, after = call.input, call.output
    offset = len(after) - len(before)
    ins, outs, sizes = [], [], {}
    for d, n in enumerate(after):
        old = before[d - offset] if d >= offset else 1
        copies, axis = n // old, f"a{d}"
        if d >= offset:
            ins.append("1" if old == 1 and copies > 1 else axis)
        if copies == 1:
            outs.append(axis if d >= offset else ".")
        elif old == 1:
            outs.append(".")
        else:
            sizes[f"n{d}"] = copies
            outs.append(f"({axis} n{d})" if name == "repeat_interleave" else f"(n{d} {axis})")
    equation = ops.parse(f"{' '.join(ins)} -> {' '.join(outs)}", sizes)
    return call.emit("expand", call.tensors("self"), {"equation": equation})


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
def _shuffle(call: Call) -> None:
    name = call.target.removeprefix("aten.")
    lead = " ".join(f"a{d}" for d in range(call.rank - 3))
    if name == "channel_shuffle":
        spatial = " ".join("." for _ in range(call.rank - 2))
        equation = ops.parse(f"b (g c) {spatial} -> b (c g) {spatial}", {"g": call["groups"]})
    else:
        factor = call["upscale_factor" if name == "pixel_shuffle" else "downscale_factor"]
        deep, wide = f"{lead} (c p q) h w", f"{lead} c (h p) (w q)"
        text = f"{deep} -> {wide}" if name == "pixel_shuffle" else f"{wide} -> {deep}"
        fixed = dict.fromkeys("pq", "pixels are made of it")
        equation = ops.parse(text, {"p": factor, "q": factor}, fixed=fixed)
    call.emit("reshape", call.tensors()[:1], {"equation": equation})


# -- positions ----------------------------------------------------------------------------


@rule("cat", "concat", "concatenate")
def _cat(call: Call) -> None:
    names = [call.value(n) for n in call["tensors"]]
    rank = len(call.output)
    names = [n for n in names if len(call.shape(n)) == rank]  # torch skips empty tensors of rank 1
    call.emit("concat", names, ops.concat(call.axis(rank=rank)))


@rule("stack")
def _stack(call: Call) -> None:
    axis = call.axis(rank=len(call.output))
    parts = []
    for node in call["tensors"]:
        name = call.value(node)
        before = call.shape(name)
        after = (*before[:axis], 1, *before[axis:])
        parts.append(call.between("reshape", [name], ops.reshape(before, after), after))
    call.emit("concat", parts, ops.concat(axis))


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_chunk", "unsafe_split")
def _split(call: Call) -> None:
    axis = call.axis()
    call.emit("split", call.tensors()[:1], ops.split(axis, [call.shape(n)[axis] for n in call.outputs]))


@rule("unbind")
def _unbind(call: Call) -> None:
    for index, output in enumerate(call.outputs):
        call.emit("select", call.tensors()[:1], ops.select(call.axis(), index), (output,))


@rule("glu")
def _glu(call: Call) -> None:
    axis, half = call.axis(), call.output
    parts = [
        call.between("slice", call.tensors()[:1], ops.slice_(axis, k * half[axis], (k + 1) * half[axis]), half)
        for k in (0, 1)
    ]
    call.emit("elementwise", parts, ops.elementwise([half, half], "glu"))


@rule("slice", "narrow")
def _slice(call: Call) -> None:
    axis = call.axis()
    size = call.input[axis]
    if call.target == "aten.narrow":
        start = int(call["start"]) % size
        span = range(start, start + int(call["length"]))
    else:
        span = range(size)[slice(call["start"], call["end"], call["step"])]
    call.emit("slice", call.tensors()[:1], ops.slice_(axis, span.start, max(span.stop, span.start), span.step))


@rule("select")
def _select(call: Call) -> None:
    axis = call.axis()
    call.emit("select", call.tensors()[:1], ops.select(axis, int(call["index"]) % call.input[axis]))


@rule("pad", "constant_pad_nd")
def _pad(call: Call) -> None:
    flat = [int(n) for n in call["pad"]]
    pairs = [(flat[i], flat[i + 1]) for i in range(0, len(flat), 2)]
    widths = [(0, 0)] * (call.rank - len(pairs)) + pairs[::-1]
    constant = call.target == "aten.constant_pad_nd" or call["mode"] == "constant"
    if constant and not call["value"]:
        return call.emit("pad", call.tensors()[:1], ops.pad(widths))
    return _whole("other", lambda _: [d for d, w in enumerate(widths) if any(w)])(call)


@rule("index", "index_select")
def _index(call: Call) -> None:
    """One index tensor; its dimensions take the place of the one it picks from."""
    if call.target == "aten.index":
        given = [(d, n) for d, n in enumerate(call["indices"]) if n is not None]
        if len(given) != 1:
            return unknown(call, "several index tensors")
        axis, node = given[0]
    else:
        axis, node = call.axis(), call["index"]
    index = call.value(node)
    shape = call.shape(index)
    picked = call.constant(node)
    if call.rank + len(shape) - 1 != len(call.output) or (picked is not None and picked.dtype == bool):
        return unknown(call, "a mask as index")
    if picked is not None and picked.ndim == 1:
        rows = np.where(picked < 0, picked + call.input[axis], picked)
        if len(np.unique(rows)) == len(rows):
            return call.emit("take", call.tensors("self"), ops.take(axis, rows.tolist()))
    names = [f"a{d}" for d in range(call.rank)]
    before = " ".join("." if d == axis else n for d, n in enumerate(names))
    dots = ["."] * len(shape)
    after = " ".join([*names[:axis], *dots, *names[axis + 1 :]])
    equation = ops.parse(f"{before}, {' '.join(dots)} -> {after}")
    return call.emit("pool", [call.tensor("self"), index], {"equation": equation, "function": "other"})


# -- tensors from nothing -------------------------------------------------------------------


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "scalar_tensor")
def _make(call: Call) -> None:
    call.emit("make", (), ops.make())


@rule("arange", "linspace", "eye", "rand", "randn")
def _positions(call: Call) -> None:
    call.emit("unknown", (), ops.unknown("its numbers depend on their position"))


def constant(call: Call) -> None:
    """Integers that neither the inputs nor the weights decide, such as positions or a causal mask."""
    call.emit("unknown", (), ops.unknown("a constant"))


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def _recurrent(call: Call) -> None:
    unknown(call, "slimline does not prune recurrent layers yet")
