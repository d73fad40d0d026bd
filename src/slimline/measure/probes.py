"""Inputs to compare two functions on: the example, and random ones that look like it.

A random input has the dtype and the range of the example: tokens are among those between the smallest and the largest
of the example, floats have its mean and spread and stay within its limits, masks hold its values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

Arrays = tuple[np.ndarray, ...]
SIZES = (1, 3)
"""Batch sizes that are tried besides the example's."""
_FEW = 2  # distinct numbers that an input of many may hold and still be a mask
_MASKED = (0.25, 0.75)  # part of a boolean mask that is true, at least and at most


def probes(example: Arrays, batched: Sequence[bool], quick: bool = False) -> Iterator[tuple[str, list[Arrays]]]:
    """What inputs are, and such inputs, the boldest first: the next ones are for a function that gives nothing finite
    for those before.

    Parameters
    ----------
    batched : which inputs have a batch that may be of any size.
    quick : give the example and one batch of random inputs only.
    """
    yield "the example inputs", [example]
    rng = np.random.default_rng(0)
    own = next((len(x) for x, free in zip(example, batched, strict=True) if free), None)
    sizes: list[int | None] = [own] if own is None else [own, *(s for s in SIZES if s != own)]
    for size in sizes[-1:] if quick else sizes:
        resized = tuple(resize(x, size) if free else x for x, free in zip(example, batched, strict=True))
        drawn = [tuple(change(x, rng) for x in resized) for change in (draw, shuffle, nudge)]
        yield "random inputs" if size is None else f"a random batch of {size}", drawn


def resize(array: np.ndarray, size: int | None) -> np.ndarray:
    """`size` rows, those of `array` again and again."""
    return array if size is None else np.ascontiguousarray(array[np.arange(size) % len(array)])


def draw(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random numbers like those of `array`, of its shape and dtype."""
    if not array.size:
        return array
    if array.dtype.kind == "b":
        part = float(np.clip(array.mean(), *_MASKED))
        return _anchored(array, rng.random(array.shape) < part)
    if array.dtype.kind in "iu":
        low, high = int(array.min()), int(array.max())
        numbers = rng.integers(low, high, array.shape, array.dtype, endpoint=True)
        return _anchored(array, numbers) if high - low < _FEW else numbers
    if array.dtype.kind != "f":
        return rng.permuted(array)
    values = np.unique(array)
    if not np.isfinite(values).all() or (1 < len(values) <= _FEW < array.size):
        return _anchored(array, rng.choice(values, array.shape).astype(array.dtype))
    mean, spread = float(array.mean(dtype=np.float64)), float(array.std(dtype=np.float64))
    if spread == 0:
        spread = 0.5 * abs(mean) or 1.0
        limits = (mean - spread, mean + spread) if mean else (-np.inf, np.inf)
    else:
        limits = float(array.min()), float(array.max())
    numbers = np.clip(rng.normal(mean, spread, array.shape), *limits)
    return np.asarray(numbers.astype(array.dtype))


def shuffle(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The numbers of `array` in another order along its last dimension."""
    return np.asarray(rng.permuted(array, axis=-1)) if array.ndim and array.dtype.kind == "f" else array


def nudge(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`array`, its floats a hundredth larger or smaller."""
    if array.dtype.kind != "f":
        return array
    return np.asarray((array * (1 + rng.uniform(-0.01, 0.01, array.shape))).astype(array.dtype))


def _anchored(array: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """A random mask that leaves the first of every line as it is, so that no line is masked away altogether."""
    if numbers.ndim:
        numbers[..., 0] = array[..., 0]
    return np.asarray(numbers)
