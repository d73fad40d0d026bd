"""Rules of what is told, or finds out, which positions count."""

from __future__ import annotations

from dataclasses import replace

import keras

from slimline.frameworks.keras.functional import Call
from slimline.frameworks.keras.reader import Reader
from slimline.graph import ops


def softmax(reader: Reader, call: Call) -> None:
    """`Softmax` and its like over some axes, with or without a mask of what it may look at."""
    x, shape = reader.name(call.inputs[0]), reader.shape(call.inputs[0])
    axis = call.operation.axis
    axes = range(len(shape)) if axis is None else [a % len(shape) for a in keras.tree.flatten(axis)]
    mask = reader.argument(call, "mask")
    masks = [] if mask is None else [reader.operand(call, mask)]
    attributes = masked(ops.softmax(len(shape), *axes), shape, [sizes for _, sizes in masks])
    reader.node(call, "softmax", [x, *(name for name, _ in masks)], attributes)


def masked(attributes: ops.Attributes, shape: tuple[int, ...], masks: list[tuple[int, ...]]) -> ops.Attributes:
    """A softmax over a tensor of `shape` that is told by `masks`, its further inputs, what it may look at."""
    equation = attributes["equation"]
    fixed = dict(equation.fixed)
    for sizes in masks:
        names = [f"a{d + len(shape) - len(sizes)}" for d in range(len(sizes))]
        dims = tuple((name if n > 1 else "1",) for name, n in zip(names, sizes, strict=True))
        fixed |= {name: COUNTED for name, n in zip(names, sizes, strict=True) if n > 1}
        equation = replace(equation, inputs=(*equation.inputs, dims))
    return {**attributes, "equation": replace(equation, fixed=fixed)}


COUNTED = "a mask counts its positions"


def masking(reader: Reader, call: Call) -> None:
    """`Masking`: steps of which every feature is the same number become zero."""
    x, shape = reader.single(call)
    attributes = ops.elementwise([shape], "masking")
    equation = replace(attributes["equation"], fixed={f"a{len(shape) - 1}": "it looks at all features of a step"})
    reader.node(call, "elementwise", [x], {**attributes, "equation": equation})
