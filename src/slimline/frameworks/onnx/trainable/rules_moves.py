"""Operators that move, pick and repeat numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from slimline.frameworks.base import Array
from slimline.frameworks.onnx.trainable.call import RULES, Call, aten, plain, rule
from slimline.frameworks.onnx.trainable.rules_elementwise import DTYPES


@rule("Reshape")
def _reshape(call: Call) -> fx.Node:
    x, sizes = call.tensor(0), call.sizes(1)
    if not call.attribute("allowzero", 0):
        sizes = [call.emit(aten.sym_size.int, x, d) if n == 0 else n for d, n in enumerate(sizes)]
    return call.emit(aten.reshape.default, x, sizes)


def flatten(x: Tensor, axis: int) -> Tensor:
    """A matrix, whose columns are all dimensions from `axis` on."""
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@rule("Flatten")
def _flatten(call: Call) -> fx.Node:
    axis = int(call.attribute("axis", 1))
    return call.emit(flatten, call.tensor(0), axis + call.rank if axis < 0 else axis)


@rule("Transpose")
def _transpose(call: Call) -> fx.Node:
    return call.emit(aten.permute.default, call.tensor(0), call.attribute("perm") or list(range(call.rank))[::-1])


@rule("Squeeze")
def _squeeze(call: Call) -> fx.Node:
    axes = call.numbers("axes", 1)
    axes = [d for d, n in enumerate(call.shape()) if n == 1] if axes is None else axes
    return call.emit(aten.squeeze.dims, call.tensor(0), axes)


@rule("Unsqueeze")
def _unsqueeze(call: Call) -> fx.Node:
    x, rank = call.tensor(0), len(call.output)
    for axis in sorted(a % rank for a in call.numbers("axes", 1) or ()):
        x = call.emit(aten.unsqueeze.default, x, axis)
    return x


def expand(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Broadcast against these sizes."""
    shape = torch.broadcast_shapes(x.shape, tuple(sizes))  # type: ignore[no-untyped-call]
    return x.expand(shape)


@rule("Expand")
def _expand(call: Call) -> fx.Node:
    return call.emit(expand, call.tensor(0), call.sizes(1))


@rule("Tile")
def _tile(call: Call) -> fx.Node:
    return call.emit(aten.repeat.default, call.tensor(0), call.sizes(1))


@rule("Concat")
def _concat(call: Call) -> fx.Node:
    return call.emit(torch.cat, call.tensors(), call.axis())


