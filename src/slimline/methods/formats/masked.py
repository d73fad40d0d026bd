"""Zeros at fixed positions of another format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.methods.formats.base import Array, Format, Scaled


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
