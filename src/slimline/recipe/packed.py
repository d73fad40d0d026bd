"""Boolean arrays as text."""

from __future__ import annotations

import base64
import math
import zlib

import numpy as np

from slimline.recipe.config import Config

_RATIO = 1200  # bytes that one of deflate can stand for, and base64


class PackedMask(Config):
    """A boolean array as text: its bits, compressed, in base64; True stays."""

    shape: tuple[int, ...]
    bits: str

    @classmethod
    def of(cls, mask: np.ndarray) -> PackedMask:
        """Packed, whatever numbers it holds: zero goes."""
        raw = np.packbits(np.asarray(mask) != 0).tobytes()
        return cls(shape=np.shape(mask), bits=base64.b64encode(zlib.compress(raw, 9)).decode())

    def array(self) -> np.ndarray:
        """The boolean array.

        Raises
        ------
        ValueError : other bits than the shape needs.
        """
        count = math.prod(self.shape)
        size = -(-count // 8)
        if any(n < 0 for n in self.shape) or size > _RATIO * len(self.bits):
            raise ValueError("a mask has fewer bits than its shape needs")
        unpacker = zlib.decompressobj()
        try:
            raw = unpacker.decompress(base64.b64decode(self.bits), size + 1)
        except zlib.error as reason:
            raise ValueError("the bits of a mask are damaged") from reason
        if len(raw) != size or not (unpacker.eof or not size):
            raise ValueError("a mask has other bits than its shape needs")
        return np.unpackbits(np.frombuffer(raw, np.uint8), count=count).astype(bool).reshape(self.shape)
