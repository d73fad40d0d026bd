"""Rules of what works element by element: activations, arithmetic, comparisons, and layers that do nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras.src.applications import convnext, inception_resnet_v2  # their layers have no public name
from keras.src.ops import core, nn  # the classes behind keras.ops
from keras.src.ops import math as math_ops
from keras.src.ops import numpy as numpy_ops

from slimline.frameworks.keras.functional import Call
from slimline.frameworks.keras.gridded import FakeQuantize
from slimline.frameworks.keras.onnx.writer import Operand, Placed, Rule, Stored, Writer, dtype_of
from slimline.frameworks.keras.reader import NoRule
from slimline.methods.formats import IntegerGrid, Levels
from slimline.runtimes.forms.onnx_graph import DOMAIN, FAKE_QUANTIZE, rounding_ends

L = keras.layers
Activation = Callable[..., Placed]
"""Of the writer, the tensor and the function's own settings."""


def plain(kind: str, **attributes: Any) -> Activation:
    """What ONNX has an operator for."""
    return lambda w, x, **_: w.each(kind, x, **attributes)


def clip(w: Writer, x: Operand, low: float | None, high: float | None) -> Placed:
    """Between two numbers."""
    placed = w.placed(x)
    ends = [None if end is None else np.asarray(end, placed.dtype) for end in (low, high)]
    return w.place(w.op("Clip", placed.value, *ends), placed.order, placed.shape, placed.dtype)


def relu(
    w: Writer, x: Operand, negative_slope: float = 0.0, max_value: float | None = None, threshold: float = 0.0
) -> Placed:
    """Keras' ``relu`` with a ceiling, a slope and a threshold."""
    if negative_slope and max_value is None and not threshold:
        return w.each("LeakyRelu", x, alpha=float(negative_slope))
    positive: Operand = x
    if threshold:
        beyond = w.each("Greater", x, threshold, dtype="bool")
        positive = w.each("Where", beyond, x, number(x, 0.0), dtype=x.dtype)
    y = w.each("Relu", positive) if max_value is None else clip(w, positive, 0.0, max_value)
    if not negative_slope:
        return y
    below = w.each("Relu", w.each("Sub", Stored(np.asarray(threshold, x.dtype)), x))
    return w.each("Sub", y, w.each("Mul", below, negative_slope))


def softplus(w: Writer, x: Operand, **_: Any) -> Placed:
    """``log(1 + exp(x))``."""
    return w.each("Softplus", x)


def threshold(w: Writer, x: Operand, threshold: float, default_value: float, **_: Any) -> Placed:
    """`default_value` where it is not beyond the threshold."""
    return w.each("Where", w.each("Greater", x, threshold, dtype="bool"), x, number(x, default_value), dtype=x.dtype)


def number(x: Operand, value: float) -> Stored:
    """A number of the dtype of `x`."""
    return Stored(np.asarray(value, x.dtype))


def _sparse(top: Callable[[Writer, Operand], Operand], middle: Callable[[Writer, Operand], Operand]) -> Activation:
    """Zero up to -1, something else up to 1, something else beyond."""

    def activation(w: Writer, x: Operand, **_: Any) -> Placed:
        low, high = w.each("LessOrEqual", x, -1.0, dtype="bool"), w.each("GreaterOrEqual", x, 1.0, dtype="bool")
        upper = w.each("Where", high, top(w, x), middle(w, x), dtype=x.dtype)
        return w.each("Where", low, number(x, 0.0), upper, dtype=x.dtype)

    return activation


