"""Arrays as few bytes: how the numbers of one array are told to the entropy coder.

An array is taken as words of 1, 2, 4 or 8 bytes, whatever they stand for, so that nothing is lost of any type. Of the
ways to write it that fit, the shortest is taken:

=========== ===========================================================================================
`PALETTE`    the distinct words, and a code for each place (clusters, ternary weights, integers)
`PALETTES`   the same with distinct words of its own for every position of the first or last axis
`GRID`       floats that are multiples of scales: the multiples, and the scales (quantized weights)
`BLOCKS`     the same with a scale for every run of so many neighbours in a row or column
`PLANES`     the first bytes of all words, then the second, …: signs and exponents repeat themselves
`SPARSE`     where the words are that are not zero, and these in one of the other ways
`VECTORS`    the distinct vectors of words that are neighbours, and a code for each (vector quantization)
=========== ===========================================================================================

Each way is a head, bytes as they are, and streams of symbols; those of all arrays share one code (`methods.entropy`),
which comes behind all heads. What is read is held against the size of its array before memory is taken for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slimline.files.strictjson import Malformed
from slimline.methods import entropy
from slimline.methods.entropy import Stream

Array = np.ndarray[Any, np.dtype[Any]]

PALETTE, PALETTES, GRID, PLANES, SPARSE, VECTORS, BLOCKS = range(1, 8)
LENGTHS = (2, 4)
WIDTHS = (1, 2, 4, 8)
_RAW, _CODED = range(2)
_FIRST, _LAST, _WHOLE = range(3)
_DENSEST = 0.9  # part of words that are not zero, up to which it may pay to say where they are
_FEW = 256  # distinct words, up to which one palette is shorter than many
_LEAST_BYTES = 64  # of an array that is worth it


@dataclass(frozen=True)
class Grid:
    """The scales of a symmetric integer grid that an array may lie on.

    Attributes
    ----------
    axis : that has one scale per position, 0 or the last (-1); None for one in all.
    scale : float32, ``(n,)``; with a `block` ``(n · blocks,)``, those of a position one behind the other.
    block : how many neighbours of a position share a scale; None for all.
    """

    axis: int | None
    scale: Array
    block: int | None = None


@dataclass(frozen=True)
class Code:
    """A way to write an array.

    Attributes
    ----------
    head : its bytes.
    streams : of symbols, that the head says how to read.
    """

    head: bytes
    streams: tuple[Stream, ...] = ()

    @property
    def bytes(self) -> int:
        """What it takes, nearly."""
        return len(self.head) + sum(stream.bytes for stream in self.streams)

    def __add__(self, other: Code) -> Code:
        return Code(self.head + other.head, self.streams + other.streams)


def encode(content: bytes, shape: Sequence[int], width: int, grids: Sequence[Grid] = ()) -> Code | None:
    """The shortest code of an array; None where none is shorter than the array itself.

    Parameters
    ----------
    content : its little-endian bytes, in C order.
    width : of its numbers, in bytes.
    grids : that float32 numbers may lie on.
    """
    if width not in WIDTHS or len(content) < _LEAST_BYTES or math.prod(shape) * width != len(content):
        return None
    words = np.frombuffer(content, f"<u{width}")
    nonzero = words != 0
    count = int(np.count_nonzero(nonzero))
    ways = _dense(words, shape, grids)
    if 0 < count <= _DENSEST * len(words):
        positions = _bytes(np.packbits(nonzero, bitorder="little"))
        ways += [Code(bytes([SPARSE]) + _number(count)) + positions + way for way in _dense(words[nonzero], (count,))]
    sizes = [way.bytes for way in ways]
    shortest = int(np.argmin(sizes))
    return ways[shortest] if sizes[shortest] < len(content) else None


def written(codes: Sequence[Code]) -> bytes:
    """Arrays that are written one behind the other; `read` gives them back."""
    return b"".join(code.head for code in codes) + entropy.encode([s for code in codes for s in code.streams])


def _dense(words: Array, shape: Sequence[int], grids: Sequence[Grid] = ()) -> list[Code]:
    """Every way to write words that are not sparse, at least one."""
    ways = []
    distinct, codes = np.unique(words, return_inverse=True)
    if len(distinct) <= entropy.ALPHABET and len(distinct) <= max(2, len(words) // 2):
        head = bytes([PALETTE]) + _number(len(distinct)) + distinct.tobytes()
        ways.append(Code(head, (_stream(codes, len(distinct)),)))
    if words.itemsize == 1 or len(distinct) > _FEW or not ways:
        ways.append(_planes(words))
    ways += [way for grid in grids if (way := _on_grid(words, shape, grid)) is not None]
    if len(shape) > 1 and 2 < len(distinct) <= len(words) // 2:
        turns = [(1, 1), (shape[-2], shape[-1])]
        ways += [way for turn in turns for length in LENGTHS if (way := _vectors(words, turn, length)) is not None]
    if len(distinct) > _FEW:
        ways += [way for layout in (_FIRST, _LAST) if (way := _palettes(words, shape, layout)) is not None]
    return ways


def _planes(words: Array) -> Code:
    code = Code(bytes([PLANES]))
    for plane in words.view(np.uint8).reshape(len(words), -1).T:
        code += _bytes(np.ascontiguousarray(plane))
    return code


def _palettes(words: Array, shape: Sequence[int], layout: int) -> Code | None:
    """With a palette for each position of an axis; None where that has too many distinct words to pay."""
    if len(shape) < 2:
        return None
    rows = _rows(words, shape[0 if layout == _FIRST else -1], layout)
    ordered = np.sort(rows, axis=1)
    new = np.ones(rows.shape, bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    counts = new.sum(axis=1)
    if counts.max() > entropy.ALPHABET or counts.sum() > rows.size // 2:
        return None
    codes = np.stack([np.unique(row, return_inverse=True)[1].ravel() for row in rows])
    head = bytes([PALETTES, layout]) + _number(len(rows)) + b"".join(_number(int(n)) for n in counts)
    return Code(head + ordered[new].tobytes(), (_stream(codes, int(counts.max())),))


def _vectors(words: Array, turn: tuple[int, int], length: int) -> Code | None:
    """As codes of vectors of so many words, in the order of `_turned`; None where there are too many of them to pay."""
    if len(words) % length:
        return None
    rows = _turned(words, *turn).reshape(-1, length)
    if len(np.unique(rows[: 4 * entropy.ALPHABET], axis=0)) > entropy.ALPHABET:  # of most arrays a part tells
        return None
    distinct, codes = np.unique(rows, axis=0, return_inverse=True)
    if len(distinct) > min(entropy.ALPHABET, len(rows) // 2):
        return None
    numbers = (length, *turn, len(distinct))
    head = bytes([VECTORS]) + b"".join(_number(n) for n in numbers) + np.ascontiguousarray(distinct).tobytes()
    return Code(head, (_stream(codes, len(distinct)),))


def _turned(words: Array, inputs: int, outputs: int) -> Array:
    """Words of the shape ``(…, inputs, outputs)`` as ``(outputs, inputs, …)``, flat."""
    return np.ascontiguousarray(words.reshape(-1, inputs, outputs).T).ravel()


def _on_grid(words: Array, shape: Sequence[int], grid: Grid) -> Code | None:
    """As multiples of scales; None where they are none, or need more symbols than there are."""
    if words.itemsize != 4:
        return None
    layout = _WHOLE if grid.axis is None else _FIRST if grid.axis == 0 else _LAST
    count = 1 if layout == _WHOLE else shape[0 if layout == _FIRST else -1] if shape else 0
    rows = _rows(words, count, layout) if count else words.reshape(1, -1)
    block = grid.block or rows.shape[1]
    if not block or len(grid.scale) != count * -(-rows.shape[1] // block):
        return None
    scale = _spread(grid.scale, rows.shape, block)
    with np.errstate(all="ignore"):
        multiples = np.rint(rows.view("<f4") / scale)
    if not (np.abs(multiples) < entropy.ALPHABET // 2).all():
        return None
    low = int(multiples.min())
    codes = (multiples - low).astype(np.uint16)
    if not np.array_equal(_multiplied(codes, low, scale).view("<u4"), rows):
        return None
    alphabet = int(codes.max()) + 1
    multiples_of = Code(_number(entropy.ALPHABET - low) + _number(alphabet), (_stream(codes, alphabet),))
    if grid.block is None:
        return Code(bytes([GRID, layout]) + _number(count) + grid.scale.astype("<f4").tobytes()) + multiples_of
    scales = _dense(np.ascontiguousarray(grid.scale, "<f4").view("<u4"), (len(grid.scale),))
    shortest = min(scales, key=lambda way: way.bytes)
    return Code(bytes([BLOCKS, layout]) + _number(count) + _number(block)) + shortest + multiples_of


def _spread(scale: Array, shape: tuple[int, ...], block: int) -> Array:
    """For every number of rows of this `shape` its scale."""
    each = np.repeat(scale.reshape(shape[0], -1), block, axis=1)[:, : shape[1]]
    return np.asarray(each.astype("<f4"))


def _multiplied(codes: Array, low: int, scale: Array) -> Array:
    return np.asarray((codes.astype("<f4") + np.float32(low)) * scale)


def _rows(words: Array, count: int, layout: int) -> Array:
    """Words as a row for each of `count` positions of the first or last axis."""
    return words.reshape(-1, count).T if layout == _LAST else words.reshape(count, -1)


def _unrowed(rows: Array, layout: int) -> Array:
    return np.ascontiguousarray(rows.T if layout == _LAST else rows).ravel()


def _stream(symbols: Array, alphabet: int) -> Stream:
    return Stream(symbols.ravel().astype(np.uint16), alphabet)


def _bytes(content: Array) -> Code:
    """Bytes, coded if that is shorter."""
    coded = _stream(content, 256)
    return Code(bytes([_CODED]), (coded,)) if coded.bytes < len(content) else Code(bytes([_RAW]) + content.tobytes())


def _number(value: int) -> bytes:
    """A whole number from 0 on: seven bits a byte, the lowest first."""
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def read(content: bytes | memoryview, sizes: Sequence[tuple[int, int]]) -> list[bytes]:
    """The bytes of arrays that were `written`.

    Parameters
    ----------
    sizes : of every array, its bytes and those of one of its numbers.

    Raises
    ------
    Malformed : no such arrays.
    """
    reader = _Reader(memoryview(content))
    arrays = []
    for size, width in sizes:
        if width not in WIDTHS or size % width:
            raise Malformed("codes an array of another size than its numbers have")
        arrays.append(reader.array(size // width, np.dtype(f"<u{width}")))
    try:
        reader.decode()
    except entropy.Corrupt as reason:
        raise Malformed(f"holds {reason}") from reason
    return [array().tobytes() for array in arrays]


Later = Callable[[], Array]
"""An array that can be computed once the streams are decoded."""


class _Reader:
    """Reads heads, and notes which streams they have."""

    def __init__(self, content: memoryview) -> None:
        self._content, self._at = content, 0
        self._sizes: list[tuple[int, int]] = []
        self._symbols: list[Array] = []

    def decode(self) -> None:
        """Decode the streams, from what is left."""
        self._symbols = entropy.decode(self._content[self._at :], self._sizes)

    def take(self, size: int) -> memoryview:
        """The next bytes."""
        if size > len(self._content) - self._at:
            raise Malformed("codes an array in fewer bytes than it says")
        self._at += size
        return self._content[self._at - size : self._at]

    def number(self, least: int, most: int) -> int:
        """The next whole number, of a range."""
        value, shift = 0, 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
            if shift > 63:
                raise Malformed("codes an array by a number that is none")
        if not least <= value <= most:
            raise Malformed(f"codes an array by a number {value} that is none of {least} to {most}")
        return value

    def words(self, count: int, dtype: np.dtype[Any]) -> Array:
        """The next words, as they are."""
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def stream(self, count: int, alphabet: int) -> Later:
        """The next stream."""
        self._sizes.append((count, alphabet))
        number = len(self._sizes) - 1
        return lambda: self._symbols[number]

    def bytes(self, count: int) -> Later:
        """The next bytes that `_bytes` wrote."""
        if self.number(_RAW, _CODED) == _RAW:
            plain = np.frombuffer(self.take(count), np.uint8)
            return lambda: plain
        symbols = self.stream(count, 256)
        return lambda: symbols().astype(np.uint8)

    def array(self, count: int, dtype: np.dtype[Any], sparse: bool = True) -> Later:
        """The next `count` words."""
        kind = self.number(PALETTE, BLOCKS)
        if kind in (SPARSE, BLOCKS) and not sparse:
            raise Malformed("codes an array in parts that have parts themselves")
        ways = {
            PALETTE: self._palette,
            PALETTES: self._palettes,
            GRID: self._grid,
            PLANES: self._planes,
            SPARSE: self._sparse,
            VECTORS: self._vectors,
            BLOCKS: self._blocks,
        }
        return ways[kind](count, dtype)

    def _palette(self, count: int, dtype: np.dtype[Any]) -> Later:
        palette = self.words(self.number(1, entropy.ALPHABET), dtype)
        codes = self.stream(count, len(palette))
        return lambda: palette[codes()]

    def _palettes(self, count: int, dtype: np.dtype[Any]) -> Later:
        layout, rows = self.number(_FIRST, _LAST), self.number(1, max(count, 1))
        if count % rows:
            raise Malformed("codes an array by rows that it does not have")
        sizes = np.array([self.number(1, entropy.ALPHABET) for _ in range(rows)])
        palettes = self.words(int(sizes.sum()), dtype)
        stream = self.stream(count, int(sizes.max()))

        def words() -> Array:
            codes = stream().reshape(rows, -1)
            if (codes >= sizes[:, None]).any():
                raise Malformed("codes an array by words that it does not hold")
            return _unrowed(palettes[codes + (np.cumsum(sizes) - sizes)[:, None]], layout)

        return words

    def _grid(self, count: int, dtype: np.dtype[Any]) -> Later:
        layout, rows = self.number(_FIRST, _WHOLE), self.number(1, max(count, 1))
        if count % rows or dtype.itemsize != 4:
            raise Malformed("codes an array by scales that it does not have")
        scale = self.words(rows, np.dtype("<f4"))
        low = entropy.ALPHABET - self.number(0, 2 * entropy.ALPHABET)
        codes = self.stream(count, self.number(1, entropy.ALPHABET))

        def words() -> Array:
            with np.errstate(all="ignore"):
                return _unrowed(_multiplied(codes().reshape(rows, -1), low, scale[:, None]), layout).view(dtype)

        return words

    def _blocks(self, count: int, dtype: np.dtype[Any]) -> Later:
        layout, rows = self.number(_FIRST, _LAST), self.number(1, max(count, 1))
        block = self.number(1, max(count, 1))
        if count % rows or dtype.itemsize != 4:
            raise Malformed("codes an array by scales that it does not have")
        shape = rows, count // rows
        scale = self.array(rows * -(-shape[1] // block), dtype, sparse=False)
        low = entropy.ALPHABET - self.number(0, 2 * entropy.ALPHABET)
        codes = self.stream(count, self.number(1, entropy.ALPHABET))

        def words() -> Array:
            with np.errstate(all="ignore"):
                spread = _spread(scale().view("<f4"), shape, block)
                return _unrowed(_multiplied(codes().reshape(shape), low, spread), layout).view(dtype)

        return words

    def _planes(self, count: int, dtype: np.dtype[Any]) -> Later:
        planes = [self.bytes(count) for _ in range(dtype.itemsize)]

        def words() -> Array:
            joined = np.empty((count, dtype.itemsize), np.uint8)
            for number, plane in enumerate(planes):
                joined[:, number] = plane()
            return joined.reshape(-1).view(dtype)

        return words

    def _vectors(self, count: int, dtype: np.dtype[Any]) -> Later:
        length, inputs, outputs = (self.number(1, max(count, 1)) for _ in range(3))
        if count % length or count % (inputs * outputs):
            raise Malformed("codes an array by vectors that it does not have")
        number = self.number(1, entropy.ALPHABET)
        palette = self.words(number * length, dtype).reshape(number, length)
        codes = self.stream(count // length, number)
        return lambda: np.ascontiguousarray(palette[codes()].reshape(outputs, inputs, -1).T).ravel()

    def _sparse(self, count: int, dtype: np.dtype[Any]) -> Later:
        held = self.number(0, count)
        positions = self.bytes(-(-count // 8))
        inner = self.array(held, dtype, sparse=False)

        def words() -> Array:
            nonzero = np.unpackbits(positions(), count=count, bitorder="little").astype(bool)
            if np.count_nonzero(nonzero) != held:
                raise Malformed("codes a sparse array of another number of places than it says")
            array = np.zeros(count, dtype)
            array[nonzero] = inner()
            return array

        return words
