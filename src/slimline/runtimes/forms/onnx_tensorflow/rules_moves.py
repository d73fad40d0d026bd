"""Operators that move numbers: shapes, parts, and what is put together of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from slimline.runtimes.forms.onnx_tensorflow.call import Call, Untranslatable, rule
from slimline.runtimes.forms.onnx_tensorflow.layout import Placed, Rounded, Sizes, Value, aligned, placed

_END = 2**31


@rule("Shape")
def _shape(call: Call) -> Value:
    x = call.operand(0)
    computed = tf.shape(x.tensor)
    sizes = [computed[x.axis(a)] if size is None else size for a, size in enumerate(x.shape)]
    return Sizes(tuple(sizes[call.attribute("start", 0) : call.attribute("end", None)]))


@rule("Size")
def _size(call: Call) -> Value:
    x = call.operand(0)
    return Sizes((math.prod(x.shape) if None not in x.shape else tf.size(x.tensor),), scalar=True)


@rule("Constant")
def _constant(call: Call) -> Value:
    for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        value = call.attribute(name)
        if value is not None:
            return np.asarray(value.numpy() if name == "value" else value)
    raise Untranslatable("Constant of text")


@rule("ConstantOfShape")
def _filled(call: Call) -> Value:
    value = call.attribute("value")
    content = np.zeros(1, np.float32) if value is None else value.numpy()
    return placed(tf.fill(_target(call, 0), tf.constant(content.ravel()[0])))


@rule("Range")
def _range(call: Call) -> Value:
    ends = [call.tensor(i) for i in range(3)]
    return placed(tf.range(*[tf.reshape(end, []) for end in ends]))


@rule("Reshape")
def _reshape(call: Call) -> Value:
    if isinstance(call.inputs[0], Sizes):
        return Sizes(call.inputs[0].values, scalar=not call.constant(1).size)
    x = call.operand(0)
    target = _target(call, 1)
    if not call.attribute("allowzero", 0):
        sizes = _sizes(x)
        target = [sizes[axis] if isinstance(n, int) and n == 0 else n for axis, n in enumerate(target)]
    return placed(_reshaped(x.plain, target))


def _target(call: Call, index: int) -> list[Any]:
    """Sizes that an operator is told."""
    value = call.inputs[index]
    if isinstance(value, Sizes):
        return list(value.values)
    if isinstance(value, np.ndarray):
        return [int(n) for n in np.atleast_1d(value)]
    if isinstance(value, Placed) and value.tensor.dtype.is_integer and value.rank == 1 and value.shape[0] is not None:
        return list(tf.unstack(tf.cast(value.tensor, tf.int32)))
    raise Untranslatable(f"{call.node.op_type} to a computed shape")


def _sizes(x: Placed) -> list[Any]:
    """Of `x` in ONNX order, ints where they are known."""
    computed = None if None not in x.shape else tf.shape(x.tensor)
    return [computed[x.axis(a)] if size is None else size for a, size in enumerate(x.shape)]  # type: ignore[index]


def _reshaped(tensor: Any, target: Sequence[Any]) -> Any:
    """`tensor` in another shape; a single size that is not known is left to follow from the others."""
    known = [n for n in target if isinstance(n, int)]
    open_sizes = len(target) - len(known)
    if open_sizes == 1 and -1 not in known:
        target = [n if isinstance(n, int) else -1 for n in target]
    if all(isinstance(n, int) for n in target) and tensor.shape.as_list() == list(target):
        return tensor
    return tf.reshape(tensor, list(target))


@rule("Flatten")
def _flatten(call: Call) -> Value:
    x = call.operand(0)
    axis = call.attribute("axis", 1)
    axis = axis + x.rank if axis < 0 else axis
    front, back = x.shape[:axis], x.shape[axis:]
    if None not in back:
        return placed(tf.reshape(x.plain, [-1 if None in front else math.prod(front), math.prod(back)]))  # type: ignore[arg-type]
    sizes = _sizes(x)
    return placed(tf.reshape(x.plain, [tf.reduce_prod(sizes[:axis]) if axis else 1, -1]))


@rule("Squeeze")
def _squeeze(call: Call) -> Value:
    axes = call.numbers(1, "axes")
    value = call.inputs[0]
    if isinstance(value, Sizes):
        return Sizes(value.values, scalar=True)
    x = call.operand(0)
    gone = {a % x.rank for a in axes} if axes is not None else {a for a, n in enumerate(x.shape) if n == 1}
    left = [a for a in x.order if a not in gone]
    ranks = {a: i for i, a in enumerate(sorted(left))}
    return Placed(tf.squeeze(x.tensor, [x.axis(a) for a in gone]), tuple(ranks[a] for a in left))


@rule("Unsqueeze")
def _unsqueeze(call: Call) -> Value:
    axes = call.numbers(1, "axes") or []
    value = call.inputs[0]
    if isinstance(value, Sizes):
        if not value.scalar:
            raise Untranslatable("Unsqueeze of a vector of sizes")
        return Sizes(value.values)
    tensor = call.tensor(0)
    rank = len(tensor.shape) + len(axes)
    for axis in sorted(a % rank for a in axes):
        tensor = tf.expand_dims(tensor, axis)
    return placed(tensor)


@rule("Transpose")
def _transpose(call: Call) -> Value:
    x, stored = call.operand(0), call.inputs[0]
    turn = call.attribute("perm", list(range(x.rank))[::-1])
    if isinstance(stored, Rounded):
        return stored.turned(turn)
    return Placed(x.tensor, tuple(list(turn).index(axis) for axis in x.order))


@rule("Concat")
def _concat(call: Call) -> Value:
    values = [value for value in call.inputs if value is not None]
    if any(isinstance(v, Sizes) for v in values) and all(isinstance(v, Sizes | np.ndarray) for v in values):
        sizes = [v.values if isinstance(v, Sizes) else [int(n) for n in v] for v in values]  # type: ignore[union-attr]
        return Sizes(tuple(n for vector in sizes for n in vector))
    rank = call.operand(0).rank
    axis = call.attribute("axis") % rank
    _, order = aligned(values)
    tensors = [call.operand(i).to(order) for i in range(len(values))]
    return Placed(tf.concat(tensors, order.index(axis)), order)


@rule("Split")
def _split(call: Call) -> Sequence[Value]:
    x = call.operand(0)
    axis, size = call.attribute("axis", 0), x.shape[call.attribute("axis", 0)]
    lengths = call.numbers(1, "split")
    if lengths is None:
        if size is None:
            raise Untranslatable("Split of an open size")
        parts = call.attribute("num_outputs") or len(call.node.outputs)
        longest = -(-size // parts)
        lengths = [min(longest, size - longest * i) for i in range(parts)]
    return [Placed(part, x.order) for part in tf.split(x.tensor, lengths, x.axis(axis))]


@rule("Slice")
def _slice(call: Call) -> Value:
    starts, ends = call.attribute("starts"), call.attribute("ends")
    starts = call.numbers(1) if starts is None else list(starts)
    ends = (_target(call, 2) if isinstance(call.inputs[2], Sizes) else call.numbers(2)) if ends is None else list(ends)
    assert starts is not None and ends is not None
    value = call.inputs[0]
    axes = call.numbers(3, "axes") or list(range(len(starts)))
    steps = (call.numbers(4) if len(call.inputs) > 4 else None) or [1] * len(starts)
    if isinstance(value, Sizes):
        return Sizes(value.values[slice(starts[0], ends[0], steps[0])])
    x = call.operand(0)
    parts: list[Any] = [slice(None)] * x.rank
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        whole = isinstance(end, int)
        last = None if whole and (end >= _END or end <= -_END) else end
        parts[x.axis(axis)] = slice(None if step < 0 and start >= _END else start, last, step)
    return Placed(x.tensor[tuple(parts)], x.order)


@rule("Gather")
def _gather(call: Call) -> Value:
    value, axis = call.inputs[0], call.attribute("axis", 0)
    if isinstance(value, Sizes):
        places = call.constant(1)
        return Sizes(tuple(value.values[int(i)] for i in np.atleast_1d(places)), scalar=not places.ndim)
    x = call.operand(0)
    stored = call.inputs[1]
    if isinstance(stored, np.ndarray) and stored.ndim == 0 and not isinstance(value, np.ndarray):
        parts: list[Any] = [slice(None)] * x.rank
        parts[x.axis(axis)] = int(stored)
        left = [a for a in x.order if a != axis % x.rank]
        ranks = {a: i for i, a in enumerate(sorted(left))}
        return Placed(x.tensor[tuple(parts)], tuple(ranks[a] for a in left))
    indices = call.tensor(1)
    size = x.shape[axis]
    if isinstance(stored, np.ndarray) and size is not None:
        indices = tf.constant(np.where(stored < 0, stored + size, stored).astype(np.int32))
    return placed(tf.gather(x.plain, indices, axis=axis % x.rank))


@rule("GatherElements")
def _gather_elements(call: Call) -> Value:
    x, indices = call.tensor(0), call.tensor(1)
    axis = call.attribute("axis", 0) % len(x.shape)
    stored = call.inputs[1]
    if isinstance(stored, np.ndarray) and (stored < 0).any():
        if x.shape[axis] is None:
            raise Untranslatable("GatherElements from the end of an open size")
        indices = tf.constant(np.where(stored < 0, stored + x.shape[axis], stored))
    rank = len(x.shape)
    if axis != rank - 1:
        turn = [a for a in range(rank) if a != axis] + [axis]
        back = list(np.argsort(turn))
        chosen = tf.gather(tf.transpose(x, turn), tf.transpose(indices, turn), batch_dims=rank - 1)
        return placed(tf.transpose(chosen, back))
    return placed(tf.gather(x, indices, batch_dims=rank - 1))


@rule("Expand")
def _expand(call: Call) -> Value:
    x = call.operand(0)
    target = _target(call, 1)
    tensor = x.plain
    sizes = [1] * (len(target) - x.rank) + _sizes(x)
    if len(sizes) > len(target):
        target = [1] * (len(sizes) - len(target)) + target
    if all(isinstance(n, int) and n == 1 for n in target):
        return x if len(sizes) == x.rank else placed(_reshaped(tensor, sizes))
    # A size that is not one is the target's already, whatever the target says.
    result = [t if isinstance(s, int) and s == 1 else s for s, t in zip(sizes, target, strict=True)]
    if all(isinstance(s, int) and isinstance(r, int) and s == r for s, r in zip(sizes, result, strict=True)):
        return x
    return placed(tf.broadcast_to(tensor, tf.stack([tf.cast(n, tf.int32) for n in result])))


@rule("Tile")
def _tile(call: Call) -> Value:
    return placed(tf.tile(call.tensor(0), [tf.cast(n, tf.int32) for n in _target(call, 1)]))


@rule("Pad")
def _pad(call: Call) -> Value:
    x = call.operand(0)
    mode = call.attribute("mode", "constant")
    amounts = call.numbers(1, "pads") or []
    axes = (call.numbers(3) if call.has(3) else None) or list(range(x.rank))
    paddings = [[0, 0] for _ in range(x.rank)]
    for i, axis in enumerate(axes):
        paddings[x.axis(axis)] = [amounts[i], amounts[i + len(axes)]]
    if not any(map(any, paddings)):
        return x
    tensor = x.tensor
    if any(n < 0 for pair in paddings for n in pair):
        parts = tuple(slice(max(-a, 0), -max(-b, 0) or None) for a, b in paddings)
        tensor, paddings = tensor[parts], [[max(a, 0), max(b, 0)] for a, b in paddings]
    if mode == "reflect":
        return Placed(tf.pad(tensor, paddings, "REFLECT"), x.order)
    if mode != "constant":
        for axis, pair in enumerate(paddings):
            tensor = _continued(tensor, axis, pair, mode)
        return Placed(tensor, x.order)
    value = call.attribute("value", 0.0) if not call.has(2) else float(call.constant(2).ravel()[0])
    filled = tf.pad(tensor, paddings) if value == 0 else tf.pad(tensor, paddings, constant_values=value)
    return Placed(filled, x.order)


def _continued(tensor: Any, axis: int, pair: Sequence[int], mode: str) -> Any:
    """`tensor` with its last place repeated at both ends of an axis, or all of it over again."""
    size = tensor.shape[axis]
    if not any(pair):
        return tensor
    if size is None:
        raise Untranslatable(f"Pad in the mode {mode!r} of an open size")
    places = np.arange(-pair[0], size + pair[1])
    return tf.gather(tensor, places % size if mode == "wrap" else np.clip(places, 0, size - 1), axis=axis)


@rule("DepthToSpace")
def _depth_to_space(call: Call) -> Value:
    x, block = call.operand(0).plain, call.attribute("blocksize")
    batch, channels, *places = x.shape.as_list()
    less = channels // block**2
    split = [-1 if batch is None else batch, block, block, less, *places]
    turn = [0, 3, 4, 1, 5, 2]
    if call.attribute("mode", "DCR") == "CRD":
        split, turn = [split[0], less, block, block, *places], [0, 1, 4, 2, 5, 3]
    moved = tf.transpose(tf.reshape(x, split), turn)
    return placed(tf.reshape(moved, [split[0], less, *(n * block for n in places)]))


@rule("SpaceToDepth")
def _space_to_depth(call: Call) -> Value:
    if call.attribute("mode", "DCR") != "DCR":
        raise Untranslatable("SpaceToDepth in the mode CRD")
    x, block = call.operand(0).plain, call.attribute("blocksize")
    batch, channels, height, width = x.shape.as_list()
    first = -1 if batch is None else batch
    split = tf.reshape(x, [first, channels, height // block, block, width // block, block])
    moved = tf.transpose(split, [0, 3, 5, 1, 2, 4])
    return placed(tf.reshape(moved, [first, channels * block**2, height // block, width // block]))


@rule("Trilu")
def _triangle(call: Call) -> Value:
    x = call.tensor(0)
    diagonal = int(call.constant(1)) if call.has(1) else 0
    rows, columns = x.shape.as_list()[-2:]
    if rows is None or columns is None:
        raise Untranslatable("Trilu of an open size")
    ones = np.ones((rows, columns), bool)
    mask = np.triu(ones, diagonal) if call.attribute("upper", 1) else np.tril(ones, diagonal)
    return placed(tf.where(tf.constant(mask), x, tf.zeros([], x.dtype)))


@rule("ScatterND")
def _scatter(call: Call) -> Value:
    if call.attribute("reduction", "none") != "none":
        raise Untranslatable("ScatterND with a reduction")
    x, indices, updates = (call.tensor(i) for i in range(3))
    return placed(tf.tensor_scatter_nd_update(x, indices, updates))


@rule("GatherND")
def _gather_nd(call: Call) -> Value:
    return placed(tf.gather_nd(call.tensor(0), call.tensor(1), batch_dims=call.attribute("batch_dims", 0)))


@rule("CumSum")
def _cumulated(call: Call) -> Value:
    x = call.operand(0)
    options = {"exclusive": bool(call.attribute("exclusive", 0)), "reverse": bool(call.attribute("reverse", 0))}
    return Placed(tf.cumsum(x.tensor, x.axis(int(call.constant(1))), **options), x.order)


@rule("OneHot")
def _one_hot(call: Call) -> Value:
    depth = int(call.constant(1).ravel()[0])
    off, on = call.constant(2)
    indices = call.tensor(0)
    indices = tf.where(indices < 0, indices + tf.cast(depth, indices.dtype), indices)
    return placed(tf.one_hot(indices, depth, on, off, axis=call.attribute("axis", -1)))