ACTIVATIONS: Mapping[str, Activation] = {
    "celu": lambda w, x, alpha=1.0: w.each("Celu", x, alpha=float(alpha)),
    "elu": lambda w, x, alpha=1.0: w.each("Elu", x, alpha=float(alpha)),
    "exponential": plain("Exp"),
    "gelu": lambda w, x, approximate=False: w.each("Gelu", x, approximate="tanh" if approximate else "none"),
    "hard_shrink": lambda w, x, threshold=0.5: w.each("Shrink", x, lambd=float(threshold)),
    "hard_sigmoid": plain("HardSigmoid", alpha=1 / 6, beta=0.5),
    "hard_silu": plain("HardSwish"),
    "hard_tanh": lambda w, x: clip(w, x, -1.0, 1.0),
    "leaky_relu": lambda w, x, negative_slope=0.2: w.each("LeakyRelu", x, alpha=float(negative_slope)),
    "log_sigmoid": lambda w, x: w.each("Neg", w.each("Softplus", w.each("Neg", x))),
    "mish": lambda w, x: w.each("Mul", x, w.each("Tanh", w.each("Softplus", x))),
    "relu": relu,
    "relu6": lambda w, x: clip(w, x, 0.0, 6.0),
    "selu": plain("Selu", alpha=1.6732632423543772, gamma=1.0507009873554805),
    "sigmoid": plain("Sigmoid"),
    "silu": lambda w, x: w.each("Mul", x, w.each("Sigmoid", x)),
    "soft_shrink": lambda w, x, threshold=0.5: w.each("Shrink", x, lambd=float(threshold), bias=float(threshold)),
    "softplus": softplus,
    "softsign": plain("Softsign"),
    "sparse_plus": _sparse(lambda w, x: x, lambda w, x: w.each("Mul", _squared(w, w.each("Add", x, 1.0)), 0.25)),
    "sparse_sigmoid": _sparse(lambda w, x: number(x, 1.0), lambda w, x: w.each("Mul", w.each("Add", x, 1.0), 0.5)),
    "squareplus": lambda w, x, b=4.0: w.each(
        "Mul", w.each("Add", x, w.each("Sqrt", w.each("Add", _squared(w, x), float(b)))), 0.5
    ),
    "tanh": plain("Tanh"),
    "tanh_shrink": lambda w, x: w.each("Sub", x, w.each("Tanh", x)),
    "threshold": threshold,
}
ALIASES = {"swish": "silu", "hard_swish": "hard_silu"}


def _squared(w: Writer, x: Operand) -> Placed:
    return w.each("Mul", x, x)


def softmax(w: Writer, x: Operand, axis: int = -1, logarithm: bool = False) -> Placed:
    """Softmax over one dimension."""
    placed = w.placed(x)
    kind = "LogSoftmax" if logarithm else "Softmax"
    return w.place(w.op(kind, placed.value, axis=placed.at(axis)), placed.order, placed.shape, placed.dtype)


def activation(w: Writer, call: Call) -> Operand:
    """`Activation`, by the name of its function."""
    function = call.operation.activation
    name = getattr(function, "__name__", type(function).__name__)
    x = w.source(call)
    if getattr(keras.activations, name, None) is not function:
        raise NoRule(f"slimline does not know the function {name!r}")
    if name in ("softmax", "log_softmax"):
        return softmax(w, x, logarithm=name == "log_softmax")
    if name == "linear":
        return x
    name = ALIASES.get(name, name)
    if name not in ACTIVATIONS:
        raise NoRule(f"slimline has no rule for the function {name!r}")
    return ACTIVATIONS[name](w, x)


def of(name: str, *settings: str) -> Rule:
    """Rule of an activation with settings of the operation's own."""

    def rule(w: Writer, call: Call) -> Placed:
        values = {setting: getattr(call.operation, setting) for setting in settings}
        return ACTIVATIONS[name](w, w.cast(w.source(call), dtype_of(call)), **values)

    return rule


def prelu(w: Writer, call: Call) -> Placed:
    """`PReLU`: slopes are stored per position."""
    return w.each("PRelu", w.source(call), w.parameter(call.operation.alpha))


def identity(w: Writer, call: Call) -> Operand:
    """What does nothing but in training; a cast where the dtype is another."""
    return w.source(call)


def arithmetic(kind: str) -> Rule:
    """Rule of a function of one or more operands, computed in the dtype of its result."""

    def rule(w: Writer, call: Call) -> Placed:
        operands = [w.operand(a, dtype_of(call)) for a in w.arguments(call).values()]
        return w.each(kind, *operands)

    return rule


