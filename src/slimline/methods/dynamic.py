"""Grids that activations get while the model runs (dynamic quantization), as runtimes define them."""

from __future__ import annotations

import numpy as np

from slimline.methods.formats import Array, IntegerGrid

LEVELS = 255
"""Steps of the grid: codes are 0 … 255."""


def dynamic_grid(x: Array) -> IntegerGrid:
    """The uint8 grid of DynamicQuantizeLinear of ONNX for a float32 tensor: of zero and all its numbers, in one scale.

    All is computed in float32, and ties of the zero point go to the even code, so that scale and zero point are the
    runtime's own, bit by bit. A tensor of zeros has the scale 1.
    """
    x = np.asarray(x, np.float32)
    low, high = np.minimum(x.min(initial=0.0), np.float32(0)), np.maximum(x.max(initial=0.0), np.float32(0))
    scale = (high - low) / np.float32(LEVELS) if high > low else np.float32(1)
    zero = np.rint(np.clip(-low / scale, 0, LEVELS)).astype(np.int32)
    return IntegerGrid(np.asarray(scale, np.float32), (), 8, False, zero_point=np.asarray(zero))
