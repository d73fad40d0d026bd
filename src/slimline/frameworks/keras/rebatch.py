"""Graphs that were traced at one batch size, freed of it again.

A layer that asks a symbolic tensor for its batch gets None, with which it cannot reshape, tile or broadcast. So it is
asked at a size that nothing else has, and wherever that number appears it is the batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
from keras.src.ops import numpy as numpy_ops  # bare operations get a stable name only through their class

from slimline.frameworks.keras.functional import Call, is_array, replay

SIZES = (53, 59, 61, 67, 71, 73, 79, 83, 89, 97)


def unused(shapes: Iterable[tuple[int | None, ...]]) -> int:
    """A batch size of which no dimension of `shapes` is a multiple."""
    taken = {n for shape in shapes for n in shape if n}
    return next(size for size in SIZES if not any(n % size == 0 for n in taken))


def freed(model: keras.Model, size: int) -> keras.Model:
    """The functional model, all of whose batches are `size`, for any batch.

    Raises
    ------
    ValueError : the number is in it where it cannot be taken out.
    """
    inputs = [
        keras.Input(batch_shape=(None, *t.shape[1:]) if t.shape and t.shape[0] == size else t.shape, dtype=t.dtype)
        for t in model.inputs
    ]
    anchor = next(t for t in inputs if t.shape and t.shape[0] is None)

    def visit(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        operation, old = call.operation, call.outputs[0].shape
        args, kwargs = keras.tree.map_structure(lambda a: _one(a, size), (args, kwargs))
        if isinstance(operation, numpy_ops.Reshape):
            return numpy_ops.Reshape([-1 if n % size == 0 else n for n in old])(args[0])
        if isinstance(operation, (numpy_ops.BroadcastTo, numpy_ops.Tile, numpy_ops.Repeat)) and old[0] == size:
            return _copied(operation, args[0], tuple(old), anchor)
        return operation(*args, **kwargs)

    outputs = replay(model, inputs, visit)
    for old, new in zip(model.outputs, outputs, strict=True):
        if [None if d == 0 and n == size else n for d, n in enumerate(old.shape)] != list(new.shape):
            raise ValueError(f"an output of shape {tuple(old.shape)} became {tuple(new.shape)}")
    return keras.Model(inputs, outputs, name=model.name)


def _one(argument: Any, size: int) -> Any:
    """Of an array that repeats itself for every sample, the first; any other argument as it is."""
    if isinstance(argument, (int, np.integer)) and argument % size == 0 and argument:
        raise ValueError("the batch size is an argument")
    if not is_array(argument) or argument.shape[0] != size:
        return argument
    array = keras.ops.convert_to_numpy(argument)
    if (array != array[:1]).any():
        raise ValueError("a constant differs from sample to sample")
    return array[:1]


def _copied(operation: Any, x: Any, shape: tuple[int, ...], anchor: Any) -> Any:
    """What an operation that copies along dimensions makes of `x`, of a `shape` that begins with the batch."""
    if x.shape[0] is None and not isinstance(operation, numpy_ops.BroadcastTo):
        return operation(x)
    x = keras.ops.reshape(x, (1,) * (len(shape) - len(x.shape)) + tuple(x.shape)) if len(x.shape) < len(shape) else x
    sample_shape = tuple(x.shape[1:])
    if isinstance(operation, numpy_ops.Repeat):
        if sample_shape != shape[1:] or x.shape[0] != 1:
            raise ValueError("the samples of a batch are repeated")
    elif sample_shape != shape[1:]:
        x = keras.ops.tile(x, (1, *(n // o for n, o in zip(shape[1:], sample_shape, strict=True))))
    return x if x.shape[0] is None else _for_every_sample(x, anchor)


def _for_every_sample(x: Any, anchor: Any) -> Any:
    """`x`, of one sample, once for every sample of `anchor`."""
    first = anchor[(slice(None),) + (slice(0, 1),) * (len(anchor.shape) - 1)]
    zeros = keras.ops.zeros_like(keras.ops.reshape(first, (-1, *[1] * (len(x.shape) - 1))), dtype=x.dtype)
    return keras.ops.logical_or(x, zeros) if x.dtype == "bool" else keras.ops.add(x, zeros)
