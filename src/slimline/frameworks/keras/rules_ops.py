"""One rule per bare ``keras.ops`` function in a functional model: which neutral operator it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import keras
import numpy as np
from keras.src.ops import core, image, linalg, nn  # the classes behind keras.ops
from keras.src.ops import math as math_ops
from keras.src.ops import numpy as numpy_ops

from slimline.frameworks.keras.functional import Call
from slimline.frameworks.keras.reader import NoRule, Reader
from slimline.frameworks.keras.rules_layers import Rule, spatial_axes
from slimline.frameworks.keras.rules_masks import softmax
from slimline.graph import ops
from slimline.graph.equation import parse


def elementwise(function: str) -> Rule:
    """Rule of a function of tensors and constants with NumPy broadcasting; scalars do not matter."""

    def rule(reader: Reader, call: Call) -> None:
        names, shapes = reader.operands(call)
        reader.node(call, "elementwise", names, ops.elementwise(shapes, function))

    return rule


def along_whole_axis(reader: Reader, call: Call) -> None:
    """Functions in which a position depends on its place on the axis (roll, cumulative sums): not prunable there."""
    x, shape = reader.single(call)
    axis = call.operation.axis
    axes = range(len(shape)) if axis is None else [a % len(shape) for a in keras.tree.flatten(axis)]
    attributes = ops.elementwise([shape], "along")
    reason = "a position's place on this axis matters"
    equation = replace(attributes["equation"], fixed={f"a{a}": reason for a in axes})
    reader.node(call, "elementwise", [x], {**attributes, "equation": equation})


def triangle(reader: Reader, call: Call) -> None:
    """One side of the diagonal of matrices."""
    x, shape = reader.single(call)
    attributes = ops.elementwise([shape], "along")
    fixed = {f"a{len(shape) - n}": "the diagonal counts its positions" for n in (1, 2)}
    equation = replace(attributes["equation"], fixed=fixed)
    reader.node(call, "elementwise", [x], {**attributes, "equation": equation})


def reduce(function: str, fixed: str = "") -> Rule:
    """Rule of a reduction over `axis` (None: all), of which no position can go if it is `fixed`."""

    def rule(reader: Reader, call: Call) -> None:
        x, shape = reader.single(call)
        axis = call.operation.axis
        axes = tuple(range(len(shape))) if axis is None else tuple(a % len(shape) for a in keras.tree.flatten(axis))
        attributes = ops.reduce(len(shape), axes, bool(call.operation.keepdims), function)
        if fixed:
            equation = replace(attributes["equation"], fixed={f"a{a}": fixed for a in axes})
            attributes = {**attributes, "equation": equation}
        reader.node(call, "reduce", [x], attributes)

    return rule


def moments(reader: Reader, call: Call) -> None:
    """Mean and variance over some axes."""
    x, shape = reader.single(call)
    axes = [a % len(shape) for a in keras.tree.flatten(call.operation.axes)]
    reader.node(call, "reduce", [x], ops.reduce(len(shape), axes, bool(call.operation.keepdims), "moments", 2))


def norm(reader: Reader, call: Call) -> None:
    """The length of vectors, or the root of the sum of all squares."""
    axes = (
        range(len(reader.single(call)[1])) if call.operation.axis is None else keras.tree.flatten(call.operation.axis)
    )
    if len(axes) > 1 and call.operation.ord not in (None, "fro"):
        raise NoRule("slimline has no rule for this norm of matrices")
    reduce("norm")(reader, call)


def normalize(reader: Reader, call: Call) -> None:
    """Division by the length over one axis."""
    x, shape = reader.single(call)
    axis = call.operation.axis
    axes = range(len(shape)) if axis is None else keras.tree.flatten(axis)
    reader.node(call, "normalize", [x], ops.normalize(len(shape), list(axes)))


def pool(function: str) -> Rule:
    """Local pooling and resizing of what is between batch and channels."""

    def rule(reader: Reader, call: Call) -> None:
        x, shape = reader.single(call)
        layout = getattr(call.operation, "data_format", None) or keras.config.image_data_format()
        if len(shape) < 3 or (len(shape) == 3 and function == "resize"):
            raise NoRule("slimline has no rule for it without a batch")
        reader.node(call, "pool", [x], ops.pool(len(shape), spatial_axes(len(shape), layout), function))

    return rule


def glu(reader: Reader, call: Call) -> None:
    """One half of an axis, gated by the other."""
    x, shape = reader.single(call)
    axis, half = call.operation.axis % len(shape), reader.shape(call.outputs[0])
    parts = [reader.intermediate(f"{call.name}/{i}", half, x) for i in range(2)]
    reader.part(call, f"{call.name}/split", "split", [x], parts, ops.split(axis, [half[axis]] * 2))
    reader.node(call, "elementwise", parts, ops.elementwise([half, half], "glu"))


def copies(reader: Reader, call: Call) -> None:
    """Copies of a dimension: of each position (`repeat`), or one whole after the other (`tile`)."""
    x, shape = reader.single(call)
    after = reader.shape(call.outputs[0])
    if len(after) != len(shape) or (isinstance(call.operation, numpy_ops.Repeat) and call.operation.axis is None):
        raise NoRule("slimline has no rule for copies of another rank")
    if hasattr(getattr(call.operation, "repeats", 1), "__len__") and isinstance(call.operation, numpy_ops.Repeat):
        raise NoRule("slimline has no rule for a count per position")
    sizes: dict[str, int] = {}
    outs = []
    for d, (old, new) in enumerate(zip(shape, after, strict=True)):
        sizes |= {f"n{d}": new // old} if new != old else {}
        pair = f"(a{d} n{d})" if isinstance(call.operation, numpy_ops.Repeat) else f"(n{d} a{d})"
        outs.append(pair if new != old else f"a{d}")
    text = f"{' '.join(f'a{d}' for d in range(len(shape)))} -> {' '.join(outs)}"
    reader.node(call, "expand", [x], {"equation": parse(text, sizes)})


def reshape(reader: Reader, call: Call) -> None:
    """Reshape, ravel, squeeze, expand_dims."""
    x, shape = reader.single(call)
    reader.node(call, "reshape", [x], ops.reshape(shape, reader.shape(call.outputs[0])))


def transpose(reader: Reader, call: Call) -> None:
    """Transposition; None reverses all axes."""
    x, shape = reader.single(call)
    order = call.operation.axes or range(len(shape))[::-1]
    reader.node(call, "permute", [x], ops.permute([a % len(shape) for a in order]))


def swapaxes(reader: Reader, call: Call) -> None:
    """Exchange of two axes."""
    x, shape = reader.single(call)
    order = list(range(len(shape)))
    a, b = call.operation.axis1 % len(shape), call.operation.axis2 % len(shape)
    order[a], order[b] = b, a
    reader.node(call, "permute", [x], ops.permute(order))


def moveaxis(reader: Reader, call: Call) -> None:
    """Axes moved to other places, the rest in order."""
    x, shape = reader.single(call)
    order = np.moveaxis(np.empty([1 + i for i in range(len(shape))]), call.operation.source, call.operation.destination)
    reader.node(call, "permute", [x], ops.permute([n - 1 for n in order.shape]))


def concatenate(reader: Reader, call: Call) -> None:
    """Concatenation of tensors and constants."""
    names, shapes = reader.operands(call)
    reader.node(call, "concat", names, ops.concat(call.operation.axis % len(shapes[0])))


def stack(reader: Reader, call: Call) -> None:
    """A new axis: each input gets one of size 1, then they are concatenated."""
    names, shapes = reader.operands(call)
    axis = call.operation.axis % (len(shapes[0]) + 1)
    parts = []
    for i, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        longer = (*shape[:axis], 1, *shape[axis:])
        parts.append(reader.intermediate(f"{call.name}/{i}", longer, name))
        reader.part(call, parts[-1], "reshape", [name], [parts[-1]], ops.reshape(shape, longer))
    reader.node(call, "concat", parts, ops.concat(axis))


def split(reader: Reader, call: Call) -> None:
    """Equal parts, or parts that begin at given indices."""
    x, shape = reader.single(call)
    axis = call.operation.axis % len(shape)
    reader.node(call, "split", [x], ops.split(axis, [reader.shape(t)[axis] for t in call.outputs]))


def unstack(reader: Reader, call: Call) -> None:
    """Positions of an axis, one tensor each."""
    x, shape = reader.single(call)
    axis = call.operation.axis % len(shape)
    outputs = []
    for i, output in enumerate(call.outputs):
        after = reader.shape(output)
        outputs.append(reader.intermediate(f"{call.name}/{i}", (*after[:axis], 1, *after[axis:]), x))
    reader.part(call, call.name, "split", [x], outputs, ops.split(axis, [1] * len(outputs)))
    for part, output, name in zip(outputs, call.outputs, call.names, strict=True):
        after = reader.shape(output)
        reader.part(call, name, "reshape", [part], [name], ops.reshape((*after[:axis], 1, *after[axis:]), after))


def broadcast_to(reader: Reader, call: Call) -> None:
    """Broadcasting to a shape."""
    x, shape = reader.single(call)
    reader.node(call, "expand", [x], ops.expand(shape, reader.shape(call.outputs[0])))


def _each(module: Any, names: str, rule: Any = None) -> dict[type, Rule]:
    """Rules of several classes; without `rule` each is element-wise under its own name."""
    plain = {"subtract": "sub", "multiply": "mul", "divide": "div", "true_divide": "div", "maximum": "max",
             "minimum": "min"}  # fmt: skip

    def function(name: str) -> str:
        snake = "".join(f"_{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(name))
        return plain.get(snake, snake)

    return {getattr(module, n): rule or elementwise(function(n)) for n in names.split()}


FUNCTIONS: Mapping[type, Rule] = {
    **_each(
        nn,
        "Relu Relu6 Sigmoid Softplus Softsign SoftShrink SparsePlus Silu Squareplus LogSigmoid LeakyRelu HardSigmoid "
        "HardSilu Elu Selu Gelu Celu TanhShrink HardTanh HardShrink Threshold SparseSigmoid",
    ),
    **_each(
        numpy_ops,
        "Abs Absolute Add Arccos Arccosh Arcsin Arcsinh Arctan Arctan2 Arctanh BitwiseAnd BitwiseInvert BitwiseNot "
        "BitwiseOr BitwiseXor Cbrt Ceil Clip Cos Cosh Deg2rad Divide DivideNoNan Equal Exp Exp2 Expm1 Fabs Floor "
        "FloorDivide Fmax Fmin Fmod FullLike Greater GreaterEqual Heaviside Hypot Isclose Isfinite Isinf Isnan Less "
        "LessEqual Log Log1p Log2 Log10 Logaddexp Logaddexp2 LogicalAnd LogicalNot LogicalOr LogicalXor Maximum "
        "Minimum Mod Multiply NanToNum Negative NotEqual OnesLike Power Rad2deg Reciprocal Round Sign Signbit Sin Sinc "
        "Sinh Sqrt Square Subtract Tan Tanh TrueDivide Trunc Where ZerosLike",
    ),
    **_each(math_ops, "Erf Erfc Erfinv Rsqrt"),
    **_each(core, "Cast SaturateCast StopGradient ConvertToTensor", elementwise("identity")),
    numpy_ops.Copy: elementwise("identity"),
    **_each(numpy_ops, "Argsort Cumsum Cumprod Flip Nancumprod Nancumsum Roll Sort", along_whole_axis),
    **_each(numpy_ops, "Tril Triu", triangle),
    **_each(numpy_ops, "Argmax Argmin", reduce("place", fixed="a position's place on this axis is the result")),
    **_each(numpy_ops, "All Any CountNonzero Median Prod Ptp", reduce("statistic")),
    **_each(numpy_ops, "Nanmax Nanmean Nanmedian Nanmin Nanprod Nanstd Nansum Nanvar", reduce("statistic")),
    numpy_ops.Mean: reduce("mean"),
    numpy_ops.Sum: reduce("sum"),
    numpy_ops.Max: reduce("max"),
    numpy_ops.Amax: reduce("max"),
    numpy_ops.Min: reduce("min"),
    numpy_ops.Amin: reduce("min"),
    numpy_ops.Var: reduce("var"),
    numpy_ops.Std: reduce("std"),
    math_ops.Logsumexp: reduce("logsumexp"),
    nn.Moments: moments,
    linalg.Norm: norm,
    nn.Normalize: normalize,
    nn.AdaptiveMaxPool: pool("max"),
    nn.AdaptiveAveragePool: pool("mean"),
    nn.MaxPool: pool("max"),
    nn.AveragePool: pool("mean"),
    image.Resize: pool("resize"),
    nn.Glu: glu,
    **_each(numpy_ops, "Repeat Tile", copies),
    **_each(nn, "Softmax LogSoftmax Sparsemax", softmax),
    **_each(numpy_ops, "Reshape Squeeze ExpandDims Ravel", reshape),
    numpy_ops.Transpose: transpose,
    numpy_ops.Swapaxes: swapaxes,
    numpy_ops.Moveaxis: moveaxis,
    numpy_ops.Concatenate: concatenate,
    numpy_ops.Stack: stack,
    numpy_ops.Split: split,
    core.Unstack: unstack,
    numpy_ops.BroadcastTo: broadcast_to,
}