def comparison(kind: str, dtype: str | None = None) -> Rule:
    """Rule of a function of operands of one dtype, by default their common one, whose result is a truth value."""

    def rule(w: Writer, call: Call) -> Placed:
        arguments = list(w.arguments(call).values())
        kinds = [getattr(a, "dtype", type(a)) for a in arguments]
        common = dtype or keras.backend.result_type(*kinds)
        operands = [w.operand(a, common) for a in arguments]
        if all(isinstance(x, Stored) for x in operands):
            operands[0] = w.placed(operands[0])
        return w.each(kind, *operands, dtype="bool")

    return rule


def negated(rule: Rule) -> Rule:
    """Rule of the opposite."""
    return lambda w, call: w.each("Not", rule(w, call))  # type: ignore[arg-type]


def formula(function: Callable[..., Placed]) -> Rule:
    """Rule of a function of operands in the dtype of the result."""

    def rule(w: Writer, call: Call) -> Placed:
        return function(w, *(w.operand(a, dtype_of(call)) for a in w.arguments(call).values()))

    return rule


def where(w: Writer, call: Call) -> Placed:
    """A choice, place by place."""
    arguments = w.arguments(call)
    if arguments.get("x1") is None or arguments.get("x2") is None:
        raise NoRule("slimline has no rule for it without something to choose from")
    condition = w.operand(arguments["condition"], "bool")
    chosen = [w.operand(arguments[name], dtype_of(call)) for name in ("x1", "x2")]
    return w.each("Where", condition, *chosen, dtype=dtype_of(call))


def clip_op(w: Writer, call: Call) -> Placed:
    """Between two numbers, or tensors."""
    low, high = call.operation.x_min, call.operation.x_max
    x = w.cast(w.source(call), dtype_of(call))
    return clip(w, x, float(low), float(high)) if np.ndim(low) == np.ndim(high) == 0 else _between(w, x, low, high)


def _between(w: Writer, x: Operand, low: Any, high: Any) -> Placed:
    return w.each("Min", w.each("Max", x, w.operand(low, x.dtype)), w.operand(high, x.dtype))


def power(w: Writer, call: Call) -> Placed:
    """A power."""
    x, exponent = (w.operand(a, dtype_of(call)) for a in w.arguments(call).values())
    if isinstance(exponent, Stored) and exponent.array.ndim == 0 and exponent.array == 2:
        return _squared(w, x)
    return w.each("Pow", x, exponent)


def floor_divide(w: Writer, a: Operand, b: Operand) -> Placed:
    """The quotient, rounded down."""
    if "float" not in a.dtype:
        raise NoRule("slimline has no rule for it with integers")
    return w.each("Floor", w.each("Div", a, b))


def modulo(w: Writer, a: Operand, b: Operand) -> Placed:
    """The remainder, of the divisor's sign."""
    if "float" not in a.dtype:
        return w.each("Mod", a, b)
    return w.each("Sub", a, w.each("Mul", b, w.each("Floor", w.each("Div", a, b))))


def merged(kind: str) -> Rule:
    """Rule of a layer that merges two or more tensors."""

    def rule(w: Writer, call: Call) -> Operand:
        total, *others = (w.operand(t, dtype_of(call)) for t in call.inputs)
        if any(len(x.shape) != len(total.shape) for x in others):
            raise NoRule("slimline has no rule for it with tensors of different ranks")
        for other in others:
            total = w.each(kind, total, other)
        return total

    return rule


def average(w: Writer, call: Call) -> Placed:
    """The mean of several tensors."""
    total = merged("Add")(w, call)
    return w.each("Mul", total, 1 / len(call.inputs))  # type: ignore[arg-type]


def scaled_sum(w: Writer, call: Call) -> Placed:
    """Inception-ResNet's scaled shortcut."""
    a, b = (w.operand(t) for t in call.inputs)
    return w.each("Add", a, w.each("Mul", b, float(call.operation.scale)))


