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

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import numpy as np

from slimline.basics.errors import SlimlineError, shown

Array = np.ndarray[Any, np.dtype[Any]]
Blocks = tuple[int | None, ...]

_STORED_BITS = (1, 2, 4, 8, 16, 32)  # widths in which codes are stored
_DIMENSIONS = 32


def along(axis: int, rank: int) -> Blocks:
    """The blocks of one scale per position of `axis`, of a tensor of `rank` dimensions."""
    return tuple(1 if d == axis % rank else None for d in range(rank))


def spread(array: Array, blocks: Blocks, shape: Sequence[int]) -> Array:
    """What is there per block, repeated so that it broadcasts against a tensor of `shape`."""
    for axis, block in enumerate(blocks):
        if block is not None and block > 1:
            array = np.repeat(array, min(block, shape[axis]), axis).take(range(shape[axis]), axis)
    return array


@dataclass(frozen=True, eq=False)
class Format(ABC):
    """What all formats share. Two are equal where their fields are, numbers included."""

    kind: ClassVar[str]

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return all(_same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    def __hash__(self) -> int:
        return hash((self.kind, self.code_bits))

    @property
    @abstractmethod
    def code_bits(self) -> int:
        """Bits that tell one code from the others."""

    @property
    def stored_bits(self) -> int:
        """Bits that a code takes in a file: `code_bits`, or the next power of two."""
        return next(bits for bits in _STORED_BITS if bits >= self.code_bits)

    def bits_per_value(self, shape: Sequence[int]) -> float:
        """Stored bits per value of a tensor of `shape`: its code, and a share of scales, zero points and levels."""
        return self.stored_bits + self._array_bits() / max(math.prod(shape), 1)

    def _array_bits(self) -> int:
        return sum(8 * array.nbytes for array in self.arrays.values())

    @property
    def arrays(self) -> dict[str, Array]:
        """Its numbers, by the field that holds them; those of a format within it by ``field.field``."""
        held: dict[str, Array] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Format):
                held |= {f"{field.name}.{name}": array for name, array in value.arrays.items()}
            elif isinstance(value, np.ndarray):
                held[field.name] = value
        return held

    @abstractmethod
    def fits(self, shape: Sequence[int]) -> bool:
        """Whether it can be that of a tensor of `shape`."""

    def encode(self, x: Array) -> Array:
        """The codes, integers, of the nearest numbers that the format holds; shape of `x`, which is of any float dtype.

        What lies beyond the format becomes its end.

        Raises
        ------
        SlimlineError : NaN, or a tensor of a shape that the format does not fit.
        """
        if np.isnan(x).any():
            raise SlimlineError("A tensor holds NaN, which no format stores: mend the model before it is quantized.")
        return self._encode(x)

    @abstractmethod
    def _encode(self, x: Array) -> Array: ...

    @abstractmethod
    def decode(self, codes: Array, dtype: Any = np.float32) -> Array:
        """The numbers that `codes` stand for, of a float `dtype`; computed in float32, in float64 for float64."""

    def round(self, x: Array) -> Array:
        """The nearest numbers that the format holds, ``decode(encode(x))``, of the shape and dtype of `x`."""
        return self.decode(self.encode(x), x.dtype)

    @abstractmethod
    def describe(self) -> str:
        """The format in a few words, for messages and reports."""

    def notes(self) -> dict[str, Any]:
        """All fields, lists in place of tuples: ready for JSON once the arrays are stored apart; see `from_notes`."""

        def plain(value: Any) -> Any:
            if isinstance(value, Format):
                return value.notes()
            return list(value) if isinstance(value, tuple) else value

        return {"kind": self.kind, **{f.name: plain(getattr(self, f.name)) for f in fields(self)}}

    def outline(self) -> dict[str, Any]:
        """`notes` without the arrays, which `assembled` takes apart from it."""

        def bare(notes: Mapping[str, Any]) -> dict[str, Any]:
            plain = {k: v for k, v in notes.items() if not isinstance(v, np.ndarray)}
            return {k: bare(v) if isinstance(v, Mapping) else v for k, v in plain.items()}

        return bare(self.notes())

    def _check_shape(self, shape: Sequence[int]) -> None:
        if not self.fits(shape):
            sizes = ", ".join(f"{name} {array.shape}" for name, array in self.arrays.items())
            raise SlimlineError(
                f"A format ({self.describe()}; {sizes}) does not fit a tensor of shape {tuple(shape)}: measure it on "
                "this tensor."
            )

    def _check_array(self, name: str, dtype: Any) -> None:
        array = getattr(self, name)
        if isinstance(array, np.generic):  # what numpy makes of arrays without dimensions when it computes
            array = np.asarray(array)
            object.__setattr__(self, name, array)
        if not isinstance(array, np.ndarray) or array.dtype != dtype:
            raise SlimlineError(f"The {name} of a format is no array of {np.dtype(dtype)}: give one.")


