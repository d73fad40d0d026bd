"""Rules of the operators that compute: element-wise functions, layers, products, reductions, pooling."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_letters

from slimline.frameworks.torch.call import Call
from slimline.frameworks.torch.registry import RULES, Rule, each, elementwise, rule, unknown
from slimline.graph import ops
from slimline.graph.equation import Equation, Window, parse

_UNARY = """relu relu6 gelu silu sigmoid tanh hardswish hardsigmoid leaky_relu elu selu celu softplus mish
log_sigmoid rrelu exp exp2 expm1 log log1p log2 sqrt rsqrt abs neg sign square reciprocal sin cos erf floor ceil round
trunc bitwise_not logical_not isnan isinf hardshrink softshrink threshold nan_to_num"""
_COMPLEX = "real imag angle conj _conj conj_physical resolve_conj resolve_neg complex polar"
_BINARY = """sub mul div rsub pow eq ne lt gt ge le logical_and logical_or logical_xor bitwise_and bitwise_or
bitwise_xor maximum minimum atan2 remainder floor_divide where masked_fill lerp addcmul addcdiv copy min.other
max.other expand_as"""
_IDENTITY = """dropout feature_dropout alpha_dropout contiguous clone to alias detach lift_fresh_copy lift_fresh
_to_copy type_as positive fake_quantize_per_tensor_affine"""
_FILLED = "zeros_like ones_like full_like empty_like fill zero bernoulli rand_like randn_like"

_ALIASES = {
    "multiply": "mul", "divide": "div", "true_divide": "div", "subtract": "sub", "absolute": "abs", "negative": "neg",
    "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le", "not_equal": "ne",
}  # fmt: skip
_PLAIN = f"{_UNARY} {_BINARY} {_COMPLEX}".split()
RULES |= {f"aten.{name}": elementwise(name.partition(".")[0]) for name in _PLAIN}
RULES |= {f"aten.{alias}": RULES[f"aten.{name}"] for alias, name in _ALIASES.items()}
RULES |= {f"aten.{name}": elementwise("identity", first_only=True) for name in _IDENTITY.split()}
RULES |= {f"aten.{name}": elementwise("fill", first_only=True) for name in _FILLED.split()}


@rule("add")
def _add(call: Call) -> None:
    scaled = call.takes("alpha") and call["alpha"] != 1
    elementwise("add_scaled" if scaled else "add")(call)


@rule("hardtanh", "clamp", "clamp_min", "clamp_max", "clip")
def _clip(call: Call) -> None:
    suffix = "_val" if call.target.startswith("aten.hardtanh") else ""
    low, high = (call[f"{end}{suffix}"] if call.takes(f"{end}{suffix}") else None for end in ("min", "max"))
    function = "relu6" if (low, high) == (0, 6) else "relu" if (low, high) == (0, None) else "clip"
    elementwise(function)(call)


@rule("prelu")
def _prelu(call: Call) -> None:
    axis = 1 if call.rank > 1 else 0
    names = call.tensors("self", "weight")
    if call.shape(names[1]) == (1,):
        return elementwise("prelu")(call)
    return call.emit("elementwise", names, _along(call.rank, [axis], "prelu"))


@rule("fake_quantize_per_channel_affine")
def _fake_quantize(call: Call) -> None:
    names = call.tensors("self", "scale", "zero_point")
    call.emit("elementwise", names, _along(call.rank, [call.axis("axis")] * 2, "identity"))


def _along(rank: int, axes: Sequence[int], function: str) -> ops.Attributes:
    """Element-wise with vectors along one dimension each."""
    x = " ".join(f"a{d}" for d in range(rank))
    vectors = ", ".join(f"a{d}" for d in axes)
    return {"equation": parse(f"{x}, {vectors} -> {x}"), "function": function}


@rule("_weight_norm")
def _weight_norm(call: Call) -> None:
    axes = [f"a{d}" for d in range(call.rank)]
    dim = call.axis("dim")
    gain = " ".join(a if d == dim else "1" for d, a in enumerate(axes))
    text = f"{' '.join(axes)}, {gain} -> {' '.join(axes)}"
    attributes = {"equation": parse(text), "function": "weight_norm"}
    call.emit("elementwise", call.tensors("v", "g"), attributes)


# -- layers with weights ---------------------------------------------------------------


def _window(call: Call, spatial: int) -> Window:
    padding = call["padding"]
    if padding == "valid":
        padding = 0
    zeros = padding if isinstance(padding, str) else tuple((p, p) for p in each(padding, spatial))
    return Window(each(call["stride"], spatial), each(call["dilation"], spatial), zeros)


def _pointwise(call: Call) -> bool:
    """Whether a kernel of one position goes over one dimension as it is: a linear layer, whose rows may lose some."""
    window = _window(call, 1)
    single = call.shape(call.tensor("weight"))[2:] == (1,) and window.stride == (1,)
    return single and window.zeros((1,), (1,)) == [(0, 0)]


def _conv(spatial: int, transposed: bool = False) -> Rule:
    def apply(call: Call) -> None:
        if call.rank != spatial + 2:
            return unknown(call, "an input without a batch dimension")
        groups = int(call["groups"])
        if transposed:
            attributes = ops.conv(spatial, groups, transposed=True)
        elif spatial == 1 and _pointwise(call):
            attributes = ops.conv(1, groups, pointwise=True)
        else:
            attributes = ops.conv(spatial, groups, window=_window(call, spatial))
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
    call.emit("batch_norm", names, ops.batch_norm(call.rank, tracked=names[3] is not None, epsilon=call["eps"]))


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


@rule("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")
def _embedding_bag(call: Call) -> None:
    """Rows of a table, summed or averaged bag by bag; the other outputs count and place them."""
    names = call.tensors("indices", "weight")
    fixed = {"v": "rows are chosen by the model's input"}
    call.emit("embedding", names, {"equation": parse("., v e -> . e", fixed=fixed)}, call.outputs[:1])
    for output in call.outputs[1:]:
        call.emit("unknown", (), ops.unknown("it counts rows"), (output,))


@rule("embedding")
def _embedding(call: Call) -> None:
    names = call.tensors("indices", "weight")
    call.emit("embedding", names, ops.embedding(len(call.shape(names[0]))))


# -- products --------------------------------------------------------------------------


_SECOND = {"matmul": "other", "bmm": "mat2", "mm": "mat2", "mv": "vec", "dot": "tensor", "vdot": "other"}


@rule(*_SECOND)
def _matmul(call: Call) -> None:
    names = call.tensors("self", _SECOND[call.target.removeprefix("aten.")])
    call.emit("matmul", names, ops.matmul(*(call.shape(n) for n in names)))


@rule("baddbmm")
def _baddbmm(call: Call) -> None:
    names = call.tensors("batch1", "batch2")
    product = call.between("matmul", names, ops.matmul(*(call.shape(n) for n in names)), call.output)
    both = [call.tensor("self"), product]
    call.emit("elementwise", both, ops.elementwise([call.shape(n) for n in both], "add"))


@rule("einsum")
def _einsum(call: Call) -> None:
    names = [call.value(n) for n in call["tensors"]]
    text = _spelled(str(call["equation"]).replace(" ", ""), [call.shape(n) for n in names])
    terms = text.partition("->")[0].split(",")
    if "." in text or any(len(set(t)) < len(t) for t in terms):
        return unknown(call, f"the equation {text}")
    return call.emit("einsum", names, ops.einsum(text, any(n.op == "get_attr" for n in call["tensors"])))


def _spelled(text: str, shapes: Sequence[tuple[int, ...]]) -> str:
    """An einsum with its output, and with letters for its dots where these are the same sizes everywhere."""
    left, arrow, right = text.partition("->")
    terms = left.split(",")
    hidden = [
        s[t.index("...") : len(s) - len(t) + t.index("...") + 3]
        for t, s in zip(terms, shapes, strict=True)
        if "..." in t
    ]
    if not arrow:
        right = "..." * bool(hidden) + "".join(sorted(c for c in {*left} - {*".,"} if left.count(c) == 1))
    if len(set(hidden)) == 1:
        spare = [c for c in ascii_letters if c not in left]
        dots = "".join(spare[: len(hidden[0])])
        left, right = left.replace("...", dots), right.replace("...", dots)
    return f"{left}->{right}"


@rule("outer")
def _outer(call: Call) -> None:
    names = call.tensors("self", "vec2")
    call.emit("elementwise", names, {"equation": parse("i, j -> i j"), "function": "outer"})


def _experts(call: Call) -> None:
    """Runs of rows, each times one of several matrices: experts that a router has chosen."""
    equation = parse("n i, e i o, . -> n o", fixed={"e": "one is chosen for each row"})
    call.emit("experts", call.tensors("input", "weight", "offs"), {"equation": equation})


RULES["transformers.grouped_mm_fallback"] = _experts


@rule("bilinear")
def _bilinear(call: Call) -> None:
    lead = " ".join(f"a{d}" for d in range(call.rank - 1))
    equation = parse(f"{lead} i, {lead} j, o i j, o -> {lead} o")
    call.emit("bilinear", call.tensors("input1", "input2", "weight", "bias"), {"equation": equation})


@rule("cosine_similarity")
def _cosine_similarity(call: Call) -> None:
    names = call.tensors("x1", "x2")
    rank = len(call.output) + 1
    if not all(len(call.shape(n)) == rank for n in names):
        return unknown(call, "tensors of different ranks")
    product = ops.elementwise([call.shape(n) for n in names], "mul")["equation"]
    axis = call.axis("dim", rank)
    after = product.outputs[0][:axis] + product.outputs[0][axis + 1 :]
    equation = Equation(product.inputs, (after,), statistics=product.outputs[0][axis])
    return call.emit("matmul", names, {"equation": equation})


@rule("scaled_dot_product_attention")
def _attention(call: Call) -> None:
    names = call.tensors("query", "key", "value", "attn_mask")
    query, key, value = (call.shape(n) for n in names[:3])
    mask = call.shape(names[3]) if names[3] is not None else None
    if call["enable_gqa"] and mask is None and len(query) == 4 and query[0] == key[0] and key[:2] == value[:2]:
        equation = parse("b (k r) l d, b k s d, b k s e -> b (k r) l e", {"k": key[1]}, statistics=("d", "s"))
        return call.emit("attention", names[:3], {"equation": equation})
    if not len(query) == len(key) == len(value) or key[:-2] != value[:-2]:
        return unknown(call, "queries, keys and values of different ranks")
    shared = [d for d, (q, k) in enumerate(zip(query[:-2], key[:-2], strict=True)) if q != k]
    if any(key[d] != 1 for d in shared):
        return unknown(call, "heads that are repeated")
    return call.emit("attention", names if mask is not None else names[:3], ops.attention(len(query), mask, shared))


# -- reductions, pooling, softmax --------------------------------------------------------

_REDUCTIONS = {
    "mean": "mean", "sum": "sum", "amax": "max", "amin": "min", "max": "max", "min": "min",
    "linalg_vector_norm": "norm", "norm": "norm", "logsumexp": "logsumexp", "prod": "prod",
    **{name: name for name in ("var", "std", "var_mean", "std_mean")},
}  # fmt: skip


@rule(*_REDUCTIONS)
def _reduce(call: Call) -> None:
    function = _REDUCTIONS[call.target.removeprefix("aten.")]
    if len(call.outputs) > 1 and function in ("max", "min") and call.reads(1):
        return _ranked(call)
    axes, keep = _reduced(call)
    return call.emit("reduce", call.tensors()[:1], ops.reduce(call.rank, axes, keep, function, len(call.outputs)))


def _reduced(call: Call) -> tuple[list[int], bool]:
    axes = call.axes() if call.takes("dim") else list(range(call.rank))
    return axes, bool(call["keepdim"]) if call.takes("keepdim") else False


@rule("any", "all", "argmax", "argmin", "median", "mode", "kthvalue", "aminmax", "count_nonzero")
def _whole_reduction(call: Call) -> None:
    """Reductions that cannot leave a position out: what they reduce stays whole, all other axes pass."""
    axes, keep = _reduced(call)
    names = [f"a{d}" for d in range(call.rank)]
    after = [("." if d in axes else n) for d, n in enumerate(names) if keep or d not in axes]
    before = ["." if d in axes else n for d, n in enumerate(names)]
    text = f"{' '.join(before)} -> {', '.join([' '.join(after)] * len(call.outputs))}"
    call.emit("pool", call.tensors()[:1], {"equation": parse(text), "function": "other"})


@rule("sort", "topk", "argsort", "cummax", "cummin")
def _ranked(call: Call) -> None:
    """Values or positions ranked along one dimension, which stays whole where positions are read."""
    if call.rank == len(call.output):
        axis = call.axis()
        x = " ".join("." if d == axis else f"a{d}" for d in range(call.rank))
        equation = parse(f"{x} -> {', '.join([x] * len(call.outputs))}")
        return call.emit("pool", call.tensors()[:1], {"equation": equation, "function": "other"})
    return _whole_reduction(call)


@rule("softmax", "_softmax", "log_softmax", "_log_softmax")
def _softmax(call: Call) -> None:
    call.emit("softmax", call.tensors("self"), ops.softmax(call.rank, call.axis()))
