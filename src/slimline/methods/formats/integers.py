"""Evenly spaced numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from slimline.basics.errors import SlimlineError, shown
from slimline.methods.formats.base import Array, Blocks, Scaled, spread, wide_of


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
        wide = wide_of(dtype)
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
