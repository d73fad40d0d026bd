"""Grids that activations get while the model runs (dynamic quantization), as runtimes define them.

That of a float32 tensor is the one of ONNX's DynamicQuantizeLinear: uint8, of zero and all its numbers, in one scale,
``(high - low) / LEVELS`` (1 where all are zero), with the zero point ``round(-low / scale)``. All is computed in
float32 and ties go to the even code.
"""

from __future__ import annotations

LEVELS = 255
"""Steps of the grid: codes are 0 … 255."""
