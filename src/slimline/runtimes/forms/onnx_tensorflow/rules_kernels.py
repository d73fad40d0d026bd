"""Convolutions, products, pools, norms, reductions: what TensorFlow computes by kernels that have the channels last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
import tensorflow as tf

from slimline.runtimes.forms.onnx_tensorflow.call import Call, Untranslatable, rule
from slimline.runtimes.forms.onnx_tensorflow.layout import (
    Array,
    Placed,
    Rounded,
    Value,
    placed,
    placed_last,
    straight,
)
from slimline.runtimes.forms.tensorflow import by_columns, einsum_by_columns, sizes_of

Pads = list[tuple[int, int]]


def _weight(call: Call, index: int, order: Sequence[int], rows: bool = False) -> Any:
    """A weight with its dimensions in another order, as one row of an image where `rows`."""
    value = call.inputs[index]
    if isinstance(value, Rounded):
        return value.laid_out(order, rows)
    if isinstance(value, np.ndarray):
        weight = tf.constant(np.ascontiguousarray(np.transpose(value, order)))
    else:
        weight = tf.transpose(call.tensor(index), order)
    return tf.expand_dims(weight, 0) if rows else weight


def _window(call: Call, kernel: Sequence[int], sizes: Sequence[int | None]) -> tuple[list[int], list[int], Pads]:
    """Strides, dilations and padding over the places of an image."""
    rank = len(kernel)
    strides = list(call.attribute("strides", [1] * rank))
    dilations = list(call.attribute("dilations", [1] * rank))
    automatic = call.attribute("auto_pad", "NOTSET")
    if automatic in ("NOTSET", "VALID"):
        amounts = list(call.attribute("pads", [0] * 2 * rank)) if automatic == "NOTSET" else [0] * 2 * rank
        return strides, dilations, list(zip(amounts[:rank], amounts[rank:], strict=True))
    pads = []
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        if size is None:
            raise Untranslatable(f"{call.node.op_type} with auto_pad over an open size")
        total = max((-(-size // stride) - 1) * stride + dilation * (k - 1) + 1 - size, 0)
        less, more = total // 2, total - total // 2
        pads.append((less, more) if automatic == "SAME_UPPER" else (more, less))
    return strides, dilations, pads


def _same(sizes: Sequence[int | None], kernel: Sequence[int], strides: Any, dilations: Any, pads: Pads) -> bool:
    """Whether TensorFlow's SAME pads as `pads` says."""
    for size, k, stride, dilation, pad in zip(sizes, kernel, strides, dilations, pads, strict=True):
        if size is None and stride != 1:
            return False
        reach = dilation * (k - 1) + 1
        total = reach - 1 if size is None else max((-(-size // stride) - 1) * stride + reach - size, 0)
        if pad != (total // 2, total - total // 2):
            return False
    return True


def _padded(x: Any, pads: Pads, value: float = 0.0) -> Any:
    """`x`, channels last, with places added around it."""
    if not any(map(any, pads)):
        return x
    paddings = [(0, 0), *pads, (0, 0)]
    return tf.pad(x, paddings) if value == 0 else tf.pad(x, paddings, constant_values=value)


def _with_bias(call: Call, y: Any) -> Any:
    return tf.nn.bias_add(y, call.tensor(2)) if call.has(2) else y


@rule("Conv")
def _convolution(call: Call) -> Value:
    x = call.operand(0)
    weight = call.inputs[1]
    shape = weight.array.shape if isinstance(weight, Rounded) else call.operand(1).shape
    kernel, groups = [int(n or 0) for n in shape[2:]], call.attribute("group", 1)
    sizes = x.shape[2:]
    strides, dilations, pads = _window(call, kernel, sizes)
    same = _same(sizes, kernel, strides, dilations, pads)
    image = x.channels_last
    if not same:
        image = _padded(image, pads)
    padding = "SAME" if same else "VALID"
    channels = x.shape[1]
    places = range(2, 2 + len(kernel))
    if groups == channels and groups > 1 and shape[1] == 1:
        return placed_last(_with_bias(call, _depthwise(call, image, kernel, strides, dilations, padding)))
    filters = _weight(call, 1, (*places, 1, 0), rows=len(kernel) == 1)
    if len(kernel) == 2:
        y = tf.nn.conv2d(image, filters, strides, padding, dilations=dilations)
    elif len(kernel) == 1:  # of one row, so that it stays one operator
        y = tf.nn.conv2d(tf.expand_dims(image, 1), filters, [1, *strides], padding, dilations=[1, *dilations])
        y = tf.squeeze(y, 1)
    elif len(kernel) == 3:
        y = tf.nn.conv3d(image, filters, [1, *strides, 1], padding, dilations=[1, *dilations, 1])
    else:
        raise Untranslatable(f"Conv over {len(kernel)} dimensions")
    return placed_last(_with_bias(call, y))


def _depthwise(call: Call, image: Any, kernel: list[int], strides: list[int], dilations: list[int], pad: str) -> Any:
    """A convolution of every channel by itself, with one or several results each."""
    if len(kernel) > 2:
        raise Untranslatable(f"depthwise Conv over {len(kernel)} dimensions")
    channels = image.shape[-1]
    outputs = (call.inputs[1].array if isinstance(call.inputs[1], Rounded) else call.constant(1)).shape[0]
    flat = len(kernel) == 1
    order = (1, 2, 0) if flat else (2, 3, 1, 0)  # 1 (of the group), places, outputs
    filters = _weight(call, 1, order)
    filters = tf.reshape(filters, [*(1, *kernel)[-2:], channels, outputs // channels])
    image = tf.expand_dims(image, 1) if flat else image
    strides, dilations = [1, *strides][-2:], [1, *dilations][-2:]
    y = tf.raw_ops.DepthwiseConv2dNative(
        input=image, filter=filters, strides=[1, *strides, 1], padding=pad, dilations=[1, *dilations, 1]
    )
    return tf.squeeze(y, 1) if flat else y


@rule("ConvTranspose")
def _transposed(call: Call) -> Value:
    x = call.operand(0)
    weight = call.inputs[1]
    shape = weight.array.shape if isinstance(weight, Rounded) else call.operand(1).shape
    kernel, groups = [int(n or 0) for n in shape[2:]], call.attribute("group", 1)
    flat = len(kernel) == 1
    if len(kernel) > 2:
        raise Untranslatable(f"ConvTranspose over {len(kernel)} dimensions")
    sizes = list(x.shape[2:])
    if None in sizes:
        raise Untranslatable("ConvTranspose over an open size")
    strides, pads, more = _widening(call, kernel, sizes)
    gaps = list(call.attribute("dilations", [1] * len(kernel)))
    reaches = [gap * (k - 1) + 1 for k, gap in zip(kernel, gaps, strict=True)]
    full = [(n - 1) * s + reach for n, s, reach in zip(sizes, strides, reaches, strict=True)]  # type: ignore[operator]
    image = x.channels_last
    order = (*range(2, 2 + len(kernel)), 1, 0)
    filters = _weight(call, 1, order)
    if any(n != 1 for n in gaps):  # as zeros between the weights
        if isinstance(weight, Rounded):
            raise Untranslatable("ConvTranspose in integers with gaps")
        spread = np.zeros([*(gap * (k - 1) + 1 for k, gap in zip(kernel, gaps, strict=True)), *filters.shape[-2:]])
        spread[tuple(slice(None, None, gap) for gap in gaps)] = np.transpose(call.constant(1), order)
        filters = tf.constant(spread.astype(np.float32))
    if flat:
        image, filters = tf.expand_dims(image, 1), tf.expand_dims(filters, 0)
    outputs = int(shape[1] or 0)
    batch = tf.shape(image)[0] if image.shape[0] is None else image.shape[0]

    def widen(part: Any, kernels: Any) -> Any:
        target = tf.stack([batch, *([1, *full][-2:]), outputs])
        y = tf.nn.conv2d_transpose(part, kernels, target, [1, *strides][-2:], "VALID")
        y.set_shape([image.shape[0], *([1, *full][-2:]), outputs])
        return y

    if groups == 1:
        y = widen(image, filters)
    else:
        parts = zip(tf.split(image, groups, -1), tf.split(filters, groups, -1), strict=True)
        y = tf.concat([widen(*part) for part in parts], -1)
    y = tf.squeeze(y, 1) if flat else y
    y = _padded(y, [(0, max(m - p[1], 0)) for m, p in zip(more, pads, strict=True)])
    y = _with_bias(call, y)
    ends = [f + m - p[1] for f, m, p in zip(full, more, pads, strict=True)]
    if any(p[0] or end < f for p, end, f in zip(pads, ends, full, strict=True)):
        y = y[(slice(None), *(slice(p[0], end) for p, end in zip(pads, ends, strict=True)), slice(None))]
    return placed_last(y)


def _widening(call: Call, kernel: list[int], sizes: Sequence[int | None]) -> tuple[list[int], Pads, list[int]]:
    """Strides, what a transposed convolution loses at both ends, and what it gains behind."""
    rank = len(kernel)
    strides, gaps = list(call.attribute("strides", [1] * rank)), list(call.attribute("dilations", [1] * rank))
    more = list(call.attribute("output_padding", [0] * rank))
    automatic, target = call.attribute("auto_pad", "NOTSET"), call.attribute("output_shape")
    if target is None and automatic in ("NOTSET", "VALID"):
        return strides, _window(call, kernel, sizes)[2], more
    pads, behind = [], []
    for axis, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
        assert size is not None
        size_out = size * stride if target is None else int(target[axis])
        surplus = stride * (size - 1) + more[axis] + gaps[axis] * (kernel[axis] - 1) + 1 - size_out
        total = max(surplus, 0)
        less = total // 2
        pads.append((less, total - less) if automatic == "SAME_UPPER" else (total - less, less))
        behind.append(more[axis] + max(-surplus, 0))
    return strides, pads, behind


@rule("Gemm")
def _gemm(call: Call) -> Value:
    x = call.tensor(0)
    x = tf.transpose(x) if call.attribute("transA", 0) else x
    order = (1, 0) if call.attribute("transB", 0) else (0, 1)
    weight = call.inputs[1]
    y = by_columns(x, weight.columns(order)) if isinstance(weight, Rounded) else tf.matmul(x, _weight(call, 1, order))
    alpha, beta = call.attribute("alpha", 1.0), call.attribute("beta", 1.0)
    y = y if alpha == 1.0 else alpha * y
    if not call.has(2):
        return placed(y)
    bias = call.tensor(2) if beta == 1.0 else beta * call.tensor(2)
    return placed(tf.nn.bias_add(y, bias) if len(bias.shape) == 1 and bias.shape[0] == y.shape[-1] else y + bias)


@rule("MatMul")
def _product(call: Call) -> Value:
    weight = call.inputs[1]
    if min(call.operand(0).rank, call.operand(1).rank) == 1:
        return placed(tf.tensordot(call.tensor(0), call.tensor(1), [[-1], [max(call.operand(1).rank - 2, 0)]]))
    x = call.tensor(0)
    if isinstance(weight, Rounded) and weight.array.ndim == 2:
        return placed(by_columns(x, weight.columns((0, 1))))
    if not isinstance(weight, np.ndarray) or weight.ndim != 2 or len(x.shape) < 3:
        return placed(tf.matmul(x, call.tensor(1)))
    # As rows, so that it is one fully connected layer.
    y = tf.matmul(tf.reshape(x, [-1, weight.shape[0]]), _weight(call, 1, (0, 1)))
    return placed(tf.reshape(y, [*sizes_of(x)[:-1], weight.shape[1]]))


@rule("Einsum")
def _einsum(call: Call) -> Value:
    equation, weight = call.attribute("equation"), call.inputs[1] if call.has(1) else None
    if isinstance(weight, Rounded) and weight.grid.axis is not None:
        return placed(einsum_by_columns(equation, call.tensor(0), weight.columns))
    return placed(tf.einsum(equation, *(call.tensor(i) for i in range(len(call.inputs)))))


@rule("MaxPool")
def _max_pool(call: Call) -> Value:
    lowest = float(np.finfo(np.float32).min) if call.floor is None else call.floor
    return _pool(call, tf.nn.max_pool, lowest)


@rule("AveragePool")
def _mean_pool(call: Call) -> Value:
    x = call.operand(0)
    kernel = list(call.attribute("kernel_shape"))
    sizes = x.shape[2:]
    strides, dilations, pads = _window(call, kernel, sizes)
    ends = _ceiled(call, kernel, strides, pads, sizes, dilations)
    counted = bool(call.attribute("count_include_pad", 0))
    y = _pool(call, tf.nn.avg_pool, 0.0)
    same = _pooled_whole(kernel, dilations) and _same(sizes, kernel, strides, dilations, ends)
    if same and counted:
        factor = _share(call, kernel, pads, ends, same=True)
    elif same or (counted and ends == pads) or not any(map(any, ends)):
        return y
    else:
        factor = _share(call, kernel, pads, ends, same=False)
    return Placed(y.tensor * tf.constant(factor), y.order)


def _share(call: Call, kernel: list[int], pads: Pads, ends: Pads, same: bool) -> Array:
    """What the means that TensorFlow takes are to be multiplied by; channels last."""
    sizes = call.operand(0).shape[2:]
    strides, dilations, _ = _window(call, kernel, sizes)
    if None in sizes:
        raise Untranslatable("AveragePool with padding over an open size")
    counted = bool(call.attribute("count_include_pad", 0))
    factor = np.ones((1,) * (len(kernel) + 2), np.float64)
    for axis, (k, pad, end, size) in enumerate(zip(kernel, pads, ends, sizes, strict=True)):
        assert size is not None
        stride, gap = strides[axis], dilations[axis]
        inside = np.zeros(size + sum(end))
        inside[end[0] : end[0] + size] = 1
        divisor = inside.copy()
        if counted:
            divisor[: pad[0] + size + pad[1]] = 1
        reach = gap * (k - 1) + 1
        starts = range(0, len(inside) - reach + 1, stride)
        taken = [inside[s : s + reach : gap].sum() if same else k for s in starts]
        own = [divisor[s : s + reach : gap].sum() for s in starts]
        shape = [1] * factor.ndim
        shape[axis + 1] = len(taken)
        factor = factor * np.reshape(np.array(taken) / np.array(own), shape)
    return factor.astype(np.float32)


def _ceiled(call: Call, kernel: list[int], strides: list[int], pads: Pads, sizes: Any, dilations: Any = None) -> Pads:
    """`pads` with what ``ceil_mode`` adds at the end."""
    if not call.attribute("ceil_mode", 0):
        return pads
    ends = []
    for axis, (k, stride, pad, size) in enumerate(zip(kernel, strides, pads, sizes, strict=True)):
        if size is None:
            raise Untranslatable(f"{call.node.op_type} with ceil_mode over an open size")
        reach = (1 if dilations is None else dilations[axis]) * (k - 1) + 1
        count = -(-(size + sum(pad) - reach) // stride) + 1
        if (count - 1) * stride >= size + pad[0]:
            count -= 1  # a window that begins in the padding behind is none
        ends.append((pad[0], max((count - 1) * stride + reach - size - pad[0], pad[1])))
    return ends


def _pool(call: Call, pool: Callable[..., Any], outside: float) -> Placed:
    x = call.operand(0)
    kernel = list(call.attribute("kernel_shape"))
    sizes = x.shape[2:]
    strides, dilations, pads = _window(call, kernel, sizes)
    pads = _ceiled(call, kernel, strides, pads, sizes, dilations)
    if not _pooled_whole(kernel, dilations):
        parts = _taps(_padded(x.channels_last, pads, outside), kernel, strides, dilations)
        if pool is tf.nn.max_pool:
            return placed_last(reduce(tf.maximum, parts))
        return placed_last(tf.add_n(parts) * (1 / len(parts)))
    same = _same(sizes, kernel, strides, dilations, pads)
    image = x.channels_last if same else _padded(x.channels_last, pads, outside)
    flat = len(kernel) == 1
    if flat:
        image, kernel, strides = tf.expand_dims(image, 1), [1, *kernel], [1, *strides]
    y = pool(image, kernel, strides, "SAME" if same else "VALID")
    return placed_last(tf.squeeze(y, 1) if flat else y)


def _pooled_whole(kernel: list[int], dilations: list[int]) -> bool:
    """Whether TensorFlow Lite has a pool of such a window; its pools have no gaps, and one or two dimensions."""
    return len(kernel) < 3 and all(n == 1 for n in dilations)


def _taps(image: Any, kernel: list[int], strides: list[int], dilations: list[int]) -> list[Any]:
    """What each place of the window reads, all results at once, of an image that is padded already."""
    reaches = [gap * (k - 1) for k, gap in zip(kernel, dilations, strict=True)]
    parts = []
    for place in np.ndindex(*kernel):
        starts = [i * gap for i, gap in zip(place, dilations, strict=True)]
        cut = (
            slice(start, start - reach or None, stride)
            for start, reach, stride in zip(starts, reaches, strides, strict=True)
        )
        parts.append(image[(slice(None), *cut, slice(None))])
    return parts


@rule("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(call: Call) -> Value:
    x = call.operand(0)
    total = tf.reduce_mean if call.node.op_type == "GlobalAveragePool" else tf.reduce_max
    return Placed(total(x.tensor, [x.axis(a) for a in range(2, x.rank)], keepdims=True), x.order)


_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "ReduceMean": tf.reduce_mean,
    "ReduceSum": tf.reduce_sum,
    "ReduceMax": tf.reduce_max,
    "ReduceMin": tf.reduce_min,
    "ReduceProd": tf.reduce_prod,
    "ReduceL1": lambda x, axes, keepdims: tf.reduce_sum(tf.abs(x), axes, keepdims=keepdims),
    "ReduceL2": lambda x, axes, keepdims: tf.sqrt(tf.reduce_sum(tf.square(x), axes, keepdims=keepdims)),
    "ReduceSumSquare": lambda x, axes, keepdims: tf.reduce_sum(tf.square(x), axes, keepdims=keepdims),
    "ReduceLogSumExp": lambda x, axes, keepdims: tf.reduce_logsumexp(x, axes, keepdims=keepdims),
}


@rule(*_REDUCTIONS)
def _reduction(call: Call) -> Value:
    x = call.operand(0)
    axes = call.numbers(1, "axes")
    if x.tensor.dtype == tf.bool:
        raise Untranslatable(f"{call.node.op_type} of truth values")
    if not axes:
        if call.attribute("noop_with_empty_axes", 0):
            return x
        axes = list(range(x.rank))
    keep = bool(call.attribute("keepdims", 1))
    gone = {a % x.rank for a in axes}
    y = _REDUCTIONS[call.node.op_type](x.tensor, [x.axis(a) for a in sorted(gone)], keepdims=keep)
    left = x.order if keep else tuple(a for a in x.order if a not in gone)
    ranks = {a: i for i, a in enumerate(sorted(left))}
    return Placed(y, tuple(ranks[a] for a in left))


@rule("ArgMax", "ArgMin")
def _arg(call: Call) -> Value:
    x = call.operand(0)
    axis = call.attribute("axis", 0) % x.rank
    if call.attribute("select_last_index", 0):
        raise Untranslatable(f"{call.node.op_type} of the last of equals")
    pick = tf.argmax if call.node.op_type == "ArgMax" else tf.argmin
    y = pick(x.plain, axis)
    return placed(tf.expand_dims(y, axis) if call.attribute("keepdims", 1) else y)


@rule("TopK")
def _top(call: Call) -> Sequence[Value]:
    x = call.operand(0)
    axis = call.attribute("axis", -1) % x.rank
    if axis != x.rank - 1 or not call.attribute("largest", 1):
        raise Untranslatable("TopK of another axis than the last, or of the least")
    values, indices = tf.math.top_k(x.plain, int(call.constant(1).ravel()[0]))
    return [placed(values), placed(tf.cast(indices, tf.int64))]


@rule("Softmax", "LogSoftmax")
def _softmax(call: Call) -> Value:
    x = call.operand(0)
    axis = call.attribute("axis", -1 if call.opset >= 13 else 1) % x.rank
    if call.opset < 13 and axis != x.rank - 1:
        raise Untranslatable("Softmax over several dimensions, as before opset 13")
    last = x.axis(axis) == x.rank - 1
    order = x.order if last else (*(a for a in straight(x.rank) if a != axis), axis)
    function = tf.nn.softmax if call.node.op_type == "Softmax" else tf.nn.log_softmax
    return Placed(function(x.to(order)), order)


@rule("BatchNormalization")
def _batch_norm(call: Call) -> Value:
    x = call.operand(0)
    gamma, beta, mean, variance = (np.asarray(call.constant(i), np.float64) for i in range(1, 5))
    factor = gamma / np.sqrt(variance + call.attribute("epsilon", 1e-5))
    shift = (beta - mean * factor).astype(np.float32)
    factor = factor.astype(np.float32)
    if call.reads_grid and call.gives_grid and x.rank == 4:
        return placed_last(_scaled_in_integers(x.channels_last, factor) + shift)
    shape = [1] * x.rank
    shape[x.axis(1)] = -1
    return Placed(x.tensor * factor.reshape(shape) + shift.reshape(shape), x.order)


_SMALLEST = 1e-12  # factor of a channel that is switched off, so that its grid has a width


def _scaled_in_integers(image: Any, factor: Array) -> Any:
    """Channels times their factors as a depthwise 1 x 1 convolution; a factor is the top of its own grid, so exact."""
    top = np.maximum(np.abs(factor), np.float32(_SMALLEST))
    kernel = tf.quantization.fake_quant_with_min_max_vars_per_channel(
        tf.constant(factor.reshape(1, 1, -1)), tf.constant(-top), tf.constant(top), num_bits=8, narrow_range=True
    )
    return tf.nn.depthwise_conv2d(image, tf.reshape(kernel, [1, 1, -1, 1]), [1] * 4, "VALID")


@rule("LayerNormalization", "RMSNormalization")
def _layer_norm(call: Call) -> Sequence[Value]:
    x = call.operand(0)
    axis = call.attribute("axis", -1) % x.rank
    last = x.rank - 1 == axis and x.axis(axis) == x.rank - 1
    order = x.order if last else straight(x.rank)
    tensor, axes = x.to(order), list(range(axis, x.rank)) if not last else [-1]
    mean, centred = None, tensor
    if call.node.op_type == "LayerNormalization":
        mean = tf.reduce_mean(tensor, axes, keepdims=True)
        centred = tensor - mean
    factor = tf.math.rsqrt(tf.reduce_mean(tf.square(centred), axes, keepdims=True) + call.attribute("epsilon", 1e-5))
    y = centred * factor
    y = y * call.tensor(1) if call.has(1) else y
    y = Placed(y + call.tensor(2) if call.has(2) else y, order)
    return [y] if mean is None else [y, Placed(mean, order), Placed(factor, order)]


@rule("InstanceNormalization")
def _instance_norm(call: Call) -> Value:
    return _grouped_norm(call, None)


@rule("GroupNormalization")
def _group_norm(call: Call) -> Value:
    return _grouped_norm(call, call.attribute("num_groups"))


def _grouped_norm(call: Call, groups: int | None) -> Value:
    """Normalised over the places of a channel, or of a group of channels."""
    x = call.operand(0)
    scale, bias = call.operand(1), call.operand(2)
    epsilon = call.attribute("epsilon", 1e-5)
    tensor = x.plain
    sizes = sizes_of(tensor)
    channels = int(x.shape[1] or 0)
    rows = tensor if groups is None else tf.reshape(tensor, [sizes[0], groups, channels // groups, *sizes[2:]])
    axes = list(range(2, len(rows.shape)))
    centred = rows - tf.reduce_mean(rows, axes, keepdims=True)
    y = centred * tf.math.rsqrt(tf.reduce_mean(tf.square(centred), axes, keepdims=True) + epsilon)
    if groups is not None:
        per_group = scale.shape[0] != channels
        shape = [1, -1, *[1] * (len(y.shape) - 2)]
        if per_group:
            y = y * tf.reshape(scale.plain, shape) + tf.reshape(bias.plain, shape)
        y = tf.reshape(y, sizes)
        if per_group:
            return placed(y)
    shape = [1, -1, *[1] * (x.rank - 2)]
    return placed(y * tf.reshape(scale.plain, shape) + tf.reshape(bias.plain, shape))


@rule("LpNormalization")
def _unit_norm(call: Call) -> Value:
    x, axis = call.operand(0), call.attribute("axis", -1)
    if call.attribute("p", 2) != 2:
        raise Untranslatable("LpNormalization by another norm than the second")
    return Placed(tf.math.divide_no_nan(x.tensor, tf.norm(x.tensor, axis=x.axis(axis), keepdims=True)), x.order)