@dataclass(frozen=True, eq=False)
class Scaled(Format):
    """A format whose numbers are multiples of scales.

    Attributes
    ----------
    scale : float32, positive and finite; as many along a dimension as the tensor has blocks there, ``()`` for one in
        all.
    blocks : how the scales lie over the tensor.
    """

    scale: Array
    blocks: Blocks

    def __post_init__(self) -> None:
        plain = isinstance(self.blocks, tuple) and len(self.blocks) <= _DIMENSIONS
        if not plain or not all(b is None or (type(b) is int and b > 0) for b in self.blocks):
            raise SlimlineError("The blocks of a format are no lengths: give None or a positive number per dimension.")
        self._check_array("scale", np.float32)
        if self.scale.ndim != len(self.blocks):
            raise SlimlineError(
                f"A scale of {self.scale.ndim} dimensions does not lie in blocks of {len(self.blocks)}: "
                "give it as many dimensions as the blocks have."
            )
        if self.scale.size == 0 or not (np.isfinite(self.scale) & (self.scale > 0)).all():
            raise SlimlineError("A scale is not positive and finite: measure the ranges of the tensor again.")
        if any(n != 1 for n, block in zip(self.scale.shape, self.blocks, strict=True) if block is None):
            raise SlimlineError("A dimension that is not divided has several scales: give one, or blocks along it.")

    @property
    def axis(self) -> int | None:
        """The dimension that has one scale per position; None for one in all, and for other blocks."""
        divided = [d for d, block in enumerate(self.blocks) if block is not None]
        return divided[0] if len(divided) == 1 and self.blocks[divided[0]] == 1 else None

    @property
    def per_tensor(self) -> bool:
        """Whether there is one scale in all."""
        return all(block is None for block in self.blocks)

    def rescaled(self, scale: Array) -> Self:
        """With other scales, float32; where not every number can be one, with the nearest that can."""
        return replace(self, scale=scale)

    @property
    def unscaled(self) -> Scaled:
        """The format of its numbers in units of their scales."""
        return replace(self, scale=_ONE, blocks=())

    def fits(self, shape: Sequence[int]) -> bool:
        if not self.blocks:
            return True
        counts = tuple(1 if b is None else -(-n // b) for n, b in zip(shape, self.blocks, strict=False))
        return len(shape) == len(self.blocks) and self.scale.shape == counts

    def _scaled(self, x: Array) -> Array:
        """`x` in units of its scales."""
        self._check_shape(x.shape)
        wide = _wide(x.dtype)
        with np.errstate(over="ignore"):
            scaled: Array = x.astype(wide, copy=False) / spread(self.scale, self.blocks, x.shape).astype(
                wide, copy=False
            )
        return scaled

    def _unscaled(self, units: Array, dtype: Any) -> Array:
        self._check_shape(units.shape)
        wide = _wide(dtype)
        scale = spread(self.scale, self.blocks, units.shape).astype(wide, copy=False)
        real: Array = np.asarray(units.astype(wide, copy=False) * scale).astype(dtype, copy=False)
        return real

    def _where(self) -> str:
        if self.per_tensor:
            return "per tensor"
        if self.axis is not None:
            return f"per position of axis {self.axis}"
        return f"in blocks of {'×'.join('all' if block is None else str(block) for block in self.blocks)}"


@dataclass(frozen=True, eq=False)
class IntegerGrid(Scaled):
    """Evenly spaced levels: ``real = scale * (code - zero_point)`` with ``low <= code <= high``.

    Ties go to the even code, as in QuantizeLinear of ONNX.

    Attributes
    ----------
    bits : 2 to 16.
    signed : codes from ``-2**(bits - 1)``; else from 0.
    narrow : without the lowest code of a signed grid, so that both sides have as many levels.
    zero_point : int32, shape of `scale`, within the codes (an affine grid); None for 0 (a symmetric one).
    """

    kind: ClassVar[str] = "integer"
    bits: int
    signed: bool
    narrow: bool = False
    zero_point: Array | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.bits) is not int or not 2 <= self.bits <= 16:
            raise SlimlineError(f"An integer grid of {shown(self.bits)} bits is none: choose 2 to 16.")
        if type(self.signed) is not bool or type(self.narrow) is not bool or (self.narrow and not self.signed):
            raise SlimlineError("Only a signed integer grid can be narrow: say True or False of both.")
        if self.zero_point is None:
            return
        self._check_array("zero_point", np.int32)
        if self.zero_point.shape != self.scale.shape:
            raise SlimlineError("Zero points are as many as scales: give them the scale's shape.")
        if not ((self.zero_point >= self.low) & (self.zero_point <= self.high)).all():
            raise SlimlineError(f"A zero point lies outside {self.low} … {self.high}: measure the ranges again.")

    @classmethod
    def between(
        cls, low: int, high: int, scale: Array, blocks: Blocks = (), zero_point: Array | None = None
    ) -> IntegerGrid:
        """The grid with the codes from `low` to `high`."""
        grid = cls(scale, blocks, (high - low).bit_length(), low < 0, low == -high, zero_point)
        if (grid.low, grid.high) != (low, high):
            raise SlimlineError(f"No integer grid has the codes {low} … {high}: take all of a width, such as -8 … 7.")
        return grid

    @property
    def low(self) -> int:
        """The lowest code."""
        return -(2 ** (self.bits - 1)) + self.narrow if self.signed else 0

    @property
    def high(self) -> int:
        """The highest code."""
        return int(2 ** (self.bits - self.signed) - 1)

    @property
    def zero(self) -> Array:
        """The code of zero, of the scale's shape."""
        return np.zeros(self.scale.shape, np.int32) if self.zero_point is None else self.zero_point

    @property
    def ends(self) -> tuple[Array, Array]:
        """The lowest and the highest number that it holds, float32 of the scale's shape."""
        zero = self.zero.astype(np.float32)
        return (self.low - zero) * self.scale, (self.high - zero) * self.scale

    @property
    def code_bits(self) -> int:
        return self.bits

    def _array_bits(self) -> int:
        zeros = 0 if self.zero_point is None else self.zero_point.size * self.stored_bits  # stored as a code is
        return 8 * self.scale.nbytes + zeros

    def _encode(self, x: Array) -> Array:
        width = 8 if self.bits <= 8 else 16
        codes: Array = self._codes(x).astype(f"{'' if self.signed else 'u'}int{width}")
        return codes

    def decode(self, codes: Array, dtype: Any = np.float32) -> Array:
        wide = _wide(dtype)
        self._check_shape(codes.shape)
        return self._unscaled(codes.astype(wide, copy=False) - self._zero(codes.shape, wide), dtype)

    def round(self, x: Array) -> Array:
        # Without integers on the way, since observers try hundreds of grids; NaN stays NaN.
        return self.decode(self._codes(x), x.dtype)

    def _codes(self, x: Array) -> Array:
        """Whole numbers, still of a float dtype."""
        scaled = self._scaled(x)
        codes: Array = np.clip(np.rint(scaled) + self._zero(x.shape, scaled.dtype), self.low, self.high)
        return codes

    def _zero(self, shape: Sequence[int], dtype: Any) -> Array:
        return spread(self.zero, self.blocks, shape).astype(dtype)

    def describe(self) -> str:
        name = f"{'' if self.signed else 'u'}int{self.bits}"
        return f"{name}, {'symmetric' if self.zero_point is None else 'affine'}, {self._where()}"


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
_ONE = np.ones((), np.float32)


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
        return cls(_ONE, (), dtype)

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


@dataclass(frozen=True, eq=False)
class Levels(Scaled):
    """A codebook: ``real = scale * codebook[code]``. Ties go to the lower level.

    Attributes
    ----------
    codebook : float32, ``(n,)`` with 2 <= n <= 65536, finite and ascending.
    """

    kind: ClassVar[str] = "levels"
    codebook: Array

    @classmethod
    def binary(cls, scale: Array, blocks: Blocks = ()) -> Levels:
        """Minus and plus the scale."""
        return cls(scale, blocks, np.array([-1, 1], np.float32))

    @classmethod
    def ternary(cls, scale: Array, blocks: Blocks = ()) -> Levels:
        """Minus the scale, zero and plus the scale."""
        return cls(scale, blocks, np.array([-1, 0, 1], np.float32))

    @classmethod
    def powers_of_two(cls, bits: int, scale: Array, blocks: Blocks = ()) -> Levels:
        """Zero and plus and minus ``scale * 2**-k`` for ``k`` from 0, ``2**bits - 1`` levels (2 <= `bits` <= 8)."""
        if not 2 <= bits <= 8:
            raise SlimlineError(f"Powers of two take 2 to 8 bits, not {bits}: smaller powers leave float32.")
        powers = 2.0 ** -np.arange(2 ** (bits - 1) - 1)
        return cls(scale, blocks, np.concatenate([-powers, [0], powers[::-1]]).astype(np.float32))

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_array("codebook", np.float32)
        plain = self.codebook.ndim == 1 and 2 <= self.codebook.size <= 1 << 16
        if not plain or not np.isfinite(self.codebook).all() or not (np.diff(self.codebook) > 0).all():
            raise SlimlineError("A codebook holds 2 to 65536 finite levels, each above the last: sort them.")

    @property
    def code_bits(self) -> int:
        return int(self.codebook.size - 1).bit_length()

    @property
    def grid(self) -> IntegerGrid | None:
        """The narrowest signed integer grid of at most 8 bits that holds exactly these numbers, of more perhaps; None
        where there is none."""
        exponent = np.floor(np.log2(np.abs(self.codebook[self.codebook != 0]).min()))
        for unit in np.float32(2.0) ** (exponent - np.arange(8)).astype(np.float32):  # by which numbers stay exact
            codes = self.codebook / unit
            if np.array_equal(codes, np.rint(codes)):
                lowest, highest = codes[0], codes[-1]
                fitting = (b for b in range(2, 9) if lowest >= -(2 ** (b - 1)) and highest < 2 ** (b - 1))
                if (bits := next(fitting, None)) is None:
                    return None
                narrow = bool(lowest > -(2 ** (bits - 1)))
                return IntegerGrid(self.scale * unit, self.blocks, bits, True, narrow)
        return None

    @property
    def bounds(self) -> Array:
        """The middles between neighbouring levels, float32 ``(n - 1,)``."""
        low, high = self.codebook[:-1], self.codebook[1:]
        middle = ((low.astype(np.float64) + high) / 2).astype(np.float32)
        return np.where(middle < high, middle, low)  # where no float32 lies between

    def _encode(self, x: Array) -> Array:
        codes: Array = np.searchsorted(self.bounds, self._scaled(x), side="left")
        return codes.astype(np.uint8 if self.codebook.size <= 256 else np.uint16)

    def decode(self, codes: Array, dtype: Any = np.float32) -> Array:
        return self._unscaled(self.codebook[codes], dtype)

    def describe(self) -> str:
        return f"{self.codebook.size} levels, {self._where()}"


@dataclass(frozen=True, eq=False)
class Masked(Format):
    """Another format, with zeros where a mask says so; their codes are those that `inner` gives to zero.

    Attributes
    ----------
    keep : bool, of the tensor's shape; what is False is zero.
    inner : the format of the rest.
    """

    kind: ClassVar[str] = "masked"
    keep: Array
    inner: Format

    def __post_init__(self) -> None:
        self._check_array("keep", np.bool_)
        if not isinstance(self.inner, Scaled):
            raise SlimlineError("A mask lies over another format: give an integer grid, a float format or levels.")
        if not self.inner.fits(self.keep.shape):
            raise SlimlineError(f"A mask of shape {self.keep.shape} lies over a format of another: give one that fits.")

    @property
    def code_bits(self) -> int:
        return self.inner.code_bits

    @property
    def density(self) -> float:
        """The part of the positions that is kept."""
        return float(self.keep.mean()) if self.keep.size else 1.0

    def bits_per_value(self, shape: Sequence[int]) -> float:
        """A bit of the mask, the codes of what is kept, and the share of the arrays."""
        rest = self.inner.bits_per_value(shape) - self.inner.stored_bits
        return 1 + self.density * self.inner.stored_bits + rest

    def fits(self, shape: Sequence[int]) -> bool:
        return bool(tuple(shape) == self.keep.shape)

    def _encode(self, x: Array) -> Array:
        self._check_shape(x.shape)
        return self.inner.encode(np.where(self.keep, x, np.zeros((), x.dtype)))

    def decode(self, codes: Array, dtype: Any = np.float32) -> Array:
        return np.where(self.keep, self.inner.decode(codes, dtype), np.zeros((), dtype))

    def describe(self) -> str:
        return f"{self.inner.describe()}, {self.density:.1%} of the positions kept"


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


def _wide(dtype: Any) -> Any:
    """The dtype that is computed in."""
    return np.float64 if np.dtype(dtype) == np.float64 else np.float32


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    return bool(a == b)