def layer_scale(w: Writer, call: Call) -> Placed:
    """ConvNeXt's stored factor per channel."""
    return w.each("Mul", w.source(call), w.parameter(call.operation.gamma))


def rescaling(w: Writer, call: Call) -> Operand:
    """`Rescaling` by numbers or by one per channel."""
    layer = call.operation
    scale, offset = (np.asarray(n, dtype_of(call)) for n in (layer.scale, layer.offset))
    if max(scale.ndim, offset.ndim) and keras.config.image_data_format() == "channels_first":
        raise NoRule("slimline has no rule for it with image_data_format='channels_first'")
    return w.each("Add", w.each("Mul", w.cast(w.source(call), dtype_of(call)), Stored(scale)), Stored(offset))


def normalization(w: Writer, call: Call) -> Placed:
    """`Normalization` by stored statistics."""
    layer = call.operation
    x = w.cast(w.source(call), dtype_of(call))
    mean, variance = (np.asarray(keras.ops.convert_to_numpy(v)) for v in (layer.mean, layer.variance))
    deviation = np.maximum(np.sqrt(variance), keras.config.epsilon()).astype(x.dtype)
    if layer.invert:
        return w.each("Add", w.each("Mul", x, Stored(deviation)), Stored(mean))
    return w.each("Div", w.each("Sub", x, Stored(mean)), Stored(deviation))


def fake_quantize(w: Writer, call: Call) -> Placed:
    """Rounding to a grid with one scale."""
    each, x = call.operation.format, w.placed(w.source(call))
    if isinstance(each, Levels) and each.is_sign and each.grid is not None:
        positive, size = w.each("Greater", x, 0.0, dtype="bool"), each.scale.item()
        x, each = w.each("Where", positive, number(x, size), number(x, -size), dtype=x.dtype), each.grid
    if (ends := rounding_ends(each)) is None or each.scale.size != 1:
        raise NoRule(f"ONNX has no operator that rounds to {each.describe()}")
    zero = int(each.zero.ravel()[0]) if isinstance(each, IntegerGrid) else 0
    scale = float(each.scale.ravel()[0])
    value = w.op(FAKE_QUANTIZE, x.value, domain=DOMAIN, scale=scale, zero_point=zero, low=ends[0], high=ends[1])
    return w.place(value, x.order, x.shape, x.dtype)


def constant(value: float) -> Rule:
    """Rule of a tensor of the shape of another that holds one number."""

    def rule(w: Writer, call: Call) -> Placed:
        x = w.placed(w.source(call))
        filled = w.op("Expand", np.asarray(value, dtype_of(call)), w.op("Shape", x.value))
        return w.place(filled, x.order, x.shape, dtype_of(call))

    return rule


def _scaled(factor: float) -> Callable[..., Placed]:
    return lambda w, x: w.each("Mul", x, factor)


def _base(factor: float) -> Callable[..., Placed]:
    """A logarithm of another base."""
    return lambda w, x: w.each("Mul", w.each("Log", x), factor)


def _ops(module: Any, **rules: Rule) -> dict[type, Rule]:
    return {getattr(module, name): rule for name, rule in rules.items()}


_MONOTONE = "Abs Ceil Cos Cosh Exp Floor Log Round Sign Sin Sinh Sqrt Tan Tanh Reciprocal"
_ARC = {"Arccos": "Acos", "Arccosh": "Acosh", "Arcsin": "Asin", "Arcsinh": "Asinh", "Arctan": "Atan"}
_LAYERS = (
    "SpatialDropout1D SpatialDropout2D SpatialDropout3D GaussianDropout GaussianNoise ActivityRegularization Identity "
    "Dropout AlphaDropout"
)

