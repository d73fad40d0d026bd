"""Formats: how the numbers of a tensor are written down, as data.

A format says which real numbers a tensor may hold and as which codes they are stored. The simulation rounds to it, the
artifact's writer stores its codes, and the report describes it, so the three cannot disagree.

================= =================================================================================
`IntegerGrid`      evenly spaced levels: INT8, INT4, any width from 2 to 16 bits
`FloatFormat`      floating point: float32, float16, bfloat16, float8_e4m3fn, float8_e5m2
`BlockFloat`       floating point in blocks whose scales are short floats too: MXFP4, NVFP4
`Levels`           any list of levels, a codebook: binary, ternary, powers of two, clusters
`Masked`           another format, with zeros at fixed positions
================= =================================================================================

Scales lie over a tensor in *blocks*: ``()`` is one for the whole tensor; else there is the length of a block along each
dimension, None for all of it. So ``(1, None)`` is one scale per row, ``(1, 32)`` one per 32 neighbours within a row and
``(128, 128)`` one per square. The last block of a dimension may be shorter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from slimline.basics.errors import SlimlineError
from slimline.methods.formats.base import Array, Blocks, Format, Scaled, along, spread
from slimline.methods.formats.floats import BlockFloat, FloatFormat
from slimline.methods.formats.integers import IntegerGrid
from slimline.methods.formats.levels import Levels
from slimline.methods.formats.masked import Masked

__all__ = [
    "Array", "BlockFloat", "Blocks", "FloatFormat", "Format", "IntegerGrid", "Levels", "Masked", "Scaled", "along",
    "assembled", "from_notes", "spread",
]  # fmt: skip

_KINDS: Mapping[str, type[Format]] = {
    kind.kind: kind for kind in (IntegerGrid, FloatFormat, BlockFloat, Levels, Masked)
}


def from_notes(notes: Any) -> Format:
    """The format that `Format.notes` wrote, every field checked: notes may come from anybody.

    Raises
    ------
    SlimlineError : what is no format.
    """
    kind = _KINDS.get(str(notes.get("kind"))) if isinstance(notes, Mapping) else None
    if kind is None or notes.keys() - {"kind"} != {f.name for f in fields(kind)}:
        raise SlimlineError("The notes of a format are damaged: quantize the float model again.")

    def field(name: str, value: Any) -> Any:
        return from_notes(value) if name == "inner" else tuple(value) if isinstance(value, list) else value

    return kind(**{name: field(name, value) for name, value in notes.items() if name != "kind"})


def assembled(outline: Mapping[str, Any], arrays: Mapping[str, Array]) -> Format:
    """The format of these `Format.outline` and `Format.arrays`, checked as by `from_notes`.

    Raises
    ------
    SlimlineError : what is no format.
    """
    notes = {key: dict(value) if isinstance(value, Mapping) else value for key, value in outline.items()}
    for name, array in arrays.items():
        owner, _, field = name.rpartition(".")
        part = notes.get(owner, notes)
        if not isinstance(part, dict):
            raise SlimlineError("The notes of a format are damaged: quantize the float model again.")
        part[field] = array
    return from_notes(notes)
