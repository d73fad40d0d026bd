"""Operators that compute element by element."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from slimline.frameworks.onnx.trainable.call import RULES, Call, aten, plain, rule

DTYPES = {
    "FLOAT": torch.float32, "DOUBLE": torch.float64, "FLOAT16": torch.float16, "BFLOAT16": torch.bfloat16,
    "INT64": torch.int64, "INT32": torch.int32, "INT16": torch.int16, "INT8": torch.int8, "UINT8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
"""By ONNX' names of types."""

_PLAIN: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "Asin": torch.asin, "Asinh": torch.asinh,
    "Atan": torch.atan, "Atanh": torch.atanh, "Ceil": torch.ceil, "Cos": torch.cos, "Cosh": torch.cosh,
    "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor, "Log": torch.log, "Neg": torch.neg,
    "Reciprocal": torch.reciprocal, "Round": torch.round, "Sign": torch.sign, "Sin": torch.sin,
    "Sinh": torch.sinh, "Sqrt": torch.sqrt, "Tan": torch.tan, "Tanh": torch.tanh,
    "Sigmoid": aten.sigmoid.default, "Relu": torch.relu, "Softplus": F.softplus, "Softsign": F.softsign,
    "Mish": F.mish, "HardSwish": F.hardswish, "IsNaN": torch.isnan, "Not": torch.logical_not,
    "BitwiseNot": torch.bitwise_not, "Sub": torch.sub, "And": torch.logical_and, "Or": torch.logical_or,
    "Xor": torch.logical_xor, "Equal": torch.eq, "Greater": torch.gt, "GreaterOrEqual": torch.ge, "Less": torch.lt,
    "LessOrEqual": torch.le, "Where": torch.where, "BitwiseAnd": torch.bitwise_and, "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
}  # fmt: skip
RULES |= {name: plain(function) for name, function in _PLAIN.items()}


def elu(x: Tensor, alpha: float) -> Tensor:
    """As ONNX defines it, below zero by the exponential of that alone."""
    return torch.where(x > 0, x, alpha * torch.expm1(torch.clamp(x, max=0)))


def celu(x: Tensor, alpha: float) -> Tensor:
    """See `elu`."""
    return torch.where(x > 0, x, alpha * torch.expm1(torch.clamp(x, max=0) / alpha))


def selu(x: Tensor, alpha: float, gamma: float) -> Tensor:
    """See `elu`."""
    return gamma * elu(x, alpha)


def hard_sigmoid(x: Tensor, alpha: float, beta: float) -> Tensor:
    """A line between zero and one."""
    return torch.clamp(alpha * x + beta, 0, 1)


def leaky_relu(x: Tensor, alpha: float) -> Tensor:
    """Below zero with the slope `alpha`."""
    return torch.where(x < 0, alpha * x, x)


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """The same with slopes that broadcast."""
    return torch.where(x < 0, slope * x, x)


def threshold(x: Tensor, alpha: float) -> Tensor:
    """Zero up to `alpha`."""
    return torch.where(x > alpha, x, torch.zeros_like(x))


def shrink(x: Tensor, bias: float, limit: float) -> Tensor:
    """Towards zero by `bias`, and zero up to `limit`."""
    return torch.where(x > limit, x - bias, torch.where(x < -limit, x + bias, torch.zeros_like(x)))


def swish(x: Tensor, alpha: float) -> Tensor:
    """``x * sigmoid(alpha * x)``."""
    return x * torch.sigmoid(alpha * x)


def gelu(x: Tensor, approximate: str) -> Tensor:
    """With the error function, or ``tanh`` for it."""
    return F.gelu(x, approximate=approximate)


def infinite(x: Tensor, negative: int, positive: int) -> Tensor:
    """Where one of these infinities is."""
    return torch.isinf(x) & (((x < 0) & bool(negative)) | ((x > 0) & bool(positive)))


def power(base: Tensor, exponent: Tensor) -> Tensor:
    """In the type of the base."""
    return torch.pow(base, exponent).to(base.dtype)


def remainder(a: Tensor, b: Tensor, fmod: int) -> Tensor:
    """With the sign of the divisor, or by `fmod` of the dividend."""
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def quotient(a: Tensor, b: Tensor) -> Tensor:
    """Of whole numbers, without what is behind the point."""
    return torch.div(a, b, rounding_mode="trunc")


def shift(a: Tensor, b: Tensor, direction: str) -> Tensor:
    """Bits moved to one side."""
    return a << b if direction == "LEFT" else a >> b


RULES |= {
    "Elu": plain(elu, alpha=1.0),
    "Celu": plain(celu, alpha=1.0),
    "Selu": plain(selu, alpha=1.67326319217681884765625, gamma=1.05070102214813232421875),
    "HardSigmoid": plain(hard_sigmoid, alpha=0.2, beta=0.5),
    "LeakyRelu": plain(leaky_relu, alpha=0.01),
    "PRelu": plain(prelu),
    "ThresholdedRelu": plain(threshold, alpha=1.0),
    "Shrink": plain(shrink, bias=0.0, lambd=0.5),
    "Swish": plain(swish, alpha=1.0),
    "Gelu": plain(gelu, approximate="none"),
    "IsInf": plain(infinite, detect_negative=1, detect_positive=1),
    "Pow": plain(power),
    "Mod": plain(remainder, fmod=0),
    "BitShift": plain(shift, direction=""),
}


@rule("Div")
def _divide(call: Call) -> fx.Node:
    return call.emit(quotient if "int" in call.dtype() else torch.div, *call.tensors())


_SEVERAL: dict[str, Callable[..., Any]] = {
    "Add": torch.add,
    "Mul": torch.mul,
    "Sum": torch.add,
    "Mean": torch.add,
    "Max": torch.maximum,
    "Min": torch.minimum,
}


@rule(*_SEVERAL)
def _several(call: Call) -> fx.Node:
    operands = call.tensors()
    result = reduce(lambda a, b: call.emit(_SEVERAL[call.node.op_type], a, b), operands)
    return call.emit(torch.div, result, len(operands)) if call.node.op_type == "Mean" else result


@rule("Clip")
def _clip(call: Call) -> fx.Node:
    low, high = call.number(1), call.number(2)
    return call.tensor(0) if low is high is None else call.emit(torch.clamp, call.tensor(0), low, high)


@rule("Identity", "Dropout")
def _unchanged(call: Call) -> Sequence[fx.Node]:
    if call.has(2) and call.number(2):
        raise call.refusal("that drops at inference")
    return [call.tensor(0)]


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In another type."""
    return x.to(dtype)


def cast_like(x: Tensor, other: Tensor) -> Tensor:
    """In the type of another tensor."""
    return x.to(other.dtype)


RULES["CastLike"] = plain(cast_like)


@rule("Cast")
def _cast(call: Call) -> fx.Node:
    name = ir.DataType(call.attribute("to")).name
    if name not in DTYPES:
        raise call.refusal(f"to {name.lower()}")
    return call.emit(cast, call.tensor(0), DTYPES[name])
