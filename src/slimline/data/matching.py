"""Samples beside what a model takes: their inputs in its order, their shapes and types."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from slimline.basics.arrays import in_order
from slimline.basics.errors import SlimlineError
from slimline.data.splits import Split, Stream
from slimline.graph.ir import InputSpec


def ordered(split: Split | Stream, inputs: Sequence[InputSpec]) -> Split | Stream:
    """The split with its inputs in the model's order, where several were given by name."""
    names = tuple(spec.name for spec in inputs)
    if len(split.names) <= 1 or len(split.names) != len(names):
        return split
    places = {name: place for place, name in enumerate(sorted(split.names))}
    return replace(split, names=names, order=in_order(places, names, f"The {split.name} data"))


def matched(split: Split | Stream, inputs: Sequence[InputSpec]) -> tuple[str, ...]:
    """The dtypes the model takes, if `split` fits its shapes; else the error that says both shapes."""
    if len(split.specs) != len(inputs):
        raise SlimlineError(
            f"The model takes {len(inputs)} inputs ({', '.join(spec.name for spec in inputs)}) and the {split.name} "
            f"data has {len(split.specs)}: give several inputs as a tuple or dict x inside (x, y) or (x,)."
        )
    for (shape, dtype), spec in zip(split.specs, inputs, strict=True):
        what = f"The {split.name} data" if len(inputs) == 1 else f"Input {spec.name} of the {split.name} data"
        sizes = spec.shape[1:]
        if not _fits(shape, sizes):
            raise SlimlineError(
                f"{what} has samples of shape {shape} but the model takes {sample_shape(spec)}: {_mend(shape, sizes)}."
            )
        if np.dtype(dtype).kind == "f" and np.dtype(spec.dtype).kind in "iub":
            raise SlimlineError(f"{what} is {dtype} but the model takes {spec.dtype}: give integers (token ids).")
    return tuple(spec.dtype for spec in inputs)


def sample_shape(spec: InputSpec) -> str:
    """The shape of one sample, such as ``(3, any, any)``."""
    sizes = ["any" if size is None else str(size) for size in spec.shape[1:]]
    return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"


def _fits(shape: tuple[int, ...], sizes: tuple[int | None, ...]) -> bool:
    """Whether a sample has these sizes, of which None is any."""
    return len(shape) == len(sizes) and all(size in (None, n) for n, size in zip(shape, sizes, strict=True))


def _mend(shape: tuple[int, ...], sizes: tuple[int | None, ...]) -> str:
    if len(shape) == len(sizes) >= 3 or (len(shape) == len(sizes) == 2 and _fits(shape[::-1], sizes)):
        if _fits((*shape[1:], shape[0]), sizes):
            return "put the channels last with np.moveaxis(x, 1, -1)"
        if _fits((shape[-1], *shape[:-1]), sizes):
            return "put the channels first with np.moveaxis(x, -1, 1)"
    if _fits((1, *shape), sizes):
        return "add the channel with x[:, None]"
    if _fits((*shape, 1), sizes):
        return "add the channel with x[..., None]"
    if None not in sizes and int(np.prod(shape)) == math.prod(size or 0 for size in sizes):
        return f"reshape it with x.reshape(-1, {', '.join(map(str, sizes))})"
    return "resize the data, or load the model with example inputs of this shape"
