"""Codebooks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.methods.formats.base import Array, Blocks, Scaled
from slimline.methods.formats.integers import IntegerGrid


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
    def is_sign(self) -> bool:
        """Whether a tensor holds minus and plus one number and no other."""
        return self.per_tensor and np.array_equal(self.codebook, [-1, 1])

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