@rule("Split")
def _split(call: Call) -> Sequence[fx.Node]:
    axis, count = call.axis(), len(call.node.outputs)
    sizes = call.numbers("split", 1)
    if sizes is None:
        size = -(-call.shape()[axis] // int(call.attribute("num_outputs", count)))
        sizes = [min(size, call.shape()[axis] - k * size) for k in range(count)]
    return call.several(call.emit(torch.split, call.tensor(0), sizes, axis), count)


@rule("Slice")
def _slice(call: Call) -> fx.Node:
    x = call.tensor(0)
    axes = call.sizes(3) if call.has(3) else list(range(len(call.sizes(1))))
    steps = call.sizes(4) if call.has(4) else [1] * len(axes)
    for start, end, axis, step in zip(call.sizes(1), call.sizes(2), axes, steps, strict=True):
        if not isinstance(axis, int) or not isinstance(step, int):
            raise call.refusal("by computed numbers")
        axis %= call.rank
        if step > 0:
            x = call.emit(aten.slice.Tensor, x, axis, start, end, step)
        elif isinstance(start, int) and isinstance(end, int):
            places = np.array(range(*slice(start, end, step).indices(call.shape()[axis])), np.int64)
            x = call.emit(torch.index_select, x, axis, call.growth.constant(places))
        else:
            raise call.refusal("by computed numbers")
    return x


_PADDING = {"reflect": "reflect", "edge": "edge", "wrap": "wrap"}


@rule("Pad")
def _pad(call: Call) -> fx.Node:
    x, mode = call.tensor(0), call.attribute("mode", "constant")
    axes = [int(a) % call.rank for a in call.constant(3).ravel()] if call.has(3) else list(range(call.rank))
    numbers = call.numbers("pads", 1) or []
    widths = dict(zip(axes, zip(numbers[: len(axes)], numbers[len(axes) :], strict=True), strict=True))
    if mode == "constant":
        around = [n for d in reversed(range(call.rank)) for n in widths.get(d, (0, 0))]
        return call.emit(aten.constant_pad_nd.default, x, around, call.number(2, 0))
    for axis, (before, after) in widths.items():
        if (before, after) == (0, 0):
            continue
        if min(before, after) < 0 or mode not in _PADDING:
            raise call.refusal(f"in the mode {mode}")
        places = np.pad(np.arange(call.shape()[axis]), (before, after), _PADDING[mode])  # type: ignore[call-overload]
        x = call.emit(torch.index_select, x, axis, call.growth.constant(places))
    return x


# -- picking -----------------------------------------------------------------------------


def from_front(index: Tensor, size: int) -> Tensor:
    """Positions that count from the front."""
    return torch.where(index < 0, index + size, index).long()


def gather(x: Tensor, index: Tensor, axis: int) -> Tensor:
    """Positions of one dimension, in whose place the dimensions of `index` stand."""
    flat = x.index_select(axis, from_front(index, x.shape[axis]).reshape(-1))
    return flat.reshape((*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]))


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a table."""
    return F.embedding(from_front(index, len(table)), table)


@rule("Gather")
def _gather(call: Call) -> fx.Node:
    x, index, axis = call.tensor(0), call.tensor(1), call.axis()
    return call.emit(look_up, x, index) if axis == 0 and call.rank == 2 else call.emit(gather, x, index, axis)


def gather_elements(x: Tensor, index: Tensor, axis: int) -> Tensor:
    """A position of one dimension for every number."""
    return torch.gather(x, axis, from_front(index, x.shape[axis]))


def gather_rows(x: Tensor, index: Tensor, batch: int) -> Tensor:
    """What stands at positions of several dimensions, behind `batch` that go along."""
    if batch:
        rows = [gather_rows(a, i, batch - 1) for a, i in zip(x, index, strict=True)]
        return torch.stack(rows)
    return x[tuple(index.long().unbind(-1))]


def scatter_elements(x: Tensor, index: Tensor, updates: Tensor, axis: int, reduction: str) -> Tensor:
    """`gather_elements` the other way."""
    index = from_front(index, x.shape[axis])
    return x.scatter(axis, index, updates) if reduction == "none" else x.scatter_add(axis, index, updates)


def scatter_rows(x: Tensor, index: Tensor, updates: Tensor, reduction: str) -> Tensor:
    """`gather_rows` the other way."""
    return x.index_put(tuple(index.long().unbind(-1)), updates, accumulate=reduction == "add")


RULES |= {
    "GatherElements": plain(gather_elements, axis=0),
    "GatherND": plain(gather_rows, batch_dims=0),
}


@rule("ScatterElements", "ScatterND")
def _scatter(call: Call) -> fx.Node:
    reduction = call.attribute("reduction", "none")
    if reduction not in ("none", "add"):
        raise call.refusal(f"by {reduction}")
    if call.node.op_type == "ScatterND":
        return call.emit(scatter_rows, *call.tensors(), reduction)
    return call.emit(scatter_elements, *call.tensors(), call.axis(), reduction)


def one_hot(index: Tensor, depth: int, values: Tensor, axis: int) -> Tensor:
    """The second of two values where a dimension's position is the index, the first elsewhere."""
    places = torch.arange(depth, device=index.device)
    marks = from_front(index, depth).unsqueeze(axis) == places.reshape(-1, *[1] * (index.dim() - axis))
    return torch.where(marks, values[1], values[0])


@rule("OneHot")
def _one_hot(call: Call) -> fx.Node:
    axis = int(call.attribute("axis", -1)) % (call.rank + 1)
    return call.emit(one_hot, call.tensor(0), int(call.number(1)), call.tensor(2), axis)


@rule("Trilu")
def _triangle(call: Call) -> fx.Node:
    function = torch.triu if call.attribute("upper", 1) else torch.tril
    return call.emit(function, call.tensor(0), int(call.number(1, 0)))


# -- made of sizes -----------------------------------------------------------------------


@rule("ConstantOfShape")
def _filled(call: Call) -> fx.Node:
    held = call.attribute("value")
    name = "FLOAT" if held is None else held.dtype.name
    if name not in DTYPES:
        raise call.refusal(f"of {name.lower()}")
    number = 0.0 if held is None else held.numpy().ravel()[0].item()
    make = call.growth.graph.call_function
    return make(aten.full.default, (call.sizes(0), number), {"dtype": DTYPES[name]})


def sizes(x: Tensor, start: int, end: int | None) -> Tensor:
    """The sizes of some dimensions, as a tensor."""
    return torch.tensor(list(x.shape)[start:end], dtype=torch.int64, device=x.device)


def count(x: Tensor) -> Tensor:
    """How many numbers there are, as a tensor."""
    return torch.tensor(x.numel(), device=x.device)


