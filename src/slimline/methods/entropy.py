"""Entropy coding of integers by range asymmetric numeral systems (rANS), vectorised.

Symbols are dealt out to *lanes*, each a coder of its own, which all read the same words by turns, so that numpy codes
as many symbols at once as there are lanes. One table of frequencies serves all. Of integers that are drawn
independently the code is as long as their entropy but for the table and two bytes or so a lane.

Duda 2013, arXiv:1311.2540; Giesen 2014, arXiv:1402.3392 (interleaved coders).
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

PRECISION = 14
"""The most bits of a frequency: those of a table add up to two to the power of these, or of fewer for few symbols."""
ALPHABET = 1 << 12
"""The most symbols that there may be."""
LANES = 4096
_LOW, _WORD = 1 << 16, 16  # a lane's state lies in [_LOW, _LOW << _WORD); words are shifted in and out of it
_BITS_PER_LANE = 16 * 150  # so that what a lane costs, some 16 bits, is two thirds of a percent
_STEPS = 1 << 14  # that a lane does at most where there are lanes left: each costs what numpy takes for a call
_HEAD = struct.Struct("<BH")  # precision, lanes


class Corrupt(Exception):
    """A code that no encoder wrote."""


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


def encode(symbols: Array, alphabet: int) -> bytes:
    """The code of `symbols`, integers in ``[0, alphabet)``; `decode` is told their number and `alphabet` again.

    Parameters
    ----------
    symbols : ``(n,)``, of an unsigned type.
    alphabet : 1 to `ALPHABET`.
    """
    count = len(symbols)
    if not count or alphabet == 1:
        return b""
    counts = np.bincount(symbols, minlength=alphabet)
    precision = min(PRECISION, max(8, count.bit_length(), (alphabet - 1).bit_length() + 1))
    table = frequencies(counts, precision)
    lanes = _lanes(count, entropy(counts) * count)
    words, states = _push(symbols, table, precision, lanes)
    return b"".join((_HEAD.pack(precision, lanes), _varints(table), states.tobytes(), words.tobytes()))


def _lanes(count: int, bits: float) -> int:
    return int(min(LANES, count, max(1, bits // _BITS_PER_LANE, -(-count // _STEPS))))


def _push(symbols: Array, table: Array, precision: int, lanes: int) -> tuple[Array, Array]:
    """The words and the final states, both little-endian."""
    starts = np.cumsum(table) - table
    frequency, start = table.astype(np.uint64)[symbols], starts.astype(np.uint64)[symbols]
    limit = frequency << np.uint64(32 - precision)
    state = np.full(lanes, _LOW, np.uint64)
    mask, word, shift = np.uint64(_LOW - 1), np.uint64(_WORD), np.uint64(precision)
    blocks = []
    for first in range((len(symbols) - 1) // lanes * lanes, -1, -lanes):
        part = slice(first, first + lanes)
        x, f = state[: len(frequency[part])], frequency[part]
        full = np.flatnonzero(x >= limit[part])
        if full.size:
            blocks.append((x[full] & mask).astype("<u2"))
            x[full] >>= word
        quotient = x // f
        x[:] = (quotient << shift) + (x - quotient * f) + start[part]
    blocks.reverse()
    return np.concatenate(blocks) if blocks else np.empty(0, "<u2"), state.astype("<u4")


def decode(content: bytes | memoryview, count: int, alphabet: int) -> Array:
    """The symbols, ``(count,)`` of uint16.

    Raises
    ------
    Corrupt : `content` is no code of so many symbols of this alphabet.
    """
    if not count or alphabet == 1:
        if len(content):
            raise Corrupt("a code of nothing that is not empty")
        return np.zeros(count, np.uint16)
    if len(content) < _HEAD.size:
        raise Corrupt("a code without its head")
    precision, lanes = _HEAD.unpack_from(content)
    if not 8 <= precision <= PRECISION:
        raise Corrupt("a code of another precision than any encoder takes")
    if not 1 <= lanes <= min(LANES, count) or (-(-count // lanes) > _STEPS and lanes < LANES):
        raise Corrupt("a code of as many lanes as no encoder takes")
    table, at = _from_varints(content, _HEAD.size, alphabet)
    if table.sum() != 1 << precision:
        raise Corrupt("a table of frequencies that add up to something else")
    if at + 4 * lanes > len(content) or (len(content) - at) % 2:
        raise Corrupt("a code that ends too early")
    states = np.frombuffer(content, "<u4", lanes, at)
    words = np.frombuffer(content, "<u2", offset=at + 4 * lanes)
    return _pop(words, states, table, precision, count)


def _pop(words: Array, states: Array, table: Array, precision: int, count: int) -> Array:
    lanes, total = len(states), len(words)
    state = states.astype(np.int64)  # as wide as an index, so that nothing is converted on the way
    if (state < _LOW).any():
        raise Corrupt("a state that no encoder leaves")
    starts = np.cumsum(table) - table
    symbol_at = np.repeat(np.arange(len(table), dtype=np.uint16), table)
    frequency_at = np.repeat(table, table)
    offset_at = np.arange(len(symbol_at)) - np.repeat(starts, table)
    symbols = np.empty(count, np.uint16)
    last = (1 << precision) - 1
    slots, factors = np.empty(lanes, np.int64), np.empty(lanes, np.int64)
    at = 0
    for first in range(0, count, lanes):
        here = min(lanes, count - first)
        x, slot, factor = state[:here], slots[:here], factors[:here]
        np.bitwise_and(x, last, out=slot)  # within the tables, so that mode="clip" only spares a check
        symbol_at.take(slot, out=symbols[first : first + here], mode="clip")
        x >>= precision
        x *= frequency_at.take(slot, out=factor, mode="clip")
        x += offset_at.take(slot, out=factor, mode="clip")
        empty = np.flatnonzero(x < _LOW)
        if empty.size:
            following = at + empty.size
            if following > total:
                raise Corrupt("a code that ends too early")
            x[empty] = (x[empty] << _WORD) | words[at:following]
            at = following
    if at != total or (state != _LOW).any():
        raise Corrupt("a code that goes on behind its last symbol")
    return symbols


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
