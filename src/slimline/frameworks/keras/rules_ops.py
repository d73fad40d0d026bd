"""One rule per bare ``keras.ops`` function in a functional model: which neutral operator it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import EllipsisType
from typing import Any

import keras
import numpy as np
from keras.src.ops import core, image, linalg, nn  # the classes behind keras.ops
from keras.src.ops import math as math_ops
from keras.src.ops import numpy as numpy_ops

from slimline.frameworks.keras.functional import Call
from slimline.frameworks.keras.read import NoRule, Reader
from slimline.frameworks.keras.rules_layers import Rule, spatial_axes
from slimline.graph import ops

Step = tuple[str, ops.Attributes, tuple[int, ...]]


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


def reduce(function: str) -> Rule:
    """Rule of a reduction over `axis` (None: all)."""

    def rule(reader: Reader, call: Call) -> None:
        x, shape = reader.single(call)
        axis = call.operation.axis
        axes = tuple(range(len(shape))) if axis is None else tuple(a % len(shape) for a in keras.tree.flatten(axis))
        reader.node(call, "reduce", [x], ops.reduce(len(shape), axes, bool(call.operation.keepdims), function))

    return rule


def moments(reader: Reader, call: Call) -> None:
    """Mean and variance over some axes."""
    x, shape = reader.single(call)
    axes = [a % len(shape) for a in keras.tree.flatten(call.operation.axes)]
    reader.node(call, "reduce", [x], ops.reduce(len(shape), axes, bool(call.operation.keepdims), "moments", 2))


def norm(reader: Reader, call: Call) -> None:
    """The length of vectors."""
    if call.operation.axis is None or len(keras.tree.flatten(call.operation.axis)) > 1:
        raise NoRule("slimline has a rule only for norms of vectors")
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
    reader.node(call, "expand", [x], {"equation": ops.parse(text, sizes)})


def softmax(reader: Reader, call: Call) -> None:
    """Softmax and log-softmax over one axis."""
    x, shape = reader.single(call)
    axes = keras.tree.flatten(call.operation.axis)
    if len(axes) != 1 or axes[0] is None:
        raise NoRule("slimline has no rule for it over several axes")
    reader.node(call, "softmax", [x], ops.softmax(len(shape), axes[0] % len(shape)))


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


def getitem(reader: Reader, call: Call) -> None:
    """Indexing by integers, slices, an ellipsis and None: slices, then selections, then new axes."""
    x, shape = reader.single(call)
    subscripts = expanded_key(call.args[1] if len(call.args) > 1 else call.kwargs["key"], len(shape))
    steps: list[Step] = []
    now, axis = list(shape), 0
    for subscript in (s for s in subscripts if s is not None):
        if isinstance(subscript, int):
            index = subscript % now[axis]
            del now[axis]
            steps.append(("select", ops.select(axis, index), tuple(now)))
            continue
        start, stop, stride = subscript.indices(now[axis])
        if stride < 0:
            raise NoRule("slimline has no rule for a negative step")
        if (start, stop, stride) != (0, now[axis], 1):
            now[axis] = len(range(start, stop, stride))
            steps.append(("slice", ops.slice_(axis, start, stop, stride), tuple(now)))
        axis += 1
    after = reader.shape(call.outputs[0])
    if None in subscripts or not steps:
        steps.append(("reshape", ops.reshape(now, after), after))
    reader.chain(call, x, steps)


def expanded_key(key: Any, rank: int) -> list[int | slice | None]:
    """One subscript per dimension of the tensor (and None per new axis) for an indexing key."""
    parts = list(key) if isinstance(key, (tuple, list)) else [key]
    if not all(isinstance(p, (int, slice, EllipsisType, type(None))) for p in parts):
        raise NoRule("slimline has no rule for indexing by tensors")
    bounds = [b for p in parts if isinstance(p, slice) for b in (p.start, p.stop, p.step)]
    if not all(isinstance(b, (int, type(None))) for b in bounds):
        raise NoRule("slimline has no rule for slices between tensors")
    taken = sum(p is not None and p is not Ellipsis for p in parts)
    at = next((i for i, p in enumerate(parts) if p is Ellipsis), len(parts))
    whole: list[int | slice | None] = [slice(None)] * (rank - taken)
    return [*parts[:at], *whole, *parts[at + 1 :]]


def take(reader: Reader, call: Call) -> None:
    """Constant positions of one axis."""
    x, shape = reader.single(call)
    indices = np.asarray(take_indices(call))
    if call.operation.axis is None:
        raise NoRule("slimline has no rule for it without an axis")
    axis = call.operation.axis % len(shape)
    if indices.ndim == 0:
        reader.node(call, "select", [x], ops.select(axis, int(indices) % shape[axis]))
    elif indices.ndim == 1:
        reader.node(call, "take", [x], ops.take(axis, indices % shape[axis]))
    else:
        raise NoRule("slimline has no rule for a table of indices")


def take_indices(call: Call) -> Any:
    """The `indices` argument of a `take`, as an integer array or number."""
    indices = call.args[1] if len(call.args) > 1 else call.kwargs["indices"]
    return keras.ops.convert_to_numpy(indices) if hasattr(indices, "dtype") else indices


def pad(reader: Reader, call: Call) -> None:
    """Padding with zeros."""
    names, shapes = reader.operands(call)
    operation = call.operation
    value = call.args[1] if len(call.args) > 1 else call.kwargs.get("constant_values")
    if len(names) != 1 or operation.mode != "constant" or value not in (None, 0):
        raise NoRule("slimline has a rule only for padding with zeros")
    widths = list(operation.pad_width)
    reader.node(call, "pad", names, ops.pad(widths * len(shapes[0]) if len(widths) == 1 else widths))


def broadcast_to(reader: Reader, call: Call) -> None:
    """Broadcasting to a shape."""
    x, shape = reader.single(call)
    reader.node(call, "expand", [x], ops.expand(shape, reader.shape(call.outputs[0])))


def matmul(reader: Reader, call: Call) -> None:
    """Matrix product of two tensors, either of which may be a constant."""
    names, shapes = reader.operands(call)
    if min(map(len, shapes)) < 2:
        raise NoRule("slimline has no rule for it with vectors")
    reader.node(call, "matmul", names, ops.matmul(*shapes))


def einsum(reader: Reader, call: Call) -> None:
    """Einsum of activations; each operand's letters are distinct."""
    names, _ = reader.operands(call)
    text = call.operation.subscripts.replace(" ", "")
    operands = text.partition("->")[0].split(",")
    if "." in text or "->" not in text or any(len(set(o)) < len(o) for o in operands):
        raise NoRule(f"slimline has no rule for the equation {text!r}")
    reader.node(call, "einsum", names, ops.einsum(text))


