"""Rules of what picks, moves, repeats or joins positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras.src.ops import core, nn  # the classes behind keras.ops
from keras.src.ops import math as math_ops
from keras.src.ops import numpy as numpy_ops

from slimline.frameworks.keras.functional import Call
from slimline.frameworks.keras.onnx.rules_kernels import rows, spatial
from slimline.frameworks.keras.onnx.writer import (
    Operand,
    Placed,
    Rule,
    Shape,
    Stored,
    Writer,
    dtype_of,
    numbers,
    straight,
)
from slimline.frameworks.keras.reader import NoRule
from slimline.frameworks.keras.rules_index import expanded_key, slice_starts, take_indices

L = keras.layers
_ENDS = (np.iinfo(np.int64).min, np.iinfo(np.int64).max)


def reshape(w: Writer, call: Call) -> Operand:
    """Another shape of the same numbers in the same order."""
    return w.reshape(w.source(call), call.outputs[0])


def permute(w: Writer, call: Call) -> Operand:
    """`Permute`."""
    return w.transposed(w.source(call), (0, *call.operation.dims))


def transpose(w: Writer, call: Call) -> Operand:
    """Transposition; None reverses all axes."""
    x = w.source(call)
    return w.transposed(x, call.operation.axes or range(len(x.shape))[::-1])


def swapaxes(w: Writer, call: Call) -> Operand:
    """Exchange of two axes."""
    x = w.source(call)
    order = list(range(len(x.shape)))
    a, b = call.operation.axis1 % len(order), call.operation.axis2 % len(order)
    order[a], order[b] = b, a
    return w.transposed(x, order)


def moveaxis(w: Writer, call: Call) -> Operand:
    """Axes moved to other places, the rest in order."""
    x = w.source(call)
    marked = np.empty([1 + i for i in range(len(x.shape))])
    order = np.moveaxis(marked, call.operation.source, call.operation.destination).shape
    return w.transposed(x, [n - 1 for n in order])


def concatenate(w: Writer, call: Call) -> Operand:
    """Several tensors, one after the other along an axis."""
    tensors = keras.tree.flatten(next(iter(w.arguments(call).values())))
    operands = [w.operand(t, dtype_of(call)) for t in tensors]
    return joined(w, operands, call.operation.axis, w.shape(call.outputs[0]))


def joined(w: Writer, operands: Sequence[Operand], axis: int, shape: Shape) -> Placed:
    """Tensors behind each other, in the order of dimensions of the first that is not straight."""
    rank = len(shape)
    computed = [x.order for x in operands if isinstance(x, Placed)]
    order = next((o for o in computed if o != straight(rank)), straight(rank))
    values = [w.ordered(x, order) for x in operands]
    return w.place(w.op("Concat", *values, axis=order.index(axis % rank)), order, shape, operands[0].dtype)


def stack(w: Writer, call: Call) -> Operand:
    """A new axis along which tensors lie."""
    axis = call.operation.axis % (len(call.outputs[0].shape))
    tensors = keras.tree.flatten(next(iter(w.arguments(call).values())))
    wide: list[Operand] = []
    for tensor in tensors:
        x = w.operand(tensor, dtype_of(call))
        wide.append(Stored(np.expand_dims(x.array, axis)) if isinstance(x, Stored) else w.widened(x, [axis]))
    return joined(w, wide, axis, w.shape(call.outputs[0]))


def split(w: Writer, call: Call) -> list[Operand]:
    """Parts along an axis."""
    x = w.placed(w.source(call))
    axis = call.operation.axis % len(x.order)
    shapes = [w.shape(t) for t in call.outputs]
    if any(s[axis] is None for s in shapes):
        raise NoRule("it splits a size that is open")
    return parts(w, x, axis, shapes)


def parts(w: Writer, x: Placed, axis: int, shapes: Sequence[Shape]) -> list[Operand]:
    """Parts of known sizes along an axis."""
    sizes = numbers(*(int(n) for s in shapes if (n := s[axis]) is not None))
    values = w.ops("Split", x.value, sizes, outputs=len(shapes), axis=x.at(axis))
    return [w.place(v, x.order, s, x.dtype) for v, s in zip(values, shapes, strict=True)]


def unstack(w: Writer, call: Call) -> list[Operand]:
    """Positions of an axis, one tensor each."""
    x = w.source(call)
    axis = call.operation.axis % len(x.shape)
    return [selected(w, x, axis, i) for i in range(len(call.outputs))]


def selected(w: Writer, x: Operand, axis: int, index: int) -> Placed:
    """One position of an axis, which is gone then."""
    placed = w.placed(x)
    value = w.op("Gather", placed.value, np.array(index, np.int64), axis=placed.at(axis))
    return w.without(value, placed, [axis])


def sliced(w: Writer, x: Operand, pieces: Mapping[int, tuple[int, int, int]]) -> Operand:
    """Start, end and stride along some axes."""
    if not pieces:
        return x
    placed = w.placed(x)
    starts, ends, strides = (numbers(*(piece[i] for piece in pieces.values())) for i in range(3))
    value = w.op("Slice", placed.value, starts, ends, numbers(*map(placed.at, pieces)), strides)
    shape = tuple(None if d in pieces else n for d, n in enumerate(placed.shape))
    return w.place(value, placed.order, shape, placed.dtype)


def getitem(w: Writer, call: Call) -> Operand:
    """Indexing by integers, slices, an ellipsis and None: slices, then selections, then new axes."""
    x = w.operand(call.args[0])
    key = call.args[1] if len(call.args) > 1 else call.kwargs["key"]
    subscripts = expanded_key(key, len(x.shape))
    pieces: dict[int, tuple[int, int, int]] = {}
    chosen: list[tuple[int, int]] = []
    for axis, subscript in enumerate(s for s in subscripts if s is not None):
        if isinstance(subscript, int):
            chosen.append((axis, subscript))
        elif subscript != slice(None):
            step = subscript.step or 1
            least, most = _ENDS
            first, last = (0, most) if step > 0 else (most, least)
            start = first if subscript.start is None else subscript.start
            end = last if subscript.stop is None else subscript.stop
            pieces[axis] = (start, end, step)
    x = sliced(w, x, pieces)
    for axis, index in reversed(chosen):
        x = selected(w, x, axis, index)
    new = [i for i, s in enumerate(s for s in subscripts if not isinstance(s, int)) if s is None]
    return w.widened(x, new) if new else x


def take(w: Writer, call: Call) -> Operand:
    """Positions of an axis, constant or chosen by the model."""
    axis, indices = call.operation.axis, take_indices(call)
    if axis is None:
        raise NoRule("slimline has no rule for it without an axis")
    x = w.operand(w.argument(call, "x"))
    axis %= len(x.shape)
    if isinstance(indices, keras.KerasTensor):
        return rows(w, call, w.plain(x), w.cast(w.operand(indices), "int32"), axis)
    array = np.asarray(indices, np.int64)
    if array.ndim == 0:
        return selected(w, x, axis, int(array))
    if array.ndim > 1:
        return rows(w, call, w.plain(x), Stored(array), axis)
    placed = w.placed(x)
    value = w.op("Gather", placed.value, array, axis=placed.at(axis))
    return w.place(value, placed.order, w.shape(call.outputs[0]), placed.dtype)


def slice_(w: Writer, call: Call) -> Operand:
    """A block that begins at given numbers."""
    x = w.operand(w.argument(call, "inputs"))
    after = w.shape(call.outputs[0])
    pieces = {}
    for axis, (start, size, before) in enumerate(zip(slice_starts(call), after, x.shape, strict=True)):
        if size is None and start:
            raise NoRule("it cuts a size that is open")
        if size is not None and size != before:
            pieces[axis] = (start, start + size, 1)
    return sliced(w, x, pieces)


def flip(w: Writer, call: Call) -> Operand:
    """Axes turned round."""
    x, axis = w.source(call), call.operation.axis
    axes = range(len(x.shape)) if axis is None else [a % len(x.shape) for a in keras.tree.flatten(axis)]
    return flipped(w, x, axes)


def flipped(w: Writer, x: Operand, axes: Sequence[int]) -> Placed:
    """Axes turned round; what was turned round just before is as it was."""
    placed = w.placed(x)
    places = numbers(*sorted(placed.at(a) for a in axes))
    ends = [np.full(len(places), end) for end in _ENDS[::-1]]
    maker = placed.value.producer()
    before = None if maker is None else w.turned.get(maker)
    if before is not None and maker is not None and np.array_equal(before, places) and maker.inputs[0] is not None:
        return w.place(maker.inputs[0], placed.order, placed.shape, placed.dtype)
    value = w.op("Slice", placed.value, *ends, places, np.full(len(places), -1))
    maker = value.producer()
    assert maker is not None
    w.turned[maker] = places
    return w.place(value, placed.order, placed.shape, placed.dtype)


def _padded(
    w: Writer, x: Operand, widths: Sequence[tuple[int, int]], mode: str = "constant", value: Any = 0
) -> Operand:
    placed = w.placed(x)
    pairs = [widths[d] for d in placed.order]
    pads = numbers(*(before for before, _ in pairs), *(after for _, after in pairs))
    fill = np.asarray(value, placed.dtype) if value else None
    return Placed(w.op("Pad", placed.value, pads, fill, mode=mode), placed.order, placed.shape, placed.dtype)


def pad(w: Writer, call: Call) -> Operand:
    """Padding with a number, or with what lies at the edge."""
    x, operation = w.source(call), call.operation
    modes = {"constant": "constant", "reflect": "reflect"}
    value = call.args[1] if len(call.args) > 1 else call.kwargs.get("constant_values")
    if operation.mode not in modes or np.ndim(value or 0):
        raise NoRule(f"slimline has no rule for mode={operation.mode!r}")
    widths = list(operation.pad_width)
    widths = widths * len(x.shape) if len(widths) == 1 else widths
    return _padded(w, x, [(int(a), int(b)) for a, b in widths], modes[operation.mode], value or 0)


def spatial_widths(layer: Any, amounts: Any, rank: int) -> dict[int, tuple[int, int]]:
    """By dimension, what is added or cut before and after."""
    axes, _ = spatial(layer, rank) if hasattr(layer, "data_format") else (tuple(range(1, rank - 1)), rank - 1)
    pairs = [tuple(amounts)] if rank == 3 else [(a, a) if isinstance(a, int) else tuple(a) for a in amounts]
    return {axis: (int(a), int(b)) for axis, (a, b) in zip(axes, pairs, strict=True)}


def zero_padding(w: Writer, call: Call) -> Operand:
    """`ZeroPadding`."""
    x = w.source(call)
    widths = spatial_widths(call.operation, call.operation.padding, len(x.shape))
    return _padded(w, x, [widths.get(d, (0, 0)) for d in range(len(x.shape))])


def cropping(w: Writer, call: Call) -> Operand:
    """`Cropping`."""
    x = w.source(call)
    widths = spatial_widths(call.operation, call.operation.cropping, len(x.shape))
    return sliced(w, x, {d: (a, -b if b else _ENDS[1], 1) for d, (a, b) in widths.items() if a or b})


def broadcast_to(w: Writer, call: Call) -> Operand:
    """Repeated along dimensions of size 1."""
    x, shape = w.source(call), w.shape(call.outputs[0])
    if shape.count(None) > sum(n is None for n in x.shape):
        raise NoRule("it repeats to a size that is open")
    target = numbers(*(1 if n is None else n for n in shape))
    return w.place(w.op("Expand", w.plain(x), target), straight(len(shape)), shape, x.dtype)


def repeat_vector(w: Writer, call: Call) -> Operand:
    """`RepeatVector`: ``(b, f) -> (b, n, f)``."""
    x = w.widened(w.source(call), [1])
    shape = w.shape(call.outputs[0])
    return w.place(w.op("Expand", x.value, numbers(1, call.operation.n, 1)), straight(3), shape, x.dtype)


def repeat(w: Writer, call: Call) -> Operand:
    """Each position several times."""
    operation, x = call.operation, w.source(call)
    if operation.axis is None or np.size(operation.repeats) > 1:
        raise NoRule("slimline has a rule only for one count along one axis")
    axis = operation.axis % len(x.shape)
    count = int(np.ravel(operation.repeats)[0])
    size = w.size(x, axis)
    wide = w.widened(x, [axis + 1])
    counts = [count if d == axis + 1 else 1 for d in range(len(wide.shape))]
    shape = tuple(count if d == axis + 1 else n for d, n in enumerate(wide.shape))
    y = w.place(w.op("Expand", wide.value, numbers(*counts)), straight(len(shape)), shape, x.dtype)
    return w.reshaped(y, tuple(size * count if d == axis else n for d, n in enumerate(x.shape)))


def tile(w: Writer, call: Call) -> Operand:
    """The whole several times."""
    x, shape = w.source(call), w.shape(call.outputs[0])
    repeats = [int(n) for n in np.ravel(call.operation.repeats)]
    rank = max(len(repeats), len(x.shape))
    repeats = [1] * (rank - len(repeats)) + repeats
    wide = w.widened(x, range(rank - len(x.shape))) if rank > len(x.shape) else x
    return w.place(w.op("Tile", w.plain(wide), numbers(*repeats)), straight(rank), shape, x.dtype)


def glu(w: Writer, call: Call) -> Operand:
    """One half of an axis, gated by the other."""
    x = w.placed(w.source(call))
    axis, half = call.operation.axis % len(x.order), w.shape(call.outputs[0])
    value, gate = parts(w, x, axis, [half, half])
    return w.each("Mul", value, w.each("Sigmoid", gate))


def cumulative_sum(w: Writer, call: Call) -> Operand:
    """The sum of all positions so far."""
    x = w.placed(w.cast(w.source(call), dtype_of(call)))
    if call.operation.axis is None:
        raise NoRule("slimline has no rule for it without an axis")
    at = np.array(x.at(call.operation.axis), np.int64)
    return w.place(w.op("CumSum", x.value, at), x.order, x.shape, x.dtype)


def triangle(upper: int) -> Rule:
    """Rule of one side of the diagonal of matrices."""

    def rule(w: Writer, call: Call) -> Operand:
        x = w.source(call)
        value = w.op("Trilu", w.plain(x), np.array(call.operation.k, np.int64), upper=upper)
        return w.place(value, straight(len(x.shape)), x.shape, x.dtype)

    return rule


def top(w: Writer, call: Call) -> list[Operand]:
    """The largest of the last axis, and their places."""
    x, operation = w.source(call), call.operation
    values = w.ops("TopK", w.plain(x), numbers(operation.k), outputs=2, axis=-1, sorted=int(operation.sorted))
    order, shape = straight(len(x.shape)), w.shape(call.outputs[0])
    return [w.place(v, order, shape, dtype) for v, dtype in zip(values, (x.dtype, "int64"), strict=True)]


def blocks(kind: str) -> Rule:
    """Rule of places of an image that become channels, or channels that become places."""

    def rule(w: Writer, call: Call) -> Operand:
        x, side = w.source(call), call.operation.block_size
        _, channel = spatial(call.operation, len(x.shape))
        order = (0, channel, *(d for d in (1, 2, 3) if d != channel))
        value = w.op(kind, w.ordered(x, order), blocksize=side)
        return w.place(value, order, w.shape(call.outputs[0]), x.dtype)

    return rule


MOVES: Mapping[type, Rule] = {
    **dict.fromkeys((L.Reshape, L.Flatten), reshape),
    L.Permute: permute,
    L.Concatenate: concatenate,
    L.RepeatVector: repeat_vector,
    **dict.fromkeys((L.ZeroPadding1D, L.ZeroPadding2D, L.ZeroPadding3D), zero_padding),
    **dict.fromkeys((L.Cropping1D, L.Cropping2D, L.Cropping3D), cropping),
    **dict.fromkeys((numpy_ops.Reshape, numpy_ops.Squeeze, numpy_ops.ExpandDims, numpy_ops.Ravel), reshape),
    numpy_ops.Transpose: transpose,
    numpy_ops.Swapaxes: swapaxes,
    numpy_ops.Moveaxis: moveaxis,
    numpy_ops.Concatenate: concatenate,
    numpy_ops.Stack: stack,
    numpy_ops.Split: split,
    numpy_ops.BroadcastTo: broadcast_to,
    numpy_ops.Repeat: repeat,
    numpy_ops.Tile: tile,
    numpy_ops.GetItem: getitem,
    numpy_ops.Take: take,
    numpy_ops.Pad: pad,
    numpy_ops.Flip: flip,
    numpy_ops.Cumsum: cumulative_sum,
    numpy_ops.Tril: triangle(0),
    numpy_ops.Triu: triangle(1),
    core.Unstack: unstack,
    core.Slice: slice_,
    nn.Glu: glu,
    nn.SpaceToDepth: blocks("SpaceToDepth"),
    nn.DepthToSpace: blocks("DepthToSpace"),
    math_ops.TopK: top,
}
