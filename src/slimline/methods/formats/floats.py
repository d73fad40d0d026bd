"""Floating-point numbers of few bits, alone and in blocks whose scales are such numbers too."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from slimline.basics.errors import SlimlineError, shown
from slimline.methods.formats.base import ONE, Array, Blocks, Scaled


@dataclass(frozen=True)
class _Float:
    """Widths of a binary floating-point type: exponent of its smallest normal number, mantissa bits, largest code."""

    lowest: int
    mantissa: int
    largest: int
    bits: int


_FLOATS = {
    "float32": _Float(-126, 23, 0x7F7FFFFF, 32),
    "float16": _Float(-14, 10, 0x7BFF, 16),
    "bfloat16": _Float(-126, 7, 0x7F7F, 16),
    "float8_e4m3fn": _Float(-6, 3, 0x7E, 8),
    "float8_e5m2": _Float(-14, 2, 0x7B, 8),
    "float4_e2m1fn": _Float(0, 1, 0x7, 4),
}


@dataclass(frozen=True, eq=False)
class FloatFormat(Scaled):
    """Floating-point numbers times a scale; codes are their bit patterns.

    Ties go to the even mantissa (IEEE 754); what is too large becomes the largest finite number and never infinity, as
    in Cast of ONNX with ``saturate``.

    Attributes
    ----------
    dtype : ``float32``, ``float16``, ``bfloat16``, ``float8_e4m3fn``, ``float8_e5m2`` or ``float4_e2m1fn``.
    """

    kind: ClassVar[str] = "float"
    dtype: str

    @classmethod
    def plain(cls, dtype: str) -> FloatFormat:
        """The type by itself, without a scale."""
        return cls(ONE, (), dtype)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.dtype, str) or self.dtype not in _FLOATS:
            raise SlimlineError(f"{shown(self.dtype)} is no float format: choose one of {', '.join(_FLOATS)}.")

    @property
    def is_plain(self) -> bool:
        """Whether nothing is scaled."""
        return self.blocks == () and float(self.scale) == 1.0

    @property
    def code_bits(self) -> int:
        return _FLOATS[self.dtype].bits

    def _array_bits(self) -> int:
        return 0 if self.is_plain else super()._array_bits()

    @property
    def largest(self) -> float:
        """The largest finite number of the type, before it is scaled."""
        kind = _FLOATS[self.dtype]
        return float(self._magnitudes(np.asarray(kind.largest)))

    @property
    def codebook(self) -> Array:
        """All numbers of a type of few bits before they are scaled, float32, ascending."""
        sizes = self._magnitudes(np.arange(_FLOATS[self.dtype].largest + 1))
        return np.concatenate([-sizes[:0:-1], sizes]).astype(np.float32)

    @property
    def bounds(self) -> Array:
        """Up to where numbers are rounded to each of `codebook` but the last, float32: the middles, or where those go
        up, as the number above is the even one, what lies just below them."""
        levels = self.codebook
        codes = np.abs(np.arange(len(levels)) - len(levels) // 2)
        middles = (levels[:-1] + levels[1:]) / 2
        return np.where(codes[:-1] % 2 == 0, middles, np.nextafter(middles, np.float32(-np.inf)))

    def _encode(self, x: Array) -> Array:
        kind = _FLOATS[self.dtype]
        scaled = self._scaled(x).astype(np.float64)
        size = np.minimum(np.abs(scaled), self.largest)
        exponent = np.where(size > 0, np.maximum(np.frexp(size)[1] - 1, kind.lowest), kind.lowest)
        # Counted in units of the last place of its exponent, a number and what a carry makes of it have one formula.
        units = np.rint(np.ldexp(size, kind.mantissa - exponent)).astype(np.int64)
        codes = np.minimum(((exponent - kind.lowest).astype(np.int64) << kind.mantissa) + units, kind.largest)
        signed: Array = (codes | (np.signbit(scaled).astype(np.int64) << (kind.bits - 1))).astype(
            f"uint{max(kind.bits, 8)}"
        )
        return signed

    def _magnitudes(self, codes: Array) -> Array:
        kind = _FLOATS[self.dtype]
        places = np.maximum((codes >> kind.mantissa) - 1, 0)
        units = (codes - (places << kind.mantissa)).astype(np.float64)
        sizes: Array = np.ldexp(units, places + kind.lowest - kind.mantissa)
        return sizes

    def decode(self, codes: Array, dtype: Any = np.float32) -> Array:
        sign = 1 << (_FLOATS[self.dtype].bits - 1)
        whole = codes.astype(np.int64)
        sizes = self._magnitudes(whole & (sign - 1))
        return self._unscaled(np.where(whole & sign, -sizes, sizes), dtype)

    def describe(self) -> str:
        return self.dtype if self.is_plain else f"{self.dtype}, scaled {self._where()}"


_EXPONENTS = "float8_e8m0"
"""Scales that are powers of two."""


@dataclass(frozen=True, eq=False)
class BlockFloat(FloatFormat):
    """Floating-point numbers in blocks, times a scale of each block that is itself a number of a short float type.

    MXFP4 has powers of two for blocks of 32 (OCP Microscaling Formats 1.0); NVFP4 has float8_e4m3fn for blocks of 16,
    all times one float32. Rounding is that of `FloatFormat`, but there is no negative zero.

    Attributes
    ----------
    scales : ``float8_e8m0`` (powers of two) or ``float8_e4m3fn``, the type of the scales.
    unit : float32 ``()``, positive: what all scales are multiples of by numbers of that type.
    """

    kind: ClassVar[str] = "block_float"
    scales: str
    unit: Array

    @classmethod
    def at_least(cls, scale: Array, blocks: Blocks, dtype: str, scales: str) -> BlockFloat:
        """With the least scales that are no smaller than these, float32; the largest has the largest code."""
        top = 1.0 if scales == _EXPONENTS else float(scale.max()) / FloatFormat.plain(scales).largest
        unit = np.asarray(max(top, np.finfo(np.float32).tiny), np.float32)
        multiples = np.asarray(_multiples(scale, scales, unit, up=True), np.float32)
        return cls(np.asarray(multiples * unit, np.float32), blocks, dtype, scales, unit)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_array("unit", np.float32)
        if self.scales not in (_EXPONENTS, "float8_e4m3fn") or self.unit.shape or not 0 < self.unit < np.inf:
            raise SlimlineError(
                f"{shown(self.scales)} is no type of scales, or their unit no positive number: choose {_EXPONENTS} or "
                "float8_e4m3fn."
            )
        if not np.array_equal(self.scale, _on_type(self.scale, self.scales, self.unit)):
            raise SlimlineError(f"A scale is no number of {self.scales}: measure the tensor again.")

    def rescaled(self, scale: Array) -> BlockFloat:
        return replace(self, scale=_on_type(scale, self.scales, self.unit))

    @property
    def unscaled(self) -> Scaled:
        return FloatFormat.plain(self.dtype)

    @property
    def multiples(self) -> Array:
        """The scales in multiples of `unit`, float32: numbers of the type `scales`."""
        return np.asarray(_multiples(self.scale, self.scales, self.unit), np.float32)

    @property
    def is_plain(self) -> bool:
        return False

    def _array_bits(self) -> int:
        return 8 * self.scale.size + (0 if self.scales == _EXPONENTS else 32)

    def _encode(self, x: Array) -> Array:
        codes = super()._encode(x)
        sign = 1 << (self.code_bits - 1)
        return np.where(codes == sign, np.zeros((), codes.dtype), codes)

    def describe(self) -> str:
        return f"{self.dtype}, scaled by {self.scales} {self._where()}"


def _on_type(scale: Array, scales: str, unit: Array) -> Array:
    """The nearest scales that multiples of `unit` by numbers of a type are."""
    return np.asarray(np.asarray(_multiples(scale, scales, unit), np.float32) * unit, np.float32)


def _multiples(scale: Array, scales: str, unit: Array, up: bool = False) -> Array:
    """The nearest of these multiples, or those that are no smaller (`up`)."""
    units = np.asarray(scale, np.float64) / np.float64(unit)
    if scales == _EXPONENTS:
        exponents = np.log2(units)
        return np.asarray(np.exp2(np.clip(np.ceil(exponents) if up else np.rint(exponents), -127, 127)))
    each, kind = FloatFormat.plain(scales), _FLOATS[scales]
    codes = np.maximum(each.encode(units), 1)  # zero is no scale
    if up:
        codes = np.minimum(codes + (each.decode(codes, np.float64) < units), kind.largest)
    return each.decode(codes, np.float64)
