"""Grids that activations get while the model runs (dynamic quantization), as runtimes define them.

All is computed in float32, and ties go to the even code. Zero is always in a grid, and has a code of its own.

====================  =================================================================================================
``uint8_per_tensor``  ONNX's DynamicQuantizeLinear: one grid of all numbers of a tensor. The scale is
                      ``(high - low) / LEVELS`` (1 where all are zero), the zero point ``round(-low / scale)``.
``int8_per_row``      XNNPACK's, for LiteRT and ExecuTorch: a grid for each row that a linear layer or a convolution of
                      single places reads (its channels), for each sample that any other convolution reads. Numbers are
                      multiplied by ``f = LEVELS / (high - low)`` and codes by ``1 / f``. Of ``-128 - low f`` and
                      ``127 - high f`` the one with the lesser rounding error, rounded, is the zero point.
====================  =================================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

DynamicGrid = Literal["uint8_per_tensor", "int8_per_row"]
GRIDS: tuple[DynamicGrid, ...] = get_args(DynamicGrid)
LEVELS = 255
"""Steps of a grid: codes are 0 … 255, or -128 … 127."""
LOW, HIGH = -128, 127
"""Ends of an int8 grid."""
NARROWEST = 1e-30
"""A row of zeros is taken to span this, so that nothing is divided by zero."""


def read_together(rank: int, channels: int, kernel: Sequence[int] = (), strides: Sequence[int] = ()) -> tuple[int, ...]:
    """Dimensions over which the numbers that a layer reads share a grid ``int8_per_row``.

    Parameters
    ----------
    rank, channels : number of dimensions of what it reads, the batch first, and which of them are its channels.
    kernel, strides : sizes and steps of a convolution; empty for a linear layer.
    """
    return (channels,) if max(*kernel, *strides, 1, 1) == 1 else tuple(range(1, rank))