def steps(start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    """Numbers from one to another."""
    return torch.arange(start.item(), end.item(), step.item(), dtype=start.dtype, device=start.device)


RULES |= {"Shape": plain(sizes, start=0, end=None), "Size": plain(count), "Range": plain(steps)}


# -- images ------------------------------------------------------------------------------


def depth_to_space(x: Tensor, block: int, mode: str) -> Tensor:
    """Channels side by side."""
    if mode == "CRD":
        return F.pixel_shuffle(x, block)
    b, c, h, w = x.shape
    parts = x.reshape(b, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(b, c // block**2, h * block, w * block)


def space_to_depth(x: Tensor, block: int) -> Tensor:
    """The other way."""
    b, c, h, w = x.shape
    parts = x.reshape(b, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(b, c * block**2, h // block, w // block)


RULES |= {
    "DepthToSpace": plain(depth_to_space, blocksize=1, mode="DCR"),
    "SpaceToDepth": plain(space_to_depth, blocksize=1),
}


def sampled(x: Tensor, grid: Tensor, mode: str, padding: str, corners: int) -> Tensor:
    """What an image shows at the places of a grid."""
    return F.grid_sample(x, grid, mode, padding, bool(corners))


@rule("GridSample")
def _sampled(call: Call) -> fx.Node:
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(mode := call.attribute("mode", "linear"), mode)
    corners = call.attribute("align_corners", 0)
    return call.emit(sampled, *call.tensors(), mode, call.attribute("padding_mode", "zeros"), corners)


def along(x: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """One dimension multiplied by a matrix ``(new, old)``."""
    return (x.movedim(axis, -1) @ matrix.to(x.dtype).mT).movedim(-1, axis)


@rule("Resize")
def _resize(call: Call) -> fx.Node:
    """Every dimension by itself: positions are picked, or mixed by a matrix."""
    way = call.attribute("coordinate_transformation_mode", "half_pixel")
    mode, rounding = call.attribute("mode", "nearest"), call.attribute("nearest_mode", "round_prefer_floor")
    if call.attribute("antialias", 0) or call.attribute("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise call.refusal("with antialiasing or kept proportions")
    if way not in _WAYS:
        raise call.refusal(f"by {way}")
    x = call.tensor(0)
    axes = call.attribute("axes") or list(range(call.rank))
    scales = dict(zip(axes, call.constant(2).ravel(), strict=True)) if call.has(2) and call.shape(2) != (0,) else {}
    for axis in axes:
        axis %= call.rank
        old, new = call.shape()[axis], call.output[axis]
        scale = np.float32(scales.get(axis, new / old))
        if old == new and scale == 1:
            continue
        places = _places(way, old, new, scale)
        if mode == "nearest":
            picked = np.clip(_ROUNDED[rounding](places), 0, old - 1).astype(np.int64)
            x = call.emit(torch.index_select, x, axis, call.growth.constant(picked))
        else:
            cubic = call.attribute("cubic_coeff_a", -0.75) if mode == "cubic" else None
            matrix = _mixing(places, old, cubic, bool(call.attribute("exclude_outside", 0)))
            x = call.emit(along, x, call.growth.constant(matrix), axis)
    return x


def _places(way: str, old: int, new: int, scale: np.float32) -> Array:
    """Where the new positions of a dimension lie among the old ones, in float32 as ONNX Runtime has it."""
    x, half = np.arange(new, dtype=np.float32), np.float32(0.5)
    match way:
        case "align_corners":
            return x * np.float32((old - 1) / max(new - 1, 1))
        case "asymmetric":
            return x / scale
        case "pytorch_half_pixel" if new == 1:
            return 0 * x
        case "half_pixel_symmetric":
            return old / 2 * (1 - new / (scale * old)) + (x + half) / scale - half
        case _:
            return (x + half) / scale - half


_WAYS = ("half_pixel", "pytorch_half_pixel", "half_pixel_symmetric", "align_corners", "asymmetric")
_ROUNDED: dict[str, Callable[[Array], Array]] = {
    "round_prefer_floor": lambda x: np.ceil(x - np.float32(0.5)),
    "round_prefer_ceil": lambda x: np.floor(x + np.float32(0.5)),
    "floor": np.floor,
    "ceil": np.ceil,
}


def _mixing(places: Array, old: int, cubic: float | None, inside: bool) -> Array:
    """How much of every old position is in each new one: linear, or cubic with a coefficient."""
    matrix = np.zeros((len(places), old), np.float32)
    first = np.floor(places)
    part = places - first
    for k in (0, 1) if cubic is None else (-1, 0, 1, 2):
        distance = np.abs(part - k)
        if cubic is None:
            weight = 1 - distance
        else:
            a = cubic
            near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
            far = a * (((distance - 5) * distance + 8) * distance - 4)
            weight = np.where(distance <= 1, near, far)
        index = first + k
        if inside:
            weight = np.where((index < 0) | (index >= old), 0, weight)
        np.add.at(matrix, (np.arange(len(places)), np.clip(index, 0, old - 1).astype(int)), weight)
    return matrix / matrix.sum(1, keepdims=True) if inside else matrix
