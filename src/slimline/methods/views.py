"""Views: random changes of a batch that teacher and student both see, as pure functions of a generator.

Images are ``(batch, height, width, channels)``, float; what comes back has their shape and dtype.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def mirrored(images: Array, rng: np.random.Generator) -> Array:
    """Every image by chance of a half with left and right exchanged."""
    return np.asarray(np.where(rng.random(len(images))[:, None, None, None] < 0.5, images[:, :, ::-1], images))


def shifted(images: Array, pixels: int, rng: np.random.Generator) -> Array:
    """Every image moved by up to so many pixels in both directions; zeros come in."""
    n, height, width = images.shape[:3]
    padded = np.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)))
    rows, columns = (rng.integers(0, 2 * pixels + 1, n)[:, None] + np.arange(size) for size in (height, width))
    return np.asarray(padded[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]])


def cropped(images: Array, least: float, rng: np.random.Generator) -> Array:
    """A random rectangle of every image, of at least the part `least` of its area and of sides 3:4 to 4:3 (relative to
    the image's), brought to the image's size bilinearly (Szegedy et al. 2015, arXiv:1409.4842)."""
    n = len(images)
    area, ratio = rng.uniform(least, 1, n), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), n))
    result = images
    for axis, side in ((1, np.sqrt(area * ratio)), (2, np.sqrt(area / ratio))):
        part = np.minimum(side, 1.0)
        result = _window(result, axis, rng.uniform(0, 1, n) * (1 - part), part)
    return result


def erased(images: Array, largest: float, rng: np.random.Generator) -> Array:
    """By chance of a half every image with a random rectangle of it, of up to the part `largest` of its area and of
    sides 1:3 to 3:1, replaced by uniform noise between the least and the greatest value of the batch (random erasing,
    Zhong et al. 2020, arXiv:1708.04896)."""
    n, *sides = images.shape[:3]
    area = rng.uniform(min(0.02, largest), largest, n)
    ratio = np.exp(rng.uniform(-np.log(3), np.log(3), n))
    inside = (rng.random(n) < 0.5)[:, None, None]
    for axis, side in enumerate((np.sqrt(area * ratio), np.sqrt(area / ratio))):
        length = np.minimum(np.rint(side * sides[axis]), sides[axis])
        start = np.floor(rng.uniform(0, 1, n) * (sides[axis] - length + 1))
        at = np.arange(sides[axis])
        within = (at >= start[:, None]) & (at < (start + length)[:, None])
        inside = inside & (within[:, :, None] if axis == 0 else within[:, None, :])
    noise = np.asarray(rng.uniform(images.min(), images.max(), images.shape), images.dtype)
    return np.where(inside[..., None], noise, images)


def noisy(values: Array, strength: float, rng: np.random.Generator) -> Array:
    """With normal noise, whose standard deviation is the part `strength` of that of the whole batch."""
    deviation = strength * float(values.std())
    return np.asarray(values + np.asarray(rng.normal(0, deviation, values.shape), values.dtype))


def mixing(samples: int, alpha: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """Mixup (Zhang et al. 2018, arXiv:1710.09412): of every sample the part that stays, ``Beta(alpha, alpha)``, 1 being
    uniform, and the other sample that comes in."""
    return rng.beta(alpha, alpha, samples), rng.permutation(samples)


def mixed(values: Array, parts: Array, others: Array) -> Array:
    """The values with those of the `others` mixed in, see `mixing`."""
    part = parts.reshape(-1, *[1] * (values.ndim - 1)).astype(values.dtype)
    return np.asarray(part * values + (1 - part) * values[others])


def _window(images: Array, axis: int, start: Array, part: Array) -> Array:
    """One axis of every image from `start`, `part` of its size long, spread over the whole size."""
    size = images.shape[axis]
    at = (start[:, None] + part[:, None] * (np.arange(size) + 0.5) / size) * size - 0.5
    at = np.clip(at, 0, size - 1)
    low = np.minimum(at.astype(np.int64), max(size - 2, 0))
    high = np.minimum(low + 1, size - 1)
    shape = [len(images), 1, 1, 1]
    shape[axis] = size
    weight = (at - low).astype(images.dtype).reshape(shape)
    below, above = (np.take_along_axis(images, index.reshape(shape), axis) for index in (low, high))
    return np.asarray(below + weight * (above - below))
