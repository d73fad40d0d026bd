"""Rules of the bare ``keras.ops`` functions that multiply tensors: products, convolutions, normalisation.

What a weight contracts needs no care: in a masked model the weight is zero there. Where two computed tensors meet, what
goes must be left out of the sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import keras
from keras.src.ops import nn  # the classes behind keras.ops
from keras.src.ops import numpy as numpy_ops

from slimline.frameworks.keras.functional import Call
from slimline.frameworks.keras.reader import NoRule, Reader
from slimline.frameworks.keras.rules_layers import Rule
from slimline.graph import ops
from slimline.graph.equation import Window


def matmul(reader: Reader, call: Call) -> None:
    """Matrix product of two tensors; with a stored matrix on the right it is a linear layer."""
    names, shapes = reader.operands(call)
    if reader.stored(names[1]) and len(shapes[1]) == 2 and not reader.stored(names[0]) and len(shapes[0]) > 1:
        return reader.node(call, "linear", [*names, None], ops.linear(len(shapes[0]), "i o"))
    return reader.node(call, "matmul", names, ops.matmul(*shapes))


def dot(reader: Reader, call: Call) -> None:
    """`dot` where it is a matrix product."""
    _, shapes = reader.operands(call)
    if len(shapes) != 2 or not shapes[0] or len(shapes[1]) not in (1, 2):
        raise NoRule("slimline has no rule for it with tensors of these ranks")
    matmul(reader, call)


def einsum(reader: Reader, call: Call) -> None:
    """Einsum; each operand's letters are distinct, and an ellipsis becomes letters of its own."""
    names, shapes = reader.operands(call)
    text = call.operation.subscripts.replace(" ", "")
    left, arrow, right = text.partition("->")
    operands = left.split(",")
    free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in text]
    dots = {len(shape) - len(o.replace("...", "")) for o, shape in zip(operands, shapes, strict=True) if "." in o}
    if not arrow or len(dots) > 1 or any(len(set(o.replace(".", ""))) < len(o.replace(".", "")) for o in operands):
        raise NoRule(f"slimline has no rule for the equation {text!r}")
    more = "".join(free[: max(dots, default=0)])
    _product(reader, call, names, [o.replace("...", more) for o in operands], right.replace("...", more), shapes)


def tensordot(reader: Reader, call: Call) -> None:
    """Contraction of some axes of two tensors."""
    names, shapes = reader.operands(call)
    axes = call.operation.axes
    ranks = [len(shape) for shape in shapes]
    if isinstance(axes, int):
        axes = [range(ranks[0] - axes, ranks[0]), range(axes)]
    if any(isinstance(part, int) for part in axes):
        axes = [[part] if isinstance(part, int) else part for part in axes]
    pairs = [[a % rank for a in part] for part, rank in zip(axes, ranks, strict=True)]
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    left = [next(letters) for _ in range(ranks[0])]
    right = [left[pairs[0][pairs[1].index(d)]] if d in pairs[1] else next(letters) for d in range(ranks[1])]
    remaining = [c for c in [*left, *right] if not (c in left and c in right)]
    _product(reader, call, names, ["".join(left), "".join(right)], "".join(remaining), shapes)


def _product(
    reader: Reader, call: Call, names: list[str], operands: list[str], right: str, shapes: list[tuple[int, ...]]
) -> None:
    """An einsum without ellipsis; a stored operand comes second, where a layer has its weight."""
    letters: dict[str, int] = {}
    for operand, shape in zip(operands, shapes, strict=True):
        for letter, n in zip(operand, shape, strict=True):
            if letters.setdefault(letter, n) != n:
                raise NoRule("slimline has no rule for an einsum that broadcasts")
    stored = [reader.stored(name) for name in names]
    weighted = len(names) == 2 and sum(stored) == 1
    if weighted and stored[0]:
        names, operands = names[::-1], operands[::-1]
    reader.node(call, "einsum", names, ops.einsum(f"{','.join(operands)}->{right}", weights=weighted))


def conv(depthwise: bool = False) -> Rule:
    """Rule of a convolution with a kernel that is stored or computed."""

    def rule(reader: Reader, call: Call) -> None:
        operation = call.operation
        if (operation.data_format or keras.config.image_data_format()) != "channels_last":
            raise NoRule("slimline reads only data_format='channels_last'")
        (x, kernel), (shape, size) = reader.operands(call)
        rank = len(shape) - 2
        window = _window(operation, size[:-2])
        attributes = ops.conv(rank, channels_last=True, depthwise=depthwise, window=window)
        if not reader.stored(kernel):
            equation = attributes["equation"]
            summed = ("i",) if any("i" in dim for dim in equation.inputs[1]) else ()
            attributes = {**attributes, "equation": replace(equation, statistics=summed)}
        reader.node(call, "conv", [x, kernel, None], attributes)

    return rule


def _window(operation: Any, kernel: tuple[int, ...]) -> Window:
    stride, dilation = (
        (n,) * len(kernel) if isinstance(n, int) else tuple(n) for n in (operation.strides, operation.dilation_rate)
    )
    padding: Any = "ceil" if operation.padding == "same" else ((0, 0),) * len(kernel)
    return Window(stride, dilation, padding)


def norm(kind: str) -> Rule:
    """Rule of layer and RMS normalisation with tensors for scale and shift."""

    def rule(reader: Reader, call: Call) -> None:
        names: list[str | None] = []
        sizes: list[tuple[int, ...]] = []
        for argument in ("x", "scale") if kind == "rms" else ("x", "gamma", "beta"):
            tensor = reader.argument(call, argument)
            name, size = (None, ()) if tensor is None else reader.operand(call, tensor)
            names.append(name)
            sizes.append(size)
        shape = sizes[0]
        axes = sorted(a % len(shape) for a in keras.tree.flatten(call.operation.axis))
        if any(size and size != tuple(shape[a] for a in axes) for size in sizes[1:]):
            raise NoRule("slimline has no rule for a scale or shift of another shape")
        mode = "rms" if kind == "rms" or call.operation.rms_scaling else "layer"
        reader.node(call, "layer_norm", names, ops.layer_norm(len(shape), axes, len(names) - 1, mode))

    return rule


def batch_norm(reader: Reader, call: Call) -> None:
    """Batch normalisation by tensors that are given."""
    names: list[str | None] = []
    for argument in ("x", "scale", "offset", "mean", "variance"):
        tensor = reader.argument(call, argument)
        names.append(None if tensor is None else reader.operand(call, tensor)[0])
    rank = len(reader.shape(reader.argument(call, "x")))
    axis = call.operation.axis
    (axis,) = (a % rank for a in keras.tree.flatten(axis))
    reader.node(call, "batch_norm", names, ops.batch_norm(rank, axis))


PRODUCTS: Mapping[type, Rule] = {
    numpy_ops.Matmul: matmul,
    numpy_ops.Dot: dot,
    numpy_ops.Einsum: einsum,
    numpy_ops.Tensordot: tensordot,
    nn.Conv: conv(),
    nn.DepthwiseConv: conv(depthwise=True),
    nn.LayerNorm: norm("layer"),
    nn.RMSNorm: norm("rms"),
    nn.BatchNorm: batch_norm,
}
