"""What all formats share, and those whose numbers are multiples of scales."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import numpy as np

from slimline.basics.errors import SlimlineError

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
            array = np.repeat(array, min(block, shape[axis]), axis)[(slice(None),) * axis + (slice(shape[axis]),)]
    return array


ONE = np.ones((), np.float32)


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
        return replace(self, scale=ONE, blocks=())

    def fits(self, shape: Sequence[int]) -> bool:
        if not self.blocks:
            return True
        counts = tuple(1 if b is None else -(-n // b) for n, b in zip(shape, self.blocks, strict=False))
        return len(shape) == len(self.blocks) and self.scale.shape == counts

    def _scaled(self, x: Array) -> Array:
        """`x` in units of its scales."""
        self._check_shape(x.shape)
        wide = wide_of(x.dtype)
        with np.errstate(over="ignore"):
            scaled: Array = x.astype(wide, copy=False) / spread(self.scale, self.blocks, x.shape).astype(
                wide, copy=False
            )
        return scaled

    def _unscaled(self, units: Array, dtype: Any) -> Array:
        self._check_shape(units.shape)
        wide = wide_of(dtype)
        scale = spread(self.scale, self.blocks, units.shape).astype(wide, copy=False)
        real: Array = np.asarray(units.astype(wide, copy=False) * scale).astype(dtype, copy=False)
        return real

    def _where(self) -> str:
        if self.per_tensor:
            return "per tensor"
        if self.axis is not None:
            return f"per position of axis {self.axis}"
        return f"in blocks of {'×'.join('all' if block is None else str(block) for block in self.blocks)}"


def wide_of(dtype: Any) -> Any:
    """The dtype that is computed in."""
    return np.float64 if np.dtype(dtype) == np.float64 else np.float32


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    return bool(a == b)
