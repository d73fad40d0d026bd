"""Which formats of weights an ONNX file stores, and how many bits a code takes in it.

Apart from what writes them (`slimline.runtimes.forms.onnx_weights`), so that whoever only asks loads no ONNX library.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from slimline.methods.formats import FloatFormat, Format, IntegerGrid

STORES = "integers of 2 to 8 bits with any scales, float16, bfloat16, float8_e4m3fn and float8_e5m2"

FLOATS = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}

_KERNELS = frozenset({16, 32, 64, 128, 256})  # lengths of blocks


def can_store(each: Format) -> bool:
    """Whether a file stores a format."""
    if isinstance(each, FloatFormat):
        return each.dtype in FLOATS
    return isinstance(each, IntegerGrid) and each.bits <= 8


def container(each: Format) -> int:
    """Bits that a code takes in the file."""
    return max(each.stored_bits, 4)


def is_fused(each: IntegerGrid, turned: bool = False) -> bool:
    """Whether ONNX Runtime multiplies by such a matrix as it is stored, the inputs along dimension 0 or, where it is
    `turned`, 1."""
    if len(each.blocks) != 2:
        return False
    block, other = each.blocks[::-1] if turned else each.blocks
    return other == 1 and (block is None or block in _KERNELS)
