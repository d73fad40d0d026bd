"""Rules of the bare ``keras.ops`` functions that pick, move or add positions."""

from __future__ import annotations

from collections.abc import Mapping
from types import EllipsisType
from typing import Any

import keras
import numpy as np
from keras.src.ops import core, image, nn  # the classes behind keras.ops
from keras.src.ops import math as math_ops
from keras.src.ops import numpy as numpy_ops

from slimline.frameworks.keras.functional import Call, is_array
from slimline.frameworks.keras.reader import NoRule, Reader
from slimline.frameworks.keras.rules_layers import Rule
from slimline.graph import ops
from slimline.graph.equation import parse

Step = tuple[str, ops.Attributes, tuple[int, ...]]


def getitem(reader: Reader, call: Call) -> None:
    """Indexing by integers, slices, an ellipsis and None: slices, then selections, then new axes."""
    x, shape = reader.operand(call, call.args[0])
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
            indices = range(start, stop, stride)
            now[axis] = len(indices)
            steps.append(("take", ops.take(axis, indices), tuple(now)))
        elif (start, stop, stride) != (0, now[axis], 1):
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
    """Constant positions of one axis, or positions that the model chooses: rows of a table."""
    names, shapes = reader.operands(call) if not is_array(indices := take_indices(call)) else _table(reader, call)
    shape = shapes[0]
    if call.operation.axis is None:
        raise NoRule("slimline has no rule for it without an axis")
    axis = call.operation.axis % len(shape)
    if isinstance(indices, keras.KerasTensor):
        return _gather(reader, call, names, axis, len(reader.shape(indices)))
    indices = np.asarray(indices)
    if indices.ndim == 0:
        return reader.node(call, "select", names, ops.select(axis, int(indices) % shape[axis]))
    if indices.ndim == 1:
        return reader.node(call, "take", names, ops.take(axis, indices % shape[axis]))
    return _gather(reader, call, names, axis, 0)


def _table(reader: Reader, call: Call) -> tuple[list[str], list[tuple[int, ...]]]:
    """What is indexed by an array."""
    name, shape = reader.operand(call, reader.argument(call, "x"))
    return [name], [shape]


def _gather(reader: Reader, call: Call, names: list[str], axis: int, rank: int) -> None:
    """Positions of an axis, chosen by a tensor of `rank` dimensions or by a constant table (0)."""
    shape, after = reader.value(names[0]), reader.shape(call.outputs[0])
    chosen = [f"i{d}" for d in range(rank)] or ["."] * (len(after) - len(shape) + 1)
    left = [f"a{d}" for d in range(len(shape))]
    right = [*left[:axis], *chosen, *left[axis + 1 :]]
    fixed = {left[axis]: "rows are chosen by the model's input" if rank else "rows are chosen by a table"}
    if rank and axis == 0 and len(shape) == 2:
        return reader.node(call, "embedding", names[::-1], ops.embedding(rank))
    operands = [" ".join(left), *([" ".join(chosen)] if rank else [])]
    equation = parse(f"{', '.join(operands)} -> {' '.join(right)}", fixed=fixed)
    return reader.node(call, "gather", names, {"equation": equation})


def take_indices(call: Call) -> Any:
    """The `indices` argument of a `take`: a tensor, or else an integer array or number."""
    indices = call.args[1] if len(call.args) > 1 else call.kwargs["indices"]
    return keras.ops.convert_to_numpy(indices) if is_array(indices) else indices


def pad(reader: Reader, call: Call) -> None:
    """Padding with zeros."""
    names, shapes = reader.operands(call)
    operation = call.operation
    value = call.args[1] if len(call.args) > 1 else call.kwargs.get("constant_values")
    if len(names) != 1 or operation.mode != "constant" or value not in (None, 0):
        raise NoRule("slimline has a rule only for padding with zeros")
    widths = list(operation.pad_width)
    reader.node(call, "pad", names, ops.pad(widths * len(shapes[0]) if len(widths) == 1 else widths))


def slice_(reader: Reader, call: Call) -> None:
    """A block that begins at given numbers."""
    x, shape = reader.operand(call, reader.argument(call, "inputs"))
    starts = slice_starts(call)
    steps: list[Step] = []
    now = list(shape)
    for axis, (start, size) in enumerate(zip(starts, reader.shape(call.outputs[0]), strict=True)):
        if size != now[axis]:
            now[axis] = size
            steps.append(("slice", ops.slice_(axis, start, start + size), tuple(now)))
    reader.chain(call, x, steps or [("reshape", ops.reshape(shape, shape), shape)])


def slice_starts(call: Call) -> list[int]:
    """Where the block of a `slice` begins."""
    starts = call.args[1] if len(call.args) > 1 else call.kwargs["start_indices"]
    if isinstance(starts, keras.KerasTensor) or any(isinstance(n, keras.KerasTensor) for n in starts):
        raise NoRule("slimline has no rule for a slice that the model's input chooses")
    return [int(n) for n in starts]


def blocks(down: bool) -> Rule:
    """Rule of places of an image that become channels (`down`), or channels that become places."""

    def rule(reader: Reader, call: Call) -> None:
        x, _ = reader.single(call)
        if call.operation.data_format != "channels_last":
            raise NoRule("slimline reads only data_format='channels_last'")
        wide, deep = "b (h p) (w q) c", "b h w (p q c)"
        text = f"{wide} -> {deep}" if down else f"{deep} -> {wide}"
        side = call.operation.block_size
        fixed = dict.fromkeys("pq", "it has blocks of this size")
        reader.node(call, "reshape", [x], {"equation": parse(text, {"p": side, "q": side}, fixed=fixed)})

    return rule


def patches(reader: Reader, call: Call) -> None:
    """Windows of an image, each place's channels one after the other."""
    x, shape = reader.single(call)
    if len(shape) != 4 or call.operation.data_format != "channels_last":
        raise NoRule("slimline has a rule only for a batch of images with data_format='channels_last'")
    size = {"k": int(np.prod(call.operation.size))}
    reader.node(call, "expand", [x], {"equation": parse("b . . c -> b . . (k c)", size)})


def top(reader: Reader, call: Call) -> None:
    """The largest of the last axis, and their places: none of it can go."""
    x, shape = reader.single(call)
    reader.node(call, "pool", [x], ops.pool(len(shape), [len(shape) - 1], "top", outputs=2))


INDEXING: Mapping[type, Rule] = {
    numpy_ops.GetItem: getitem,
    numpy_ops.Take: take,
    numpy_ops.Pad: pad,
    core.Slice: slice_,
    nn.SpaceToDepth: blocks(down=True),
    nn.DepthToSpace: blocks(down=False),
    image.ExtractPatches: patches,
    math_ops.TopK: top,
}