def attention(reader: Reader, call: Call) -> None:
    """``dot_product_attention`` without mask or bias, as two products and a softmax."""
    extras = [*call.args[3:], *(v for k, v in call.kwargs.items() if k in ("bias", "mask", "is_causal"))]
    if len(call.inputs) != 3 or any(e is not None and e is not False for e in extras):
        raise NoRule("slimline has a rule for it only without mask and bias")
    q, k, v = (reader.name(t) for t in call.inputs)
    batch, length, heads, _ = reader.shape(call.inputs[0])
    if reader.shape(call.inputs[1])[2] != heads:
        raise NoRule("slimline has no rule for it with fewer key heads than query heads")
    sizes = (batch, heads, length, reader.shape(call.inputs[1])[1])
    scores = reader.intermediate(f"{call.name}/scores", sizes, q)
    weights = reader.intermediate(f"{call.name}/softmax", sizes, q)
    reader.part(call, scores, "einsum", [q, k], [scores], ops.einsum("atnd,asnd->ants"))
    reader.part(call, weights, "softmax", [scores], [weights], ops.softmax(4, 3))
    reader.node(call, "einsum", [weights, v], ops.einsum("ants,asnd->atnd"))


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
        "HardSilu Elu Selu Gelu Celu TanhShrink HardTanh HardShrink Threshold",
    ),
    **_each(
        numpy_ops,
        "Absolute Add Ceil Clip Cos Cosh Divide DivideNoNan Equal Exp Expm1 Floor FloorDivide Greater GreaterEqual "
        "Less LessEqual Log Log1p Log2 Log10 LogicalAnd LogicalNot LogicalOr Maximum Minimum Mod Multiply Negative "
        "NotEqual OnesLike Power Reciprocal Round Sign Sin Sinh Sqrt Square Subtract Tan Tanh TrueDivide Where "
        "ZerosLike",
    ),
    **_each(math_ops, "Erf Rsqrt"),
    **_each(core, "Cast StopGradient ConvertToTensor", elementwise("identity")),
    numpy_ops.Copy: elementwise("identity"),
    **_each(numpy_ops, "Cumsum Cumprod Flip", along_whole_axis),
    numpy_ops.Roll: along_whole_axis,
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
    nn.MaxPool: pool("max"),
    nn.AveragePool: pool("mean"),
    image.Resize: pool("resize"),
    nn.Glu: glu,
    **_each(numpy_ops, "Repeat Tile", copies),
    **_each(nn, "Softmax LogSoftmax", softmax),
    **_each(numpy_ops, "Reshape Squeeze ExpandDims Ravel", reshape),
    numpy_ops.Transpose: transpose,
    numpy_ops.Swapaxes: swapaxes,
    numpy_ops.Moveaxis: moveaxis,
    numpy_ops.Concatenate: concatenate,
    numpy_ops.Stack: stack,
    numpy_ops.Split: split,
    core.Unstack: unstack,
    numpy_ops.GetItem: getitem,
    numpy_ops.Take: take,
    numpy_ops.Pad: pad,
    numpy_ops.BroadcastTo: broadcast_to,
    numpy_ops.Matmul: matmul,
    numpy_ops.Einsum: einsum,
    nn.DotProductAttention: attention,
}
