"""Which formats of weights an ONNX file stores, and how many bits a code takes in it.

Apart from what writes them (`slimline.runtimes.forms.onnx_weights`), so that whoever only asks loads no ONNX library.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from slimline.methods.formats import BlockFloat, FloatFormat, Format, IntegerGrid, Levels

STORES = (
    "integers of 2 to 8 bits with any scales, levels that are whole multiples of a power of two (binary, ternary), "
    "float16, bfloat16, float8_e4m3fn, float8_e5m2, and float4_e2m1fn in blocks (mxfp4, nvfp4)"
)

FLOATS = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}

_KERNELS = frozenset({16, 32, 64, 128, 256})  # lengths of blocks


def coded(each: Format) -> Format:
    """The format whose codes are in the file: of levels an integer grid that holds the same numbers, if there is."""
    return (each.grid or each) if isinstance(each, Levels) else each


def can_store(each: Format) -> bool:
    """Whether a file stores a format without a table, see `tabled`."""
    each = coded(each)
    if isinstance(each, BlockFloat):
        return each.code_bits == 4
    if isinstance(each, FloatFormat):
        return each.dtype in FLOATS
    return isinstance(each, IntegerGrid) and each.bits <= 8


def tabled(each: Format) -> bool:
    """Whether a format is written as numbers of places in a table."""
    return isinstance(each, Levels) and each.grid is None and each.codebook.size <= 256


def container(each: Format) -> int:
    """Bits that a code takes in the file."""
    return 8 if tabled(each) else max(coded(each).stored_bits, 4)


def is_fused(each: Format, turned: bool = False) -> bool:
    """Whether ONNX Runtime multiplies by such a matrix as it is stored, the inputs along dimension 0 or, where it is
    `turned`, 1."""
    each = coded(each)
    if not isinstance(each, IntegerGrid) or len(each.blocks) != 2:
        return False
    block, other = each.blocks[::-1] if turned else each.blocks
    return other == 1 and (block is None or block in _KERNELS)
