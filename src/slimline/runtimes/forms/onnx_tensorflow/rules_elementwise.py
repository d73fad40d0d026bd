"""Operators that compute element by element."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import onnx_ir as ir
import tensorflow as tf

from slimline.runtimes.forms.onnx_tensorflow.call import Call, Untranslatable, rule
from slimline.runtimes.forms.onnx_tensorflow.layout import Placed, Sizes, Value, aligned

_NUMPY = {
    "FLOAT": np.float32, "DOUBLE": np.float64, "FLOAT16": np.float16, "INT64": np.int64, "INT32": np.int32,
    "INT16": np.int16, "INT8": np.int8, "UINT8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip

_ONE: dict[str, Callable[[Any], Any]] = {
    "Relu": tf.nn.relu,
    "Tanh": tf.tanh,
    "Exp": tf.exp,
    "Log": tf.math.log,
    "Sqrt": tf.sqrt,
    "Abs": tf.abs,
    "Neg": tf.negative,
    "Reciprocal": lambda x: 1.0 / x,
    "Floor": tf.floor,
    "Ceil": tf.math.ceil,
    "Round": tf.round,
    "Sign": tf.sign,
    "Sin": tf.sin,
    "Cos": tf.cos,
    "Not": tf.logical_not,
    "Softsign": tf.nn.softsign,
    "Softplus": tf.nn.softplus,
    "Mish": lambda x: x * tf.tanh(tf.nn.softplus(x)),
    "IsNaN": tf.math.is_nan,
    "Identity": lambda x: x,
    "Dropout": lambda x: x,
}

_SEVERAL: dict[str, Callable[[Any, Any], Any]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Max": tf.maximum,
    "Min": tf.minimum,
    "Equal": tf.equal,
    "Less": tf.less,
    "LessOrEqual": tf.less_equal,
    "Greater": tf.greater,
    "GreaterOrEqual": tf.greater_equal,
    "And": tf.logical_and,
    "Or": tf.logical_or,
    "Xor": tf.math.logical_xor,
}

_WHOLE: dict[str, Callable[[Any, Any], Any]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": lambda a, b: a // b,
    "Max": max,
    "Min": min,
    "Mod": lambda a, b: a % b,
}
"""Of sizes, none of which is negative."""


@rule(*_ONE)
def _one(call: Call) -> Value:
    if call.node.op_type == "Dropout" and call.has(2) and call.constant(2).any():
        raise Untranslatable("Dropout that drops")
    if call.node.op_type in ("Identity", "Dropout"):
        return call.inputs[0]
    x = call.operand(0)
    return Placed(_ONE[call.node.op_type](x.tensor), x.order)


@rule(*_SEVERAL, "Div", "Pow", "Mod", "Where", "Sum", "Mean")
def _several(call: Call) -> Value:
    kind = call.node.op_type
    if kind in _WHOLE and (sizes := _on_sizes(call)) is not None:
        return sizes
    operands, order = aligned([value for value in call.inputs if value is not None])
    if kind in _SEVERAL:
        return Placed(reduce(_SEVERAL[kind], operands), order)
    return Placed(_OTHERS[kind](call, operands), order)


def _divide(call: Call, operands: list[Any]) -> Any:
    a, b = operands
    return a / b if a.dtype.is_floating else tf.truncatediv(a, b)


def _power(call: Call, operands: list[Any]) -> Any:
    base, exponent = operands
    stored = call.inputs[1]
    if isinstance(stored, np.ndarray) and stored.size == 1:
        known = {2.0: tf.square, 0.5: tf.sqrt, -0.5: tf.math.rsqrt, 1.0: tf.identity}
        if float(stored.ravel()[0]) in known:
            return known[float(stored.ravel()[0])](base)
    return tf.pow(base, tf.cast(exponent, base.dtype))


def _modulo(call: Call, operands: list[Any]) -> Any:
    if call.attribute("fmod", 0):
        raise Untranslatable("Mod with the sign of the dividend")
    return tf.math.floormod(*operands)


_OTHERS: dict[str, Callable[[Call, list[Any]], Any]] = {
    "Div": _divide,
    "Pow": _power,
    "Mod": _modulo,
    "Where": lambda call, operands: tf.where(*operands),
    "Sum": lambda call, operands: reduce(tf.add, operands),
    "Mean": lambda call, operands: reduce(tf.add, operands) / len(operands),
}


def _on_sizes(call: Call) -> Sizes | None:
    """Arithmetic on sizes, done on each as far as it is known; None where the operands are others."""
    if not any(isinstance(value, Sizes) for value in call.inputs):
        return None
    vectors: list[tuple[Any, ...]] = []
    scalar = True
    for value in call.inputs:
        if isinstance(value, Sizes):
            vectors.append(value.values)
            scalar = scalar and value.scalar
        elif isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.ndim <= 1:
            vectors.append(tuple(int(n) for n in np.atleast_1d(value)))
            scalar = scalar and not value.ndim
        else:
            return None
    length = max(map(len, vectors))
    rows = zip(*[vector * length if len(vector) == 1 else vector for vector in vectors], strict=True)
    compute = _WHOLE[call.node.op_type]
    pick = {"Max": tf.maximum, "Min": tf.minimum}.get(call.node.op_type)
    results = [reduce(compute if pick is None or all(isinstance(n, int) for n in row) else pick, row) for row in rows]
    return Sizes(tuple(results), scalar)


@rule("Sigmoid")
def _sigmoid(call: Call) -> Value:
    x = call.operand(0)
    y = tf.sigmoid(x.tensor)
    # The integer logistic answers on one grid only; where its result has none of its own (SiLU) it gets that one.
    return Placed(_rounded(y, 0.0, 255 / 256) if call.reads_grid and not call.gives_grid else y, x.order)


@rule("HardSigmoid")
def _hard_sigmoid(call: Call) -> Value:
    alpha, beta = call.attribute("alpha", 0.2), call.attribute("beta", 0.5)
    x = call.operand(0)
    if call.reads_grid and call.gives_grid and math.isclose(alpha, 1 / 6, rel_tol=1e-5) and beta == 0.5:
        return Placed(_gate(x.tensor), x.order)
    return Placed(tf.clip_by_value(x.tensor * alpha + beta, 0.0, 1.0), x.order)


@rule("HardSwish")
def _hard_swish(call: Call) -> Value:
    x = call.operand(0)
    if call.reads_grid and call.gives_grid:
        return Placed(x.tensor * _rounded(_gate(x.tensor), 0.0, 1.0), x.order)
    return Placed(x.tensor * tf.nn.relu6(x.tensor + 3.0) * np.float32(1 / 6), x.order)


def _gate(x: Any) -> Any:
    """``hard_sigmoid`` by operators that XNNPACK computes in integers: it has no kernel for the whole."""
    shifted = _rounded(x + _rounded(tf.constant(3.0), 0.0, 3.0), 0.0, 6.0)  # the grid's ends clip as relu6 would
    return shifted * _rounded(tf.constant(1 / 6), 0.0, 1 / 6)


def _rounded(x: Any, low: float, high: float) -> Any:
    """`x` on the int8 grid between two numbers."""
    return tf.quantization.fake_quant_with_min_max_args(x, low, high, num_bits=8)


@rule("Gelu")
def _gelu(call: Call) -> Value:
    x = call.operand(0)
    return Placed(tf.nn.gelu(x.tensor, approximate=call.attribute("approximate", "none") == "tanh"), x.order)


@rule("Elu")
def _elu(call: Call) -> Value:
    x, alpha = call.operand(0), call.attribute("alpha", 1.0)
    if alpha == 1.0:
        return Placed(tf.nn.elu(x.tensor), x.order)
    return Placed(tf.where(x.tensor > 0, x.tensor, alpha * (tf.exp(tf.minimum(x.tensor, 0.0)) - 1.0)), x.order)


@rule("Selu")
def _selu(call: Call) -> Value:
    x = call.operand(0)
    alpha, gamma = call.attribute("alpha", 1.6732632), call.attribute("gamma", 1.0507010)
    below = alpha * (tf.exp(tf.minimum(x.tensor, 0.0)) - 1.0)
    return Placed(gamma * tf.where(x.tensor > 0, x.tensor, below), x.order)


@rule("LeakyRelu")
def _leaky(call: Call) -> Value:
    x = call.operand(0)
    return Placed(tf.nn.leaky_relu(x.tensor, call.attribute("alpha", 0.01)), x.order)


@rule("PRelu")
def _prelu(call: Call) -> Value:
    (x, steepness), order = aligned((call.inputs[0], -call.constant(1)))
    return Placed(tf.nn.relu(x) + steepness * tf.nn.relu(-x), order)  # the converter knows it by this form


@rule("ThresholdedRelu")
def _thresholded(call: Call) -> Value:
    x = call.operand(0)
    return Placed(tf.where(x.tensor > call.attribute("alpha", 1.0), x.tensor, 0.0), x.order)


@rule("Clip")
def _clip(call: Call) -> Value:
    x = call.operand(0)
    low = float(call.constant(1)) if call.has(1) else call.attribute("min", -math.inf)
    high = float(call.constant(2)) if call.has(2) else call.attribute("max", math.inf)
    if low == 0.0 and high in (6.0, math.inf):
        return Placed(tf.nn.relu6(x.tensor) if high == 6.0 else tf.nn.relu(x.tensor), x.order)
    y = x.tensor if low == -math.inf else tf.maximum(x.tensor, tf.cast(low, x.tensor.dtype))
    return Placed(y if high == math.inf else tf.minimum(y, tf.cast(high, x.tensor.dtype)), x.order)


@rule("Cast", "CastLike")
def _cast(call: Call) -> Value:
    value = call.inputs[0]
    if call.node.op_type == "CastLike":
        dtype = call.operand(1).tensor.dtype
    else:
        name = ir.DataType(call.attribute("to")).name
        if name not in _NUMPY:
            raise Untranslatable(f"Cast to {name.lower()}")
        dtype = tf.as_dtype(_NUMPY[name])
    if isinstance(value, Sizes) and dtype in (tf.int64, tf.int32):
        return value
    x = call.operand(0)
    if x.tensor.dtype == dtype:
        return x
    return Placed(tf.cast(x.tensor, dtype), x.order)
