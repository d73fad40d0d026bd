"""Entropy coding of integers by range asymmetric numeral systems (rANS), vectorised.

Symbols come in *streams*, each with its own table of frequencies. They are dealt out to *lanes*, each a coder of its
own for a run of one stream, which all read the same words by turns, so that numpy codes as many symbols at once as
there are lanes, of however many streams. Of integers that are drawn independently the code is as long as their entropy
but for the tables and two bytes or so a lane.

Duda 2013, arXiv:1311.2540; Giesen 2014, arXiv:1402.3392 (interleaved coders).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

PRECISION = 14
"""The most bits of a frequency: those of a table add up to two to the power of these, or of fewer for few symbols."""
ALPHABET = 1 << 12
"""The most symbols that there may be."""
LANES = 4096
"""Beside one of each stream, the most lanes that an encoder takes."""
_LEAST_PRECISION = 8
_LOW, _WORD = 1 << 16, 16  # a lane's state lies in [_LOW, _LOW << _WORD); words are shifted in and out of it
_BITS_PER_LANE = 16 * 150  # so that what a lane costs, some 16 bits, is two thirds of a percent
_STEPS = 1 << 14  # that a lane does at most where there are lanes left: each costs what numpy takes for a call
_HEAD = struct.Struct("<I")  # steps


class Corrupt(Exception):
    """A code that no encoder wrote."""


@dataclass(frozen=True)
class Stream:
    """Symbols to be coded.

    Attributes
    ----------
    symbols : ``(n,)`` of uint16, below `alphabet`.
    alphabet : 1 to `ALPHABET`.
    """

    symbols: Array
    alphabet: int

    @property
    def bytes(self) -> int:
        """What it takes, nearly."""
        if not len(self.symbols) or self.alphabet == 1:
            return 0
        counts = np.bincount(self.symbols, minlength=self.alphabet)
        bits = entropy(counts) * len(self.symbols)
        table = _varints(frequencies(counts, _precision(len(self.symbols), self.alphabet)))
        return 5 + len(table) + math.ceil(bits / 8 * (1 + 16 / _BITS_PER_LANE))


def entropy(counts: Array) -> float:
    """Of symbols with these counts, in bits a symbol (zero-order)."""
    seen = np.asarray(counts, np.float64)
    seen = seen[seen > 0]
    total = seen.sum()
    return float(-(seen * np.log2(seen / total)).sum() / total) if total else 0.0


def frequencies(counts: Array, precision: int = PRECISION) -> Array:
    """Whole numbers that add up to ``2**precision``, as nearly as can be in proportion to `counts`; none of those above
    zero becomes zero.

    Parameters
    ----------
    counts : of each symbol, ``(alphabet,)``, integers with at least one and at most ``2**precision`` above zero.
    """
    counts = np.asarray(counts, np.float64)
    present = counts > 0
    total = 1 << precision
    shares = counts / counts.sum() * total
    table = np.where(present, np.maximum(np.floor(shares), 1), 0).astype(np.int64)
    lacking = total - int(table.sum())
    if lacking > 0:
        nearest = np.argsort(table - shares, kind="stable")[:lacking]  # fewer are lacking than symbols are present
        table[nearest] += 1
    for _ in range(-lacking):  # rare symbols took more than their share: where one less costs the fewest bits
        cost = np.where(table > 1, counts * -np.log1p(-1 / np.maximum(table, 2)), np.inf)
        table[np.argmin(cost)] -= 1
    return table


def _precision(count: int, alphabet: int) -> int:
    return min(PRECISION, max(_LEAST_PRECISION, count.bit_length(), (alphabet - 1).bit_length() + 1))


@dataclass(frozen=True)
class _Lanes:
    """Which symbols of which stream each lane codes: all lanes of `steps` symbols first, stream by stream, then the
    shorter ones, of each stream at most one, the longest first.

    Attributes
    ----------
    owner, length : of each lane, its stream and its number of symbols.
    full : of each stream, its lanes of `steps` symbols: the first, and the one behind the last.
    short : of each stream, its shorter lane, or -1.
    active : at each step, how many lanes have not ended.
    """

    owner: Array
    length: Array
    full: Array
    short: Array
    active: Array

    @classmethod
    def of(cls, counts: Sequence[int], steps: int) -> _Lanes:
        """For streams of so many symbols."""
        sizes = np.asarray(counts, np.int64)
        whole, rest = np.divmod(sizes, steps)
        ends = np.cumsum(whole)
        streams = np.flatnonzero(rest)
        ordered = streams[np.argsort(-rest[streams], kind="stable")]
        short = np.full(len(sizes), -1)
        short[ordered] = ends[-1] + np.arange(len(ordered))
        owner = np.concatenate([np.repeat(np.arange(len(sizes)), whole), ordered])
        length = np.concatenate([np.full(ends[-1], steps), rest[ordered]])
        active = np.searchsorted(-length, -np.arange(steps), side="left")
        return cls(owner, length, np.stack([ends - whole, ends], axis=1), short, active)

    def deal(self, number: int, symbols: Array, dealt: Array) -> None:
        """Put the symbols of a stream into the columns of its lanes in `dealt`, ``(steps, lanes)``."""
        first, last = self.full[number]
        steps = len(dealt)
        head = (last - first) * steps
        dealt[:, first:last] = symbols[:head].reshape(-1, steps).T
        if (lane := self.short[number]) >= 0:
            dealt[: len(symbols) - head, lane] = symbols[head:]

    def collect(self, number: int, dealt: Array) -> Array:
        """The symbols that `deal` was given."""
        first, last = self.full[number]
        head = np.ascontiguousarray(dealt[:, first:last].T).ravel()
        lane = self.short[number]
        return head if lane < 0 else np.concatenate([head, dealt[: self.length[lane], lane]])


def encode(streams: Sequence[Stream]) -> bytes:
    """The code of all symbols of all streams; `decode` is told their numbers and alphabets again."""
    coded = [stream for stream in streams if len(stream.symbols) and stream.alphabet > 1]
    if not coded:
        return b""
    counts = [len(stream.symbols) for stream in coded]
    seen = [np.bincount(stream.symbols, minlength=stream.alphabet) for stream in coded]
    bits = sum(entropy(each) * count for each, count in zip(seen, counts, strict=True))
    steps = _steps(sum(counts), bits)
    precisions = [_precision(count, stream.alphabet) for count, stream in zip(counts, coded, strict=True)]
    tables = [frequencies(each, precision) for each, precision in zip(seen, precisions, strict=True)]
    lanes = _Lanes.of(counts, steps)
    dealt = np.zeros((steps, len(lanes.owner)), np.uint16)
    for number, stream in enumerate(coded):
        lanes.deal(number, stream.symbols, dealt)
    words, states = _push(dealt, lanes, tables, precisions)
    described = [bytes([precision]) + _varints(table) for precision, table in zip(precisions, tables, strict=True)]
    return b"".join((_HEAD.pack(steps), *described, states.tobytes(), words.tobytes()))


def _steps(symbols: int, bits: float) -> int:
    lanes = min(LANES, max(1, math.ceil(bits / _BITS_PER_LANE), -(-symbols // _STEPS)))
    return -(-symbols // lanes)


def _push(dealt: Array, lanes: _Lanes, tables: Sequence[Array], precisions: Sequence[int]) -> tuple[Array, Array]:
    """The words and the final states, both little-endian."""
    frequency_of = np.concatenate(tables).astype(np.uint64)
    start_of = np.concatenate([np.cumsum(table) - table for table in tables]).astype(np.uint64)
    sizes = np.array([len(table) for table in tables])
    base = (np.cumsum(sizes) - sizes)[lanes.owner]
    shift = np.array(precisions, np.uint64)[lanes.owner]
    room = np.uint64(32) - shift
    state = np.full(len(lanes.owner), _LOW, np.uint64)
    mask, word = np.uint64(_LOW - 1), np.uint64(_WORD)
    blocks = []
    for step in range(len(dealt) - 1, -1, -1):
        here = lanes.active[step]
        place = dealt[step, :here] + base[:here]
        x, f = state[:here], frequency_of[place]
        full = np.flatnonzero(x >= f << room[:here])
        if full.size:
            blocks.append((x[full] & mask).astype("<u2"))
            x[full] >>= word
        quotient = x // f
        x[:] = (quotient << shift[:here]) + (x - quotient * f) + start_of[place]
    blocks.reverse()
    return np.concatenate(blocks) if blocks else np.empty(0, "<u2"), state.astype("<u4")


def decode(content: bytes | memoryview, sizes: Sequence[tuple[int, int]]) -> list[Array]:
    """The symbols of every stream, uint16.

    Parameters
    ----------
    sizes : of every stream, the number of its symbols and its alphabet.

    Raises
    ------
    Corrupt : `content` is no code of so many symbols of these alphabets.
    """
    coded = [(count, alphabet) for count, alphabet in sizes if count and alphabet > 1]
    symbols = iter(_decoded(content, coded) if coded else [])
    if not coded and len(content):
        raise Corrupt("a code of nothing that is not empty")
    return [next(symbols) if n and alphabet > 1 else np.zeros(n, np.uint16) for n, alphabet in sizes]


def _decoded(content: bytes | memoryview, sizes: Sequence[tuple[int, int]]) -> list[Array]:
    if len(content) < _HEAD.size:
        raise Corrupt("a code without its head")
    (steps,) = _HEAD.unpack_from(content)
    total = sum(count for count, _ in sizes)
    if not 1 <= steps <= max(min(total, _STEPS), -(-total // LANES)):
        raise Corrupt("a code of as many steps as no encoder takes")
    tables, precisions, at = [], [], _HEAD.size
    for count, alphabet in sizes:
        if at >= len(content) or content[at] != _precision(count, alphabet):
            raise Corrupt("a code of another precision than any encoder takes")
        precisions.append(content[at])
        table, at = _from_varints(content, at + 1, alphabet)
        if table.sum() != 1 << precisions[-1]:
            raise Corrupt("a table of frequencies that add up to something else")
        tables.append(table)
    number = sum(-(-count // steps) for count, _ in sizes)
    if at + 4 * number > len(content) or (len(content) - at) % 2:
        raise Corrupt("a code that ends too early")
    states = np.frombuffer(content, "<u4", number, at)
    words = np.frombuffer(content, "<u2", offset=at + 4 * number)
    lanes = _Lanes.of([count for count, _ in sizes], steps)
    dealt = _pop(words, states, lanes, tables, precisions)
    return [lanes.collect(stream, dealt) for stream in range(len(sizes))]


def _pop(words: Array, states: Array, lanes: _Lanes, tables: Sequence[Array], precisions: Sequence[int]) -> Array:
    """The symbols as they were dealt, ``(steps, lanes)``."""
    state = states.astype(np.int64)  # as wide as an index, so that nothing is converted on the way
    if (state < _LOW).any():
        raise Corrupt("a state that no encoder leaves")
    # By slot the symbol alone: a code of many short streams has far more slots than symbols.
    symbol_at = np.concatenate([np.repeat(np.arange(len(table), dtype=np.uint16), table) for table in tables])
    frequency_of = np.concatenate(tables)
    start_of = np.concatenate([np.cumsum(table) - table for table in tables])
    ranges, sizes = np.array([1 << precision for precision in precisions]), np.array([len(table) for table in tables])
    base, last = (np.cumsum(ranges) - ranges)[lanes.owner], ranges[lanes.owner] - 1
    first, shift = (np.cumsum(sizes) - sizes)[lanes.owner], np.array(precisions)[lanes.owner]
    dealt = np.empty((len(lanes.active), len(state)), np.uint16)
    slots, places, factors = np.empty_like(state), np.empty_like(state), np.empty_like(state)
    at, total = 0, len(words)
    for step, here in enumerate(lanes.active):
        x, slot, place, factor = state[:here], slots[:here], places[:here], factors[:here]
        np.bitwise_and(x, last[:here], out=slot)
        np.add(slot, base[:here], out=place)  # within the lane's table: mode="clip" only spares a check
        symbol_at.take(place, out=dealt[step, :here], mode="clip")
        np.add(dealt[step, :here], first[:here], out=place)
        x >>= shift[:here]
        x *= frequency_of.take(place, out=factor, mode="clip")
        x += slot
        x -= start_of.take(place, out=factor, mode="clip")
        empty = np.flatnonzero(x < _LOW)
        if empty.size:
            following = at + empty.size
            if following > total:
                raise Corrupt("a code that ends too early")
            x[empty] = (x[empty] << _WORD) | words[at:following]
            at = following
    if at != total or (state != _LOW).any():
        raise Corrupt("a code that goes on behind its last symbol")
    return dealt


def _varints(table: Array) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that another follows."""
    parts = bytearray()
    for number in table.tolist():
        while number > 127:
            parts.append(number & 127 | 128)
            number >>= 7
        parts.append(number)
    return bytes(parts)


def _from_varints(content: bytes | memoryview, at: int, alphabet: int) -> tuple[Array, int]:
    """The table that begins at `at`, and where it ends."""
    table = np.zeros(alphabet, np.int64)
    for symbol in range(alphabet):
        number, shift = 0, 0
        while True:
            if at >= len(content) or shift > PRECISION:
                raise Corrupt("a table of frequencies that ends too early")
            byte = content[at]
            at, number, shift = at + 1, number | (byte & 127) << shift, shift + 7
            if byte < 128:
                break
        table[symbol] = number
    return table, at
