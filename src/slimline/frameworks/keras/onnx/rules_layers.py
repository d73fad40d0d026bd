"""Rules of norms, softmax with masks, reductions, pools and resizing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.src.ops import image, linalg, nn  # the classes behind keras.ops
from keras.src.ops import math as math_ops
from keras.src.ops import numpy as numpy_ops

from slimline.frameworks.keras.functional import Call
from slimline.frameworks.keras.onnx.rules_elementwise import number
from slimline.frameworks.keras.onnx.rules_elementwise import softmax as along
from slimline.frameworks.keras.onnx.rules_kernels import each_of, padded, spatial
from slimline.frameworks.keras.onnx.writer import (
    Array,
    Operand,
    Placed,
    Rule,
    Stored,
    Writer,
    channels_first,
    dtype_of,
    numbers,
    straight,
)
from slimline.frameworks.keras.reader import NoRule

L = keras.layers


def axes_of(axis: Any, rank: int) -> list[int]:
    """The dimensions that an operation is about; all for None."""
    return list(range(rank)) if axis is None else sorted(a % rank for a in keras.tree.flatten(axis))


def _spread(vector: Stored, axes: Sequence[int], rank: int) -> Stored:
    """An array over some dimensions of a tensor, as it broadcasts against it."""
    if vector.array.ndim != len(axes):
        return vector
    shape = [1] * rank
    for axis, n in zip(axes, vector.array.shape, strict=True):
        shape[axis] = n
    return Stored(vector.array.reshape(shape), vector.name)


def batch_norm(w: Writer, call: Call) -> Operand:
    """`BatchNormalization` by stored statistics."""
    layer = call.operation
    vectors = [None if v is None else w.parameter(v) for v in (layer.gamma, layer.beta)]
    statistics = [w.parameter(v) for v in (layer.moving_mean, layer.moving_variance)]
    return _batch_norm(w, w.source(call), layer.axis, vectors, statistics, layer.epsilon)


def batch_norm_op(w: Writer, call: Call) -> Operand:
    """Batch normalisation by arrays."""
    names = ("scale", "offset", "mean", "variance")
    held = [w.argument(call, name) for name in names]
    vectors = [None if v is None else w.operand(v) for v in held]
    if any(isinstance(v, Placed) for v in vectors):
        raise NoRule("its statistics are computed and not stored")
    stored = [v if isinstance(v, Stored) else None for v in vectors]
    statistics = [v for v in stored[2:] if v is not None]
    (axis,) = keras.tree.flatten(call.operation.axis)
    return _batch_norm(w, w.source(call), axis, stored[:2], statistics, call.operation.epsilon)


def _batch_norm(
    w: Writer, x: Operand, axis: int, vectors: Sequence[Stored | None], statistics: Sequence[Stored], epsilon: float
) -> Operand:
    rank = len(x.shape)
    axis %= rank
    mean, variance = (s.array for s in statistics)
    gamma, beta = (
        np.full(mean.shape, default, mean.dtype) if v is None else v.array
        for v, default in zip(vectors, (1.0, 0.0), strict=True)
    )
    placed = w.placed(x)
    if rank > 2 and placed.at(axis) == 1:
        value = w.op("BatchNormalization", placed.value, gamma, beta, mean, variance, epsilon=float(epsilon))
        return w.place(value, placed.order, placed.shape, placed.dtype)
    factor = gamma.astype(np.float64) / np.sqrt(variance.astype(np.float64) + epsilon)
    shift = beta - mean * factor
    scale, offset = (_spread(Stored(v.astype(mean.dtype)), [axis], rank) for v in (factor, shift))
    return w.each("Add", w.each("Mul", placed, scale), offset)


def layer_norm(w: Writer, call: Call) -> Operand:
    """`LayerNormalization` over any axes."""
    layer, x = call.operation, w.source(call)
    vectors = [None if v is None else w.parameter(v) for v in (layer.gamma, layer.beta)]
    return _layer_norm(w, x, axes_of(layer.axis, len(x.shape)), vectors, layer.epsilon, layer.rms_scaling)


def layer_norm_op(w: Writer, call: Call) -> Operand:
    """Layer normalisation by tensors."""
    operation, x = call.operation, w.source(call)
    held = [w.argument(call, name) for name in ("gamma", "beta")]
    vectors = [None if v is None else w.operand(v, x.dtype) for v in held]
    epsilon = keras.config.epsilon() if operation.epsilon is None else operation.epsilon
    return _layer_norm(w, x, axes_of(operation.axis, len(x.shape)), vectors, epsilon, operation.rms_scaling)


def _layer_norm(
    w: Writer, x: Operand, axes: list[int], vectors: Sequence[Operand | None], epsilon: float, rms: bool
) -> Operand:
    rank = len(x.shape)
    gamma, beta = (_spread(v, axes, rank) if isinstance(v, Stored) else v for v in vectors)
    if any(v is not None and isinstance(v, Placed) and axes != [rank - 1] for v in vectors):
        raise NoRule("slimline has no rule for a computed scale or shift over several axes")
    trailing = axes == list(range(axes[0], rank)) and not rms
    if trailing and all(x.shape[a] is not None for a in axes) and not any(isinstance(v, Placed) for v in vectors):
        inner = tuple(w.size(x, a) for a in axes)
        scale, shift = (
            None if v is None else v.array.reshape(inner) for v in vectors if v is None or isinstance(v, Stored)
        )
        scale = np.ones(inner, x.dtype) if scale is None else scale
        value = w.op("LayerNormalization", w.plain(x), scale, shift, axis=axes[0], epsilon=float(epsilon))
        return w.place(value, straight(rank), x.shape, x.dtype)
    centred = w.each("Sub", x, w.reduce("ReduceMean", x, axes, keepdims=True))
    variance = w.reduce("ReduceMean", w.each("Mul", centred, centred), axes, keepdims=True)
    y = w.each("Div", x if rms else centred, w.each("Sqrt", w.each("Add", variance, float(epsilon))))
    y = y if gamma is None else w.each("Mul", y, gamma)
    return y if beta is None or rms else w.each("Add", y, beta)


def rms_norm(w: Writer, call: Call) -> Operand:
    """`RMSNormalization`."""
    layer, x = call.operation, w.source(call)
    axes = axes_of(layer.axis, len(x.shape))
    return _rms_norm(w, x, axes, _spread(w.parameter(layer.scale), axes, len(x.shape)), layer.epsilon)


def rms_norm_op(w: Writer, call: Call) -> Operand:
    """RMS normalisation by a tensor."""
    operation, x = call.operation, w.source(call)
    scale = w.argument(call, "scale")
    epsilon = keras.config.epsilon() if operation.epsilon is None else operation.epsilon
    axes = axes_of(operation.axis, len(x.shape))
    return _rms_norm(w, x, axes, None if scale is None else w.operand(scale, x.dtype), epsilon)


def _rms_norm(w: Writer, x: Operand, axes: list[int], scale: Operand | None, epsilon: float) -> Operand:
    mean = w.reduce("ReduceMean", w.each("Mul", x, x), axes, keepdims=True)
    y = w.each("Div", x, w.each("Sqrt", w.each("Add", mean, float(epsilon))))
    return y if scale is None else w.each("Mul", y, scale)


def group_norm(w: Writer, call: Call) -> Operand:
    """`GroupNormalization`, by one instance norm over rows of groups."""
    layer, x = call.operation, w.source(call)
    rank = len(x.shape)
    axis = layer.axis % rank
    groups = w.size(x, axis) if layer.groups == -1 else layer.groups
    order = channels_first(rank, axis)
    first = w.ordered(x, order)
    rows = w.op("Reshape", first, numbers(0, groups, -1))
    ones, zeros = np.ones(groups, x.dtype), np.zeros(groups, x.dtype)
    normed = w.op("InstanceNormalization", rows, ones, zeros, epsilon=float(layer.epsilon))
    sizes = [x.shape[d] for d in order]
    target = numbers(*(-1 if n is None else n for n in sizes)) if sizes.count(None) <= 1 else w.op("Shape", first)
    y: Operand = w.place(w.op("Reshape", normed, target), order, x.shape, x.dtype)
    for kind, variable in (
        ("Mul", layer.gamma if layer.scale else None),
        ("Add", layer.beta if layer.center else None),
    ):
        if variable is not None:
            y = w.each(kind, y, _spread(w.parameter(variable), [axis], rank))
    return y


def normalize(w: Writer, call: Call) -> Operand:
    """Division by the length over some axes."""
    operation, x = call.operation, w.source(call)
    if getattr(operation, "order", 2) != 2:
        raise NoRule("slimline has a rule only for order=2")
    epsilon = 1e-12 if isinstance(operation, L.Layer) else operation.epsilon
    epsilon = keras.config.epsilon() if epsilon is None else epsilon
    length = w.reduce("ReduceL2", x, axes_of(operation.axis, len(x.shape)), keepdims=True)
    return w.each("Div", x, w.each("Max", length, float(epsilon)))


def softmax(w: Writer, call: Call) -> Operand:
    """`Softmax` and its like over some axes, with or without a mask of what it may look at."""
    x, axis, mask = w.source(call), call.operation.axis, w.argument(call, "mask")
    logarithm = type(call.operation) is nn.LogSoftmax
    seen = None
    if mask is not None:
        seen = w.operand(mask)
        if seen.dtype != "bool":
            seen = w.each("Greater", seen, 0.5, dtype="bool")
        least = -3e4 if x.dtype == "float16" else -1e9
        x = w.each("Where", seen, x, number(x, least), dtype=x.dtype)
    axes = axes_of(axis, len(x.shape))
    if len(axes) == 1:
        y = along(w, x, axes[0], logarithm)
    else:
        shifted = w.each("Sub", x, w.reduce("ReduceLogSumExp", x, axes, keepdims=True))
        y = shifted if logarithm else w.each("Exp", shifted)
    return y if seen is None else w.each("Where", seen, y, number(y, 0.0), dtype=y.dtype)


def masking(w: Writer, call: Call) -> Operand:
    """`Masking`: steps of which every feature is the same number become zero."""
    x = w.source(call)
    other = w.cast(w.each("Not", w.each("Equal", x, float(call.operation.mask_value), dtype="bool")), "int32")
    seen = w.cast(w.reduce("ReduceMax", other, [-1], keepdims=True), "bool")
    return w.each("Where", seen, x, number(x, 0.0), dtype=x.dtype)


# -- reductions --------------------------------------------------------------------


def reduction(kind: str) -> Rule:
    """Rule of a reduction over `axis` (None: all)."""

    def rule(w: Writer, call: Call) -> Operand:
        x = w.cast(w.source(call), dtype_of(call))
        return w.reduce(kind, x, axes_of(call.operation.axis, len(x.shape)), bool(call.operation.keepdims))

    return rule


def truth(kind: str) -> Rule:
    """Rule of whether all, or any, are true."""

    def rule(w: Writer, call: Call) -> Operand:
        x = w.cast(w.cast(w.source(call), "bool"), "int32")
        return w.reduce(kind, x, axes_of(call.operation.axis, len(x.shape)), bool(call.operation.keepdims))

    return rule


def variance(root: bool) -> Rule:
    """Rule of variance or standard deviation."""

    def rule(w: Writer, call: Call) -> Operand:
        x = w.cast(w.source(call), dtype_of(call))
        axes = axes_of(call.operation.axis, len(x.shape))
        spread = _variance(w, x, axes, bool(call.operation.keepdims))
        return w.each("Sqrt", spread) if root else spread

    return rule


def _variance(w: Writer, x: Operand, axes: Sequence[int], keepdims: bool) -> Placed:
    centred = w.each("Sub", x, w.reduce("ReduceMean", x, axes, keepdims=True))
    return w.reduce("ReduceMean", w.each("Mul", centred, centred), axes, keepdims)


def moments(w: Writer, call: Call) -> list[Operand]:
    """Mean and variance."""
    x, operation = w.source(call), call.operation
    axes = axes_of(operation.axes, len(x.shape))
    return [w.reduce("ReduceMean", x, axes, bool(operation.keepdims)), _variance(w, x, axes, bool(operation.keepdims))]


def norm(w: Writer, call: Call) -> Operand:
    """The length of vectors."""
    x, operation = w.source(call), call.operation
    axes = axes_of(operation.axis, len(x.shape))
    kinds = {None: "ReduceL2", "fro": "ReduceL2", 2: "ReduceL2", 1: "ReduceL1"}
    if operation.ord not in kinds or (len(axes) > 1 and operation.ord not in (None, "fro")):
        raise NoRule("slimline has no rule for this norm")
    return w.reduce(kinds[operation.ord], x, axes, bool(operation.keepdims))


def place(kind: str) -> Rule:
    """Rule of the place of the largest or smallest."""

    def rule(w: Writer, call: Call) -> Operand:
        operation, x = call.operation, w.placed(w.source(call))
        if operation.axis is None:
            raise NoRule("slimline has no rule for it without an axis")
        axis = operation.axis % len(x.order)
        value = w.op(kind, x.value, axis=x.at(axis), keepdims=int(bool(operation.keepdims)))
        if operation.keepdims:
            shape = tuple(1 if d == axis else n for d, n in enumerate(x.shape))
            return w.place(value, x.order, shape, "int64")
        left = w.without(value, x, [axis])
        return w.place(value, left.order, left.shape, "int64")

    return rule


def global_pool(kind: str) -> Rule:
    """Rule of pooling over all places, or over the steps that count."""

    def rule(w: Writer, call: Call) -> Operand:
        layer, x = call.operation, w.source(call)
        axes, _ = spatial(layer, len(x.shape))
        if len(call.inputs) == 1:
            return w.reduce(kind, x, axes, layer.keepdims)
        mask = w.widened(w.cast(w.operand(call.inputs[1]), x.dtype), [2 if axes == (1,) else 1])
        total = w.reduce("ReduceSum", w.each("Mul", x, mask), axes, layer.keepdims)
        return w.each("Div", total, w.reduce("ReduceSum", mask, axes, layer.keepdims))

    return rule


# -- pools and resizing ------------------------------------------------------------


def pool(kind: str) -> Rule:
    """Rule of local pooling."""

    def rule(w: Writer, call: Call) -> Operand:
        operation, x = call.operation, w.source(call)
        rank = len(x.shape)
        axes, channel = spatial(operation, rank)
        size = each_of(operation.pool_size, rank - 2)
        strides = size if operation.strides is None else each_of(operation.strides, rank - 2)
        padding = padded(operation.padding, [x.shape[a] for a in axes], size, strides, [1] * (rank - 2))
        order = channels_first(rank, channel)
        value = w.op(kind, w.ordered(x, order), kernel_shape=size, strides=strides, **padding)
        return w.place(value, order, w.shape(call.outputs[0]), x.dtype)

    return rule


def adaptive(mean: bool) -> Rule:
    """Rule of pooling to a number of places, whose windows may differ by one."""

    def rule(w: Writer, call: Call) -> Operand:
        x: Operand = w.source(call)
        axes, _ = spatial(call.operation, len(x.shape))
        for axis in axes:
            out = w.shape(call.outputs[0])[axis]
            assert out is not None
            x = _adapted(w, x, axis, w.size(x, axis), out, mean)
        return x

    return rule


def _adapted(w: Writer, x: Operand, axis: int, size: int, out: int, mean: bool) -> Operand:
    windows = [(i * size // out, math.ceil((i + 1) * size / out)) for i in range(out)]
    shape = tuple(out if d == axis else n for d, n in enumerate(x.shape))
    if mean:
        matrix = np.zeros((size, out), x.dtype)
        for i, (start, stop) in enumerate(windows):
            matrix[start:stop, i] = 1 / (stop - start)
        return _weighed(w, x, axis, matrix)
    placed = w.placed(x)
    at = placed.at(axis)
    parts = []
    for start, stop in windows:
        part = w.op("Slice", placed.value, numbers(start), numbers(stop), numbers(at))
        parts.append(w.op("ReduceMax", part, numbers(at), keepdims=1))
    return w.place(w.op("Concat", *parts, axis=at), placed.order, shape, placed.dtype)


def _weighed(w: Writer, x: Operand, axis: int, matrix: Array) -> Placed:
    """With weighted sums, the columns of a matrix, in place of the positions of an axis."""
    shape = tuple(matrix.shape[1] if d == axis else n for d, n in enumerate(x.shape))
    order = (*(d for d in straight(len(x.shape)) if d != axis), axis)
    return w.place(w.op("MatMul", w.ordered(x, order), matrix), order, shape, x.dtype)


def upsampling(w: Writer, call: Call) -> Operand:
    """Places repeated, or interpolated between."""
    layer, x = call.operation, w.source(call)
    axes, _ = spatial(layer, len(x.shape))
    factors = each_of(layer.size, len(axes))
    return _resized(w, call, x, axes, factors, getattr(layer, "interpolation", "nearest"))


def resizing(w: Writer, call: Call) -> Operand:
    """Images of another size."""
    operation, x = call.operation, w.source(call)
    if operation.crop_to_aspect_ratio or operation.pad_to_aspect_ratio:
        raise NoRule("slimline has a rule only for resizing without cropping and padding")
    if len(x.shape) != 4:
        raise NoRule("slimline has no rule for it without a batch")
    axes, _ = spatial(operation, 4)
    return _resized(w, call, w.cast(x, dtype_of(call)), axes, None, operation.interpolation)


_MODES: Mapping[str, dict[str, Any]] = {
    "nearest": {"mode": "nearest", "nearest_mode": "round_prefer_ceil"},
    "bilinear": {"mode": "linear"},
}


_LAST = {"data_format": "channels_last"}


def _resized(
    w: Writer, call: Call, x: Operand, axes: Sequence[int], factors: Sequence[int] | None, interpolation: str
) -> Operand:
    smooth = {"interpolation": interpolation, "antialias": getattr(call.operation, "antialias", False)}
    if interpolation not in _MODES or smooth["antialias"]:  # Keras' own numbers, which come from coarse tables
        for axis in axes:
            size = w.size(x, axis)
            after = (call.outputs[0].shape[axis], 1)
            columns = ops.image.resize(np.eye(size, dtype=x.dtype)[None, :, None], after, **_LAST, **smooth)
            x = _weighed(w, x, axis, keras.ops.convert_to_numpy(columns)[0, :, 0].T.copy())
        return x
    shape, rank = w.shape(call.outputs[0]), len(x.shape)
    (channel,) = set(range(1, rank)) - set(axes)
    order = channels_first(rank, channel)
    first = w.ordered(x, order)
    how = {"coordinate_transformation_mode": "half_pixel", **_MODES[interpolation]}
    if factors is not None:
        scales = np.array([1.0, 1.0, *factors], np.float32)
        if interpolation == "nearest":
            how |= {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        value = w.op("Resize", first, None, scales, **how)
    else:
        left = w.op("Shape", first, start=0, end=2)
        sizes = w.op("Concat", left, numbers(*(int(n) for a in axes if (n := shape[a]) is not None)), axis=0)
        value = w.op("Resize", first, None, None, sizes, **how)
    return w.place(value, order, shape, x.dtype)


LAYERS: Mapping[type, Rule] = {
    L.BatchNormalization: batch_norm,
    L.LayerNormalization: layer_norm,
    L.RMSNormalization: rms_norm,
    L.GroupNormalization: group_norm,
    L.UnitNormalization: normalize,
    L.Softmax: softmax,
    L.Masking: masking,
    **dict.fromkeys((L.MaxPooling1D, L.MaxPooling2D, L.MaxPooling3D, nn.MaxPool), pool("MaxPool")),
    **dict.fromkeys((L.AveragePooling1D, L.AveragePooling2D, L.AveragePooling3D, nn.AveragePool), pool("AveragePool")),
    **dict.fromkeys((L.GlobalMaxPooling1D, L.GlobalMaxPooling2D, L.GlobalMaxPooling3D), global_pool("ReduceMax")),
    **dict.fromkeys(
        (L.GlobalAveragePooling1D, L.GlobalAveragePooling2D, L.GlobalAveragePooling3D), global_pool("ReduceMean")
    ),
    **dict.fromkeys((*(getattr(L, f"AdaptiveMaxPooling{n}D") for n in (1, 2, 3)), nn.AdaptiveMaxPool), adaptive(False)),
    **dict.fromkeys(
        (*(getattr(L, f"AdaptiveAveragePooling{n}D") for n in (1, 2, 3)), nn.AdaptiveAveragePool), adaptive(True)
    ),
    **dict.fromkeys((L.UpSampling1D, L.UpSampling2D, L.UpSampling3D), upsampling),
    L.Resizing: resizing,
    image.Resize: resizing,
    nn.Softmax: softmax,
    nn.LogSoftmax: softmax,
    nn.LayerNorm: layer_norm_op,
    nn.RMSNorm: rms_norm_op,
    nn.BatchNorm: batch_norm_op,
    nn.Normalize: normalize,
    nn.Moments: moments,
    linalg.Norm: norm,
    math_ops.Logsumexp: reduction("ReduceLogSumExp"),
    numpy_ops.Mean: reduction("ReduceMean"),
    numpy_ops.Sum: reduction("ReduceSum"),
    numpy_ops.Prod: reduction("ReduceProd"),
    **dict.fromkeys((numpy_ops.Max, numpy_ops.Amax), reduction("ReduceMax")),
    **dict.fromkeys((numpy_ops.Min, numpy_ops.Amin), reduction("ReduceMin")),
    numpy_ops.Any: truth("ReduceMax"),
    numpy_ops.All: truth("ReduceMin"),
    numpy_ops.Var: variance(root=False),
    numpy_ops.Std: variance(root=True),
    numpy_ops.Argmax: place("ArgMax"),
    numpy_ops.Argmin: place("ArgMin"),
}