ELEMENTWISE: Mapping[type, Rule] = {
    FakeQuantize: fake_quantize,
    L.Activation: activation,
    L.ReLU: of("relu", "negative_slope", "max_value", "threshold"),
    L.LeakyReLU: of("leaky_relu", "negative_slope"),
    L.ELU: of("elu", "alpha"),
    L.PReLU: prelu,
    **{getattr(L, name): identity for name in _LAYERS.split()},
    convnext.StochasticDepth: identity,
    convnext.LayerScale: layer_scale,
    inception_resnet_v2.CustomScaleLayer: scaled_sum,
    L.Add: merged("Add"),
    L.Subtract: merged("Sub"),
    L.Multiply: merged("Mul"),
    L.Maximum: merged("Max"),
    L.Minimum: merged("Min"),
    L.Average: average,
    L.Rescaling: rescaling,
    L.Normalization: normalization,
    **_ops(
        nn,
        Relu=of("relu"),
        Relu6=of("relu6"),
        Sigmoid=of("sigmoid"),
        Softplus=of("softplus"),
        Softsign=of("softsign"),
        SoftShrink=of("soft_shrink", "threshold"),
        SparsePlus=of("sparse_plus"),
        SparseSigmoid=of("sparse_sigmoid"),
        Silu=of("silu"),
        Squareplus=of("squareplus", "b"),
        LogSigmoid=of("log_sigmoid"),
        LeakyRelu=of("leaky_relu", "negative_slope"),
        HardSigmoid=of("hard_sigmoid"),
        HardSilu=of("hard_silu"),
        Elu=of("elu", "alpha"),
        Selu=of("selu"),
        Gelu=of("gelu", "approximate"),
        Celu=of("celu", "alpha"),
        TanhShrink=of("tanh_shrink"),
        HardTanh=of("hard_tanh"),
        HardShrink=of("hard_shrink", "threshold"),
        Threshold=of("threshold", "threshold", "default_value"),
    ),
    **{getattr(numpy_ops, name): arithmetic(name) for name in _MONOTONE.split()},
    **{getattr(numpy_ops, name): arithmetic(kind) for name, kind in _ARC.items()},
    **_ops(
        numpy_ops,
        Absolute=arithmetic("Abs"),
        Fabs=arithmetic("Abs"),
        Arctanh=arithmetic("Atanh"),
        Negative=arithmetic("Neg"),
        Add=arithmetic("Add"),
        Subtract=arithmetic("Sub"),
        Multiply=arithmetic("Mul"),
        Divide=arithmetic("Div"),
        TrueDivide=arithmetic("Div"),
        Maximum=arithmetic("Max"),
        Minimum=arithmetic("Min"),
        Fmax=arithmetic("Max"),
        Fmin=arithmetic("Min"),
        FloorDivide=formula(floor_divide),
        Mod=formula(modulo),
        Power=power,
        Square=formula(_squared),
        Clip=clip_op,
        Where=where,
        Expm1=formula(lambda w, x: w.each("Sub", w.each("Exp", x), 1.0)),
        Exp2=formula(lambda w, x: w.each("Exp", w.each("Mul", x, math.log(2)))),
        Log1p=formula(lambda w, x: w.each("Log", w.each("Add", x, 1.0))),
        Log2=formula(_base(1 / math.log(2))),
        Log10=formula(_base(1 / math.log(10))),
        Deg2rad=formula(_scaled(math.pi / 180)),
        Rad2deg=formula(_scaled(180 / math.pi)),
        OnesLike=constant(1.0),
        ZerosLike=constant(0.0),
        Equal=comparison("Equal"),
        NotEqual=negated(comparison("Equal")),
        Greater=comparison("Greater"),
        GreaterEqual=comparison("GreaterOrEqual"),
        Less=comparison("Less"),
        LessEqual=comparison("LessOrEqual"),
        LogicalAnd=comparison("And", "bool"),
        LogicalOr=comparison("Or", "bool"),
        LogicalXor=comparison("Xor", "bool"),
        LogicalNot=comparison("Not", "bool"),
        Copy=identity,
    ),
    math_ops.Erf: arithmetic("Erf"),
    math_ops.Rsqrt: formula(lambda w, x: w.each("Reciprocal", w.each("Sqrt", x))),
    core.Cast: identity,
    core.StopGradient: identity,
    core.ConvertToTensor: identity,
}
