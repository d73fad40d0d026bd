"""Rules of what multiplies: convolutions, linear layers, products of tensors, tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras.src.ops import image, nn  # the classes behind keras.ops
from keras.src.ops import numpy as numpy_ops

from slimline.frameworks.keras.functional import Call
from slimline.frameworks.keras.onnx.writer import (
    Array,
    Operand,
    Placed,
    Rule,
    Shape,
    Stored,
    Writer,
    channels_first,
    dtype_of,
    straight,
)
from slimline.frameworks.keras.reader import NoRule
from slimline.frameworks.keras.rounding import Formatted
from slimline.methods.formats import Format

L = keras.layers


def spatial(operation: Any, rank: int) -> tuple[tuple[int, ...], int]:
    """The dimensions between batch and channels, and that of the channels."""
    layout = getattr(operation, "data_format", None) or keras.config.image_data_format()
    return (tuple(range(1, rank - 1)), rank - 1) if layout == "channels_last" else (tuple(range(2, rank)), 1)


def each_of(value: Any, count: int) -> list[int]:
    """A number per dimension, where one may stand for all."""
    return [int(value)] * count if isinstance(value, int) else [int(n) for n in value]


def padded(
    padding: str, sizes: Sequence[int | None], kernel: Sequence[int], strides: Sequence[int], dilation: Sequence[int]
) -> dict[str, Any]:
    """TensorFlow's padding as attributes of a convolution or pool."""
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    if padding == "valid":
        return {}
    if padding == "causal":
        return {"pads": [n - 1 for n in reach] + [0] * len(reach)}
    totals = []
    for size, width, stride in zip(sizes, reach, strides, strict=True):
        if size is None and stride > 1:  # how much it is depends on the size
            return {"auto_pad": "SAME_UPPER"}
        steps = 0 if size is None else (math.ceil(size / stride) - 1) * stride - size
        totals.append(max(width - 1 if size is None else steps + width, 0))
    return {"pads": [n // 2 for n in totals] + [n - n // 2 for n in totals]} if any(totals) else {}


def _format(layer: Any) -> Format | None:
    return layer.format if isinstance(layer, Formatted) else None


def _bias(w: Writer, layer: Any) -> Any:
    return None if layer.bias is None else w.weight(w.parameter(layer.bias), "bias", lambda a: a)


def conv(depthwise: bool = False) -> Rule:
    """Rule of a convolution layer."""

    def rule(w: Writer, call: Call) -> Placed:
        layer = call.operation
        kernel = w.parameter(layer.kernel)
        groups = 1 if depthwise else layer.groups
        return _conv(w, call, w.source(call), kernel, _bias(w, layer), depthwise, groups, _format(layer))

    return rule


def conv_op(depthwise: bool = False) -> Rule:
    """Rule of a bare convolution by a stored kernel."""

    def rule(w: Writer, call: Call) -> Placed:
        x, kernel = (w.operand(w.argument(call, name)) for name in ("inputs", "kernel"))
        if not isinstance(kernel, Stored):
            raise NoRule("its kernel is computed and not stored")
        channels = x.shape[spatial(call.operation, len(x.shape))[1]]
        groups = 1 if depthwise or channels is None else channels // kernel.array.shape[-2]
        return _conv(w, call, x, kernel, None, depthwise, groups, None)

    return rule


def _conv(
    w: Writer, call: Call, x: Operand, kernel: Stored, bias: Any, depthwise: bool, groups: int, each: Format | None
) -> Placed:
    operation, rank = call.operation, len(x.shape)
    axes, channel = spatial(operation, rank)
    size = kernel.array.shape[:-2]
    strides, dilation = (each_of(n, rank - 2) for n in (operation.strides, operation.dilation_rate))
    padding = padded(operation.padding, [x.shape[a] for a in axes], size, strides, dilation)
    inputs = kernel.array.shape[-2]

    def arrange(array: Array) -> Array:
        if not depthwise:
            return np.moveaxis(array, (-1, -2), (0, 1))
        first = np.moveaxis(array, (-2, -1), (0, 1))
        return first.reshape(-1, 1, *size)

    value = w.op(
        "Conv",
        w.ordered(x, channels_first(rank, channel)),
        w.weight(kernel, "kernel", arrange, each),
        bias,
        kernel_shape=list(size),
        strides=strides,
        dilations=dilation,
        group=inputs if depthwise else groups,
        **padding,
    )
    return w.place(value, channels_first(rank, channel), w.shape(call.outputs[0]), x.dtype)


def conv_transpose(w: Writer, call: Call) -> Placed:
    """A transposed convolution: of TensorFlow the gradient of one that pads as this one says."""
    layer, x = call.operation, w.source(call)
    rank = len(x.shape)
    axes, channel = spatial(layer, rank)
    strides, dilation = (each_of(n, rank - 2) for n in (layer.strides, layer.dilation_rate))
    before, after, extra = [], [], []
    for axis, k, s, d in zip(axes, layer.kernel_size, strides, dilation, strict=True):
        n, out = w.example_shape(call.inputs[0])[axis], w.example_shape(call.outputs[0])[axis]
        reach = (n - 1) * s + d * (k - 1) + 1
        before.append(0 if layer.padding == "valid" else max(reach - out, 0) // 2)
        after.append(max(reach - before[-1] - out, 0))
        extra.append(max(out - reach + before[-1], 0))
    value = w.op(
        "ConvTranspose",
        w.ordered(x, channels_first(rank, channel)),
        w.weight(w.parameter(layer.kernel), "kernel", lambda a: np.moveaxis(a, (-1, -2), (0, 1)), _format(layer)),
        _bias(w, layer),
        kernel_shape=list(layer.kernel_size),
        strides=strides,
        dilations=dilation,
        pads=before + after,
        output_padding=[min(n, max(s, d) - 1) for n, s, d in zip(extra, strides, dilation, strict=True)],
    )
    y = w.place(value, channels_first(rank, channel), w.shape(call.outputs[0]), x.dtype)
    missing = [n - min(n, max(s, d) - 1) for n, s, d in zip(extra, strides, dilation, strict=True)]
    if not any(missing):
        return y
    if layer.bias is not None:
        raise NoRule("its output is padded by more than its stride")
    pads = np.array([0] * (rank + 2) + missing, np.int64)
    return w.place(w.op("Pad", value, pads), y.order, y.shape, y.dtype)


def dense(w: Writer, call: Call) -> Placed:
    """`Dense`, which works on the last dimension of any rank."""
    layer = call.operation
    return _linear(w, call, w.source(call), w.parameter(layer.kernel), layer.bias, _format(layer))


def _linear(w: Writer, call: Call, x: Operand, kernel: Stored, bias: Any, each: Format | None) -> Placed:
    rank, shape = len(x.shape), w.shape(call.outputs[0])
    x = w.cast(x, kernel.dtype)
    if rank == 2 and kernel.name not in w.marked:
        matrix = w.weight(kernel, "kernel", np.transpose, each)
        offset = None if bias is None else w.weight(w.parameter(bias), "bias", lambda a: a)
        return w.place(w.op("Gemm", w.plain(x), matrix, offset, transB=1), straight(2), shape, x.dtype)
    product = w.op("MatMul", w.plain(x), w.weight(kernel, "kernel", lambda a: a, each))
    y = w.place(product, straight(rank), shape, x.dtype)
    return y if bias is None else w.each("Add", y, w.parameter(bias))


def einsum_dense(w: Writer, call: Call) -> Operand:
    """`EinsumDense`."""
    layer, x = call.operation, w.source(call)
    kernel = w.parameter(layer.kernel)
    y = einsum(w, layer.equation, [x, kernel], "kernel", _format(layer))
    if layer.bias is None:
        return y
    bias = w.parameter(layer.bias)
    return w.each("Add", y, bias)


def einsum_op(w: Writer, call: Call) -> Operand:
    """A bare einsum."""
    tensors = keras.tree.flatten(call.args)
    return einsum(w, call.operation.subscripts, [w.operand(t, dtype_of(call)) for t in tensors])


def einsum(
    w: Writer, equation: str, operands: Sequence[Operand], what: str = "kernel", each: Format | None = None
) -> Placed:
    """A product of tensors; by a matrix product where it is one, since runtimes know that best."""
    text = equation.replace(" ", "")
    left, arrow, right = text.partition("->")
    if not arrow:
        raise NoRule(f"slimline has no rule for the equation {equation!r}")
    letters = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in text]
    dims = left.split(",")
    hidden = max(
        (len(x.shape) - len(d.replace("...", "")) for d, x in zip(dims, operands, strict=True) if "." in d), default=0
    )
    more = "".join(letters[:hidden])
    sides = [
        d.replace("...", more[hidden - (len(x.shape) - len(d.replace("...", ""))) :] if "." in d else "")
        for d, x in zip(dims, operands, strict=True)
    ]
    right = right.replace("...", more)
    sizes: dict[str, int | None] = {}
    for side, x in zip(sides, operands, strict=True):
        if len(set(side)) < len(side):
            raise NoRule(f"slimline has no rule for the equation {equation!r}")
        sizes |= dict(zip(side, x.shape, strict=True))
    shape = tuple(sizes[c] for c in right)
    if len(operands) == 2:
        (a, b), (one, other) = sides, operands
        if isinstance(one, Stored) and isinstance(other, Placed):
            (a, b), (one, other) = (b, a), (other, one)
        if isinstance(other, Stored) and not set(a) & set(b) & set(right) and not set(b) - set(a) - set(right):
            return _weighted(w, (a, b, right), w.placed(one), other, sizes, what, each)
        product = _matmul(w, (a, b, right), one, other, sizes) if each is None else None
        if product is not None:
            return product
    if each is not None:
        raise NoRule(f"slimline has no rule for the equation {equation!r} with a rounded weight")
    value = w.op("Einsum", *map(w.plain, operands), equation=f"{','.join(sides)}->{right}")
    return w.place(value, straight(len(right)), shape, operands[0].dtype)


def _weighted(
    w: Writer, sides: tuple[str, str, str], x: Placed, weight: Stored, sizes: Mapping[str, int | None], what: str,
    each: Format | None,
) -> Placed:  # fmt: skip
    """By a stored tensor: a matrix from the summed dimensions to the new ones, as a linear layer has it."""
    a, b, right = sides
    if set(a) - set(b) - set(right):
        raise NoRule("slimline has no rule for a sum over a dimension that the weight has not")
    summed, new = [c for c in b if c in a], [c for c in b if c not in a]
    free = [c for c in a if c not in summed]
    turned = w.transposed(x, [a.index(c) for c in (*free, *summed)])
    inner = math.prod(w.size(x, a.index(c)) for c in summed)
    if len(summed) != 1:
        turned = w.reshaped(turned, (*(sizes[c] for c in free), inner))

    def arrange(array: Array) -> Array:
        return np.transpose(array, [b.index(c) for c in (*summed, *new)]).reshape(inner, -1)

    wide = math.prod(n for c in new if (n := sizes[c]) is not None)
    product = w.op("MatMul", w.plain(turned), w.weight(weight, what, arrange, each))
    y: Operand = w.place(product, straight(len(free) + 1), (*(sizes[c] for c in free), wide), x.dtype)
    if len(new) != 1:
        y = w.reshaped(y, (*(sizes[c] for c in free), *(sizes[c] for c in new)))
    result = [*free, *new]
    return w.placed(w.transposed(y, [result.index(c) for c in right]))


def _matmul(
    w: Writer, sides: tuple[str, str, str], one: Operand, other: Operand, sizes: Mapping[str, int | None]
) -> Placed | None:
    """A product of two tensors that is one of matrices, sample by sample; None where it is none."""
    a, b, right = sides
    batch = [c for c in a if c in b and c in right]
    summed = [c for c in a if c in b and c not in right]
    rows, columns = [c for c in a if c not in b], [c for c in b if c not in a]
    plain = len(summed) == len(rows) == len(columns) == 1 and set(rows + columns) <= set(right)
    known = all(len({x.shape[s.index(c)] for s, x in zip(sides, (one, other), strict=False)}) == 1 for c in batch)
    if not plain or not known:
        return None
    first = w.transposed(one, [a.index(c) for c in (*batch, *rows, *summed)])
    second = w.transposed(other, [b.index(c) for c in (*batch, *summed, *columns)])
    result = [*batch, *rows, *columns]
    value = w.op("MatMul", w.plain(first), w.plain(second))
    y = w.place(value, straight(len(result)), tuple(sizes[c] for c in result), one.dtype)
    return w.placed(w.transposed(y, [result.index(c) for c in right]))


def matmul(w: Writer, call: Call) -> Operand:
    """A matrix product; with a stored matrix on the right a linear layer."""
    x, y = (w.operand(a, dtype_of(call)) for a in w.arguments(call).values())
    if isinstance(y, Stored) and y.array.ndim == 2 and len(x.shape) > 1:
        return _linear(w, call, x, y, None, None)
    if not x.shape or not y.shape:
        return w.each("Mul", x, y)
    shape = w.shape(call.outputs[0])
    return w.place(w.op("MatMul", w.plain(x), w.plain(y)), straight(len(shape)), shape, x.dtype)


def dot_op(w: Writer, call: Call) -> Operand:
    """`ops.dot` where it is a matrix product."""
    shapes = [w.operand(a).shape for a in w.arguments(call).values()]
    if len(shapes[1]) > 2:
        raise NoRule("slimline has no rule for it with tensors of these ranks")
    return matmul(w, call)


def tensordot(w: Writer, call: Call) -> Operand:
    """Contraction of some axes of two tensors."""
    operands = [w.operand(a, dtype_of(call)) for a in list(w.arguments(call).values())[:2]]
    ranks = [len(x.shape) for x in operands]
    axes = call.operation.axes
    if isinstance(axes, int):
        axes = [range(ranks[0] - axes, ranks[0]), range(axes)]
    pairs = [[part] if isinstance(part, int) else list(part) for part in axes]
    return _contracted(w, operands, [[a % r for a in part] for part, r in zip(pairs, ranks, strict=True)], 0)


def _contracted(w: Writer, operands: Sequence[Operand], pairs: Sequence[Sequence[int]], batch: int) -> Placed:
    """The sum of products over pairs of dimensions, of tensors that share their first `batch` ones."""
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    left = [next(letters) for _ in operands[0].shape]
    right = [
        left[d] if d < batch else left[pairs[0][pairs[1].index(d)]] if d in pairs[1] else next(letters)
        for d in range(len(operands[1].shape))
    ]
    result = [c for c in left if c not in right or left.index(c) < batch] + [c for c in right if c not in left]
    return einsum(w, f"{''.join(left)},{''.join(right)}->{''.join(result)}", operands)


def dot(w: Writer, call: Call) -> Operand:
    """`Dot`: contraction of one axis of each of two tensors, sample by sample."""
    layer, operands = call.operation, [w.operand(t) for t in call.inputs]
    if layer.normalize:
        raise NoRule("slimline has no rule for it with normalize=True")
    axes = [layer.axes] * 2 if isinstance(layer.axes, int) else list(layer.axes)
    y = _contracted(w, operands, [[a % len(x.shape)] for a, x in zip(axes, operands, strict=True)], 1)
    return w.reshape(y, call.outputs[0]) if len(y.shape) == 1 else y


def embedding(w: Writer, call: Call) -> Placed:
    """`Embedding`: rows of a table."""
    layer = call.operation
    table = w.weight(w.parameter(layer.embeddings), "embeddings", lambda a: a, _format(layer))
    return rows(w, call, table, w.cast(w.source(call), "int32"))


def rows(w: Writer, call: Call, table: Any, indices: Operand, axis: int = 0) -> Placed:
    """Positions of a dimension of a value in the order of Keras."""
    shape: Shape = w.shape(call.outputs[0])
    return w.place(w.op("Gather", table, w.plain(indices), axis=axis), straight(len(shape)), shape, dtype_of(call))


def patches(w: Writer, call: Call) -> Placed:
    """Windows of an image, each place's channels one after the other: a convolution that picks."""
    operation, x = call.operation, w.source(call)
    if len(x.shape) != 4:
        raise NoRule("slimline has no rule for it without a batch")
    axes, channel = spatial(operation, 4)
    size, dilation = each_of(operation.size, 2), each_of(operation.dilation_rate, 2)
    strides = size if operation.strides is None else each_of(operation.strides, 2)
    channels = w.size(x, channel)
    picks = np.eye(math.prod(size) * channels, dtype=x.dtype).reshape(-1, *size, channels)
    order = channels_first(4, channel)
    value = w.op(
        "Conv",
        w.ordered(x, order),
        np.moveaxis(picks, -1, 1).copy(),
        kernel_shape=size,
        strides=strides,
        dilations=dilation,
        **padded(operation.padding, [x.shape[a] for a in axes], size, strides, dilation),
    )
    return w.place(value, order, w.shape(call.outputs[0]), x.dtype)


KERNELS: Mapping[type, Rule] = {
    **dict.fromkeys((L.Conv1D, L.Conv2D, L.Conv3D), conv()),
    **dict.fromkeys((L.DepthwiseConv1D, L.DepthwiseConv2D), conv(depthwise=True)),
    **dict.fromkeys((L.Conv1DTranspose, L.Conv2DTranspose, L.Conv3DTranspose), conv_transpose),
    L.Dense: dense,
    L.EinsumDense: einsum_dense,
    L.Embedding: embedding,
    L.Dot: dot,
    nn.Conv: conv_op(),
    nn.DepthwiseConv: conv_op(depthwise=True),
    image.ExtractPatches: patches,
    numpy_ops.Matmul: matmul,
    numpy_ops.Dot: dot_op,
    numpy_ops.Einsum: einsum_op,
    numpy_ops.Tensordot: tensordot,
}
