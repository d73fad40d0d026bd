"""Rules of the operators that compute: element-wise functions, layers, products, reductions, pooling."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from slimline.frameworks.base import Array
from slimline.frameworks.onnx.call import Call
from slimline.frameworks.onnx.operators import biased, scalar
from slimline.frameworks.onnx.registry import RULES, Rule, elementwise, rule, unknown, whole
from slimline.graph import ops
from slimline.graph.equation import Window, parse
from slimline.graph.recurrent import stacked

_PLAIN = """Abs Acos Acosh Asin Asinh Atan Atanh Ceil Cos Cosh Erf Exp Floor Log Neg Reciprocal Round Sign Sin Sinh Sqrt
Tan Tanh Sigmoid Relu Elu Celu Selu Softplus Softsign Mish Gelu Shrink Sub Div Pow Mod And Or Xor Not Equal Greater Less
Where Mul PRelu Swish BitwiseAnd BitwiseOr BitwiseXor BitwiseNot BitShift"""
_FUNCTIONS = {
    **{name: name.lower() for name in _PLAIN.split()},
    "Add": "add", "Sum": "add", "Mean": "average", "Max": "maximum", "Min": "minimum", "HardSigmoid": "hardsigmoid",
    "HardSwish": "hardswish", "LeakyRelu": "leaky_relu", "ThresholdedRelu": "threshold", "IsInf": "isinf",
    "IsNaN": "isnan", "GreaterOrEqual": "ge", "LessOrEqual": "le",
}  # fmt: skip
RULES |= {name: elementwise(function) for name, function in _FUNCTIONS.items()}
RULES |= {
    name: elementwise("identity", first_only=True)
    for name in ("Identity", "Dropout", "Cast", "CastLike", "QuantizeLinear", "DequantizeLinear")
}


@rule("Add")
def _add(call: Call) -> None:
    """A sum, or a product and its bias."""
    product = biased(call.node)
    if product is None:
        return elementwise("add")(call)
    x, weight = (None if v is None else str(v.name) for v in product.inputs[:2])
    bias = next(v for v in call.node.inputs if v is not None and v.producer() is not product)
    return call.emit("linear", [x, weight, str(bias.name)], ops.linear(len(call.output), "i o"))


@rule("Clip")
def _clip(call: Call) -> None:
    low, high = (scalar(call.constant(index)) for index in (1, 2))
    absent = [call.value(index) is None for index in (1, 2)]
    function = "relu6" if (low, high) == (0, 6) else "relu" if low == 0 and absent[1] else "clip"
    elementwise(function, first_only=True)(call)


# -- layers with weights ---------------------------------------------------------------


def _window(call: Call, spatial: int) -> Window | None:
    if call.attribute("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None
    pads = call.attribute("pads", [0] * 2 * spatial)
    ones = [1] * spatial
    strides, dilations = call.attribute("strides", ones), call.attribute("dilations", ones)
    return Window(tuple(strides), tuple(dilations), tuple(zip(pads[:spatial], pads[spatial:], strict=True)))


@rule("Conv", "ConvTranspose")
def _conv(call: Call) -> None:
    spatial, groups = call.rank - 2, int(call.attribute("group", 1))
    if spatial < 1:
        return unknown(call, "an input without spatial dimensions")
    names = call.tensors(0, 1, 2)
    if call.node.op_type == "ConvTranspose":
        return call.emit("conv", names, ops.conv(spatial, groups, transposed=True))
    window = _window(call, spatial)
    single = spatial == 1 and call.shape(names[1])[2:] == (1,)
    if single and window == Window((1,), window.dilation if window else (1,), ((0, 0),)):
        return call.emit("conv", names, ops.conv(1, groups, pointwise=True))
    return call.emit("conv", names, ops.conv(spatial, groups, window=window))


@rule("Gemm")
def _gemm(call: Call) -> None:
    names = call.tensors(0, 1, 2)
    scaled = call.attribute("alpha", 1.0) != 1 or (names[2] is not None and call.attribute("beta", 1.0) != 1)
    bias = None if names[2] is None else call.shape(names[2])
    if scaled or call.attribute("transA", 0) or (bias is not None and bias != (call.output[1],)):
        return unknown(call, "a scaled, turned or broadcast product")
    turned = bool(call.attribute("transB", 0))
    return call.emit("linear", names, ops.linear(2, "o i" if turned else "i o"))


@rule("MatMul")
def _matmul(call: Call) -> None:
    names = call.tensors(0, 1)
    left, right = (call.shape(n) for n in names)
    if call.is_stored(1) and not call.is_stored(0) and len(right) == 2 and len(left) > 1:
        return call.emit("linear", [*names, None], ops.linear(len(left), "i o"))
    return call.emit("matmul", names, ops.matmul(left, right))


@rule("BatchNormalization")
def _batch_norm(call: Call) -> None:
    if call.attribute("training_mode", 0):
        return unknown(call, "it is in training mode")
    return call.emit(
        "batch_norm", call.tensors(0, 1, 2, 3, 4), ops.batch_norm(call.rank, epsilon=call.attribute("epsilon", 1e-5))
    )


@rule("LayerNormalization", "RMSNormalization")
def _layer_norm(call: Call) -> None:
    axis = call.axis(-1)
    names = call.tensors(0, 1, 2) if call.node.op_type == "LayerNormalization" else call.tensors(0, 1)
    if any(n is not None and call.shape(n) != call.input[axis:] for n in names[1:]):
        return unknown(call, "a scale of another shape than what it normalises")
    if any(o.uses() for o in call.node.outputs[1:]):
        return unknown(call, "its mean is read")
    kind = "layer" if len(names) == 3 else "rms"
    attributes = ops.layer_norm(call.rank, range(axis, call.rank), len(names) - 1, kind)
    return call.emit("layer_norm", names, attributes, call.outputs[:1])


@rule("InstanceNormalization", "GroupNormalization")
def _group_norm(call: Call) -> None:
    names = call.tensors(0, 1, 2)
    single = call.node.op_type == "InstanceNormalization"
    groups = call.input[1] if single else int(call.attribute("num_groups"))
    places = [f"a{d}" for d in range(2, call.rank)]
    x = " ".join(["a0", "(g c)", *places])
    equation = parse(f"{x}, (g c), (g c) -> {x}", {"g": groups}, statistics=("c", *places))
    return call.emit("group_norm", names, {"equation": equation})


# -- products --------------------------------------------------------------------------


@rule("Einsum")
def _einsum(call: Call) -> None:
    text = str(call.attribute("equation")).replace(" ", "")
    left, arrow, _ = text.partition("->")
    if not arrow:
        text = f"{left}->{''.join(sorted(c for c in {*left} - {','} if left.count(c) == 1))}"
    if "." in text or any(len(set(term)) < len(term) for term in left.split(",")):
        return unknown(call, f"the equation {text}")
    weighted = len(call.node.inputs) > 1 and call.is_stored(1)
    return call.emit("einsum", call.tensors(), ops.einsum(text, weighted))


# -- reductions, pooling, softmax --------------------------------------------------------

_REDUCTIONS = {
    "Mean": "mean", "Sum": "sum", "Max": "max", "Min": "min", "Prod": "prod", "L1": "sum", "L2": "norm",
    "LogSum": "sum", "LogSumExp": "logsumexp", "SumSquare": "sum",
}  # fmt: skip


def _reduction(function: str) -> Rule:
    def apply(call: Call) -> None:
        if call.value(1) is not None and not call.is_stored(1):
            return unknown(call, "its axes are computed")
        axes = call.numbers("axes", 1)
        if not axes:
            if call.attribute("noop_with_empty_axes", 0):
                return elementwise("identity", first_only=True)(call)
            axes = list(range(call.rank))
        axes = [a % call.rank for a in axes]
        keep = bool(call.attribute("keepdims", 1))
        return call.emit("reduce", call.tensors(0), ops.reduce(call.rank, axes, keep, function))

    return apply


RULES |= {f"Reduce{name}": _reduction(function) for name, function in _REDUCTIONS.items()}


@rule("ArgMax", "ArgMin")
def _place(call: Call) -> None:
    """What is searched stays whole, all other axes pass."""
    axis = call.axis()
    names = ["." if d == axis else f"a{d}" for d in range(call.rank)]
    after = names if call.attribute("keepdims", 1) else [n for d, n in enumerate(names) if d != axis]
    equation = parse(f"{' '.join(names)} -> {' '.join(after)}")
    call.emit("pool", call.tensors(0), {"equation": equation, "function": "other"})


@rule("Softmax", "LogSoftmax")
def _softmax(call: Call) -> None:
    call.emit("softmax", call.tensors(0), ops.softmax(call.rank, call.axis(-1)))


def _spatial(call: Call) -> Sequence[int]:
    return range(2, call.rank)


def _moved(call: Call) -> Sequence[int]:
    """The spatial dimensions, but those of which a window sees one position at a time."""
    count = call.rank - 2
    kernel, ones = call.attribute("kernel_shape"), [1] * count
    strides, pads = call.attribute("strides", ones), call.attribute("pads", [0] * 2 * count)
    plain = call.attribute("auto_pad", "NOTSET") in ("NOTSET", "VALID")
    return [
        2 + d for d in range(count) if not plain or (kernel[d], strides[d], pads[d], pads[count + d]) != (1, 1, 0, 0)
    ]


def _along(call: Call, axes: Array | None) -> Sequence[int]:
    """These dimensions; all where they are computed."""
    return range(call.rank) if axes is None else [int(a) % call.rank for a in axes.ravel()]


_POOLS: dict[str, tuple[str, Callable[[Call], Sequence[int]]]] = {
    "MaxPool": ("max", _moved), "AveragePool": ("mean", _moved), "LpPool": ("other", _moved),
    "GlobalMaxPool": ("max", _spatial), "GlobalAveragePool": ("mean", _spatial), "GlobalLpPool": ("other", _spatial),
    "LRN": ("other", lambda call: [1]), "Hardmax": ("other", lambda call: [call.axis(-1)]),
    "CumSum": ("other", lambda call: _along(call, call.constant(1))), "TopK": ("other", lambda call: [call.axis(-1)]),
    "Trilu": ("other", lambda call: [call.rank - 2, call.rank - 1]),
    "LpNormalization": ("other", lambda call: [call.axis(-1)]),
}  # fmt: skip
RULES |= {name: whole(function, axes) for name, (function, axes) in _POOLS.items()}


@rule("GridSample")
def _grid_sample(call: Call) -> None:
    dots = " ".join("." * (call.rank - 2))
    equation = parse(f"b c {dots}, b {dots} . -> b c {dots}")
    call.emit("pool", call.tensors(0, 1), {"equation": equation, "function": "resize"})


_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@rule(*_GATES)
def _recurrent(call: Call) -> None:
    if call.attribute("layout", 0):
        return unknown(call, "its batch is in front")
    outputs = [index for index, output in enumerate(call.node.outputs) if output.name]
    attributes = stacked(_GATES[call.node.op_type], outputs)
    return call.emit("recurrent", call.tensors(*range(len(call.node.inputs))), attributes)
