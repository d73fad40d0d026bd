"""Resizing: by TensorFlow's own kernels where they do what ONNX says, else axis by axis as a product of matrices.

What a resized place reads is linear in the places of its axis, so that every mode of ONNX (linear, cubic, to the
nearest; with the frequencies of a smaller image cut off) is one constant matrix for each axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor
from typing import Any

import numpy as np
import tensorflow as tf

from slimline.runtimes.forms.onnx_tensorflow.call import Call, Untranslatable, rule
from slimline.runtimes.forms.onnx_tensorflow.layout import Array, Placed, Sizes, Value, placed_last
from slimline.runtimes.forms.tensorflow import sizes_of

_WHOLE = 1e-4


@dataclass(frozen=True)
class Stretch:
    """How an axis is resized: from `before` places to `after`, by `scale`, which is not their ratio where cut off."""

    axis: int
    before: int
    after: int
    scale: float

    @property
    def exact(self) -> bool:
        """Whether the scale is the ratio of the sizes."""
        return abs(self.scale * self.before - self.after) < _WHOLE


@rule("Resize")
def _resize(call: Call) -> Value:
    x = call.operand(0)
    stretches = _stretches(call, x.shape)
    if not stretches:
        return x
    resize = _kernel(call, x, stretches)
    if resize is not None:
        target = [int(n or 0) for n in x.shape[2:]]
        for stretch in stretches:
            target[stretch.axis - 2] = stretch.after
        return placed_last(resize(x.channels_last, target))
    for stretch in stretches:
        x = _along(x, stretch.axis, _matrix(call, stretch))
    return x


def _stretches(call: Call, shape: Sequence[int | None]) -> list[Stretch]:
    """The axes that change."""
    axes = [a % len(shape) for a in call.attribute("axes") or range(len(shape))]
    if call.has(3):
        sizes = _sizes(call, axes)
        scales = [n / (shape[a] or n) for a, n in zip(axes, sizes, strict=True)]
        policy = call.attribute("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            if any(shape[a] is None for a in axes):
                raise Untranslatable("Resize that keeps the proportions of an open size")
            scales = [(min if policy == "not_larger" else max)(scales)] * len(axes)
            sizes = [floor(s * (shape[a] or 0) + 0.5) for a, s in zip(axes, scales, strict=True)]
    else:
        scales = [float(s) for s in call.constant(2 if call.opset > 10 else 1)]
        sizes = [floor((shape[a] or 1) * s + _WHOLE) for a, s in zip(axes, scales, strict=True)]
    stretches = []
    for axis, after, scale in zip(axes, sizes, scales, strict=True):
        before = shape[axis]
        if before is None and scale != 1.0:
            raise Untranslatable("Resize of an open size")
        if before is not None and (scale != 1.0 or before != after):
            stretches.append(Stretch(axis, before, after, scale))
    return stretches


def _sizes(call: Call, axes: Sequence[int]) -> list[int]:
    """The sizes that the axes get; 1 for the batch where it is open, which exporters write as its own size."""
    value = call.inputs[3]
    if not isinstance(value, Sizes):
        return [int(n) for n in call.constant(3)]
    if any(axis and not isinstance(v, int) for axis, v in zip(axes, value.values, strict=True)):
        raise Untranslatable("Resize to a computed size")
    return [v if isinstance(v, int) else 1 for v in value.values]


def _kernel(call: Call, x: Placed, stretches: list[Stretch]) -> Callable[[Any, list[int]], Any] | None:
    """The kernel of TensorFlow that resizes as the operator says; None where there is none."""
    if x.rank != 4 or None in x.shape[2:] or any(s.axis < 2 or not s.exact for s in stretches):
        return None
    mode, way = _mode(call)
    if mode == "nearest":
        rounding = call.attribute("nearest_mode", "round_prefer_floor")
        floored = way == "asymmetric" and (call.opset < 11 or rounding == "floor")
        whole = all(s.after % s.before == 0 for s in stretches)
        # By a whole number half pixels round to the place that they lie in.
        if floored or (whole and way in ("half_pixel", "pytorch_half_pixel") and "round" in rounding):
            return lambda image, size: tf.compat.v1.image.resize_nearest_neighbor(image, size)
        return None
    ways: dict[str, dict[str, bool]] = {
        "half_pixel": {"half_pixel_centers": True},
        "pytorch_half_pixel": {"half_pixel_centers": True},
        "align_corners": {"align_corners": True},
        "asymmetric": {},
    }
    single = way == "pytorch_half_pixel" and any(s.after == 1 for s in stretches)
    smooth = call.attribute("antialias", 0) and any(s.scale < 1 for s in stretches)
    if mode != "linear" or way not in ways or single or smooth:
        return None
    return lambda image, size: tf.raw_ops.ResizeBilinear(images=image, size=size, **ways[way])


def _mode(call: Call) -> tuple[str, str]:
    """How to interpolate, and how places of the result lie among those of the image."""
    way = "asymmetric" if call.opset < 11 else call.attribute("coordinate_transformation_mode", "half_pixel")
    return call.attribute("mode", "nearest"), way


def _along(x: Placed, axis: int, matrix: Array) -> Placed:
    """An axis of `x`, of n places, multiplied by a constant ``[m, n]`` matrix."""
    if np.all(np.count_nonzero(matrix, axis=1) == 1) and np.all(matrix.sum(axis=1) == 1):
        return Placed(tf.gather(x.tensor, matrix.argmax(axis=1), axis=x.axis(axis)), x.order)
    order = (*(a for a in x.order if a != axis), axis)
    tensor = x.to(order)
    rows = tf.matmul(tf.reshape(tensor, [-1, matrix.shape[1]]), tf.constant(matrix.T.astype(np.float32)))
    return Placed(tf.reshape(rows, [*sizes_of(tensor)[:-1], matrix.shape[0]]), order)


def _matrix(call: Call, stretch: Stretch) -> Array:
    """What each place of the result takes of each place of the image, ``[after, before]``."""
    mode, way = _mode(call)
    places = _places(way, stretch)
    taps = np.arange(stretch.before)
    matrix = np.zeros((stretch.after, stretch.before))
    if mode == "nearest":
        rounding = call.attribute("nearest_mode", "round_prefer_floor") if call.opset > 10 else "floor"
        matrix[np.arange(stretch.after), np.clip(_ROUNDINGS[rounding](places), 0, stretch.before - 1)] = 1
        return matrix
    squeeze = min(stretch.scale, 1.0) if call.attribute("antialias", 0) else 1.0
    steepness = call.attribute("cubic_coeff_a", -0.75)
    for row, place in enumerate(places):
        reach = floor((1 if mode == "linear" else 2) / squeeze) + 1
        around = np.arange(floor(place) - reach, floor(place) + reach + 2)
        weights = _weights(mode, np.abs(around - place) * squeeze, steepness)
        if call.attribute("exclude_outside", 0):
            weights = np.where((around >= 0) & (around < stretch.before), weights, 0)
        if squeeze != 1.0 or call.attribute("exclude_outside", 0):
            weights = weights / weights.sum()
        np.add.at(matrix[row], np.clip(around, taps[0], taps[-1]), weights)
    return matrix


def _places(way: str, stretch: Stretch) -> Array:
    """Where the places of the result lie in the image."""
    target, (n, m, scale) = np.arange(stretch.after), (stretch.before, stretch.after, stretch.scale)
    if way == "asymmetric":
        return np.asarray(target / scale)
    if way == "align_corners":
        if not stretch.exact:  # the standard and its runtimes differ
            raise Untranslatable("Resize with aligned corners to other than whole sizes")
        return target * (n - 1) / max(m - 1, 1)
    if way == "pytorch_half_pixel" and m == 1:
        return np.zeros(1)
    if way == "half_pixel_symmetric":
        return n / 2 * (1 - m / (n * scale)) + (target + 0.5) / scale - 0.5
    if way not in ("half_pixel", "pytorch_half_pixel"):
        raise Untranslatable(f"Resize by {way}")
    return (target + 0.5) / scale - 0.5


def _weights(mode: str, distance: Array, steepness: float) -> Array:
    """The kernel of an interpolation at these distances: a triangle, or Keys' cubic (1981)."""
    if mode == "linear":
        return np.asarray(np.clip(1 - distance, 0, None))
    a, x = steepness, distance
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


_ROUNDINGS: dict[str, Callable[[Array], Array]] = {
    "round_prefer_floor": lambda x: np.ceil(x - 0.5).astype(int),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5).astype(int),
    "floor": lambda x: np.floor(x).astype(int),
    "ceil": lambda x: np.ceil(x).astype(int),
}
