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
TOTAL = 1 << PRECISION
"""What the frequencies of a table add up to."""
ALPHABET = 1 << 12
"""The most symbols that there may be."""
LANES = 4096
_LOW, _WORD = 1 << 16, 16  # a lane's state lies in [_LOW, _LOW << _WORD); words are shifted in and out of it
_BITS_PER_LANE = 16 * 150  # so that what a lane costs, some 16 bits, is two thirds of a percent
_STEPS = 1 << 14  # that a lane does at most where there are lanes left: each costs what numpy takes for a call
_LANES = struct.Struct("<H")


class Corrupt(Exception):
    """A code that no encoder wrote."""


def entropy(counts: Array) -> float:
    """Of symbols with these counts, in bits a symbol (zero-order)."""
    seen = np.asarray(counts, np.float64)
    seen = seen[seen > 0]
    total = seen.sum()
    return float(-(seen * np.log2(seen / total)).sum() / total) if total else 0.0


def frequencies(counts: Array) -> Array:
    """Whole numbers that add up to `TOTAL`, in proportion to `counts` as nearly as can be, and at least 1 where one is.

    Parameters
    ----------
    counts : of each symbol, ``(alphabet,)``, integers with at least one above zero.
    """
    counts = np.asarray(counts, np.float64)
    present = counts > 0
    shares = counts / counts.sum() * TOTAL
    found = np.where(present, np.maximum(np.floor(shares), 1), 0).astype(np.int64)
    lacking = TOTAL - int(found.sum())
    if lacking > 0:
        nearest = np.argsort(found - shares, kind="stable")[:lacking]  # fewer are lacking than symbols are present
        found[nearest] += 1
    for _ in range(-lacking):  # rare symbols took more than their share: where one less costs the fewest bits
        cost = np.where(found > 1, counts * -np.log1p(-1 / np.maximum(found, 2)), np.inf)
        found[np.argmin(cost)] -= 1
    return found


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
    table = frequencies(counts)
    lanes = _lanes(count, entropy(counts) * count)
    words, states = _push(symbols, table, lanes)
    return b"".join((_LANES.pack(lanes), _varints(table), states.tobytes(), words.tobytes()))


def _lanes(count: int, bits: float) -> int:
    return int(min(LANES, count, max(1, bits // _BITS_PER_LANE, -(-count // _STEPS))))


def _push(symbols: Array, table: Array, lanes: int) -> tuple[Array, Array]:
    """The words and the final states, both little-endian."""
    starts = np.cumsum(table) - table
    frequency, start = table.astype(np.uint64)[symbols], starts.astype(np.uint64)[symbols]
    limit = frequency << np.uint64(32 - PRECISION)
    state = np.full(lanes, _LOW, np.uint64)
    mask, word, precision = np.uint64(_LOW - 1), np.uint64(_WORD), np.uint64(PRECISION)
    blocks = []
    for first in range((len(symbols) - 1) // lanes * lanes, -1, -lanes):
        part = slice(first, first + lanes)
        x, f = state[: len(frequency[part])], frequency[part]
        full = np.flatnonzero(x >= limit[part])
        if full.size:
            blocks.append((x[full] & mask).astype("<u2"))
            x[full] >>= word
        quotient = x // f
        x[:] = (quotient << precision) + (x - quotient * f) + start[part]
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
    if len(content) < _LANES.size:
        raise Corrupt("a code without its head")
    (lanes,) = _LANES.unpack_from(content)
    if not 1 <= lanes <= min(LANES, count) or (-(-count // lanes) > _STEPS and lanes < LANES):
        raise Corrupt("a code of as many lanes as no encoder takes")
    table, at = _from_varints(content, _LANES.size, alphabet)
    if at + 4 * lanes > len(content) or (len(content) - at) % 2:
        raise Corrupt("a code that ends too early")
    states = np.frombuffer(content, "<u4", lanes, at)
    words = np.frombuffer(content, "<u2", offset=at + 4 * lanes)
    return _pop(words, states, table, count)


def _pop(words: Array, states: Array, table: Array, count: int) -> Array:
    lanes, total = len(states), len(words)
    state = states.astype(np.int64)  # as wide as an index, so that nothing is converted on the way
    if (state < _LOW).any():
        raise Corrupt("a state that no encoder leaves")
    starts = np.cumsum(table) - table
    symbol_at = np.repeat(np.arange(len(table), dtype=np.uint16), table)
    frequency_at = np.repeat(table, table)
    offset_at = np.arange(TOTAL) - np.repeat(starts, table)
    symbols = np.empty(count, np.uint16)
    slots, factors = np.empty(lanes, np.int64), np.empty(lanes, np.int64)
    at = 0
    for first in range(0, count, lanes):
        here = min(lanes, count - first)
        x, slot, factor = state[:here], slots[:here], factors[:here]
        np.bitwise_and(x, TOTAL - 1, out=slot)  # always within the tables, so that mode="clip" only spares a check
        symbol_at.take(slot, out=symbols[first : first + here], mode="clip")
        x >>= PRECISION
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
    if table.sum() != TOTAL:
        raise Corrupt("a table of frequencies that add up to something else")
    return table, at
