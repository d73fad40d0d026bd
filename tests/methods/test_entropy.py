"""The entropy coder: what goes in comes out, in as few bits as there must be; what no encoder wrote is refused."""

from __future__ import annotations

import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slimline.methods import entropy
from slimline.methods.entropy import ALPHABET, LANES, Corrupt, Stream, frequencies
from tests.fuzz.mutate import damaged_bytes


def encode(symbols: np.ndarray, alphabet: int) -> bytes:
    return entropy.encode([Stream(symbols, alphabet)])


def decode(content: bytes, count: int, alphabet: int) -> np.ndarray:
    return entropy.decode(content, [(count, alphabet)])[0]


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(1, 40), st.floats(0, 1)), max_size=9), st.integers(0, 2**31))
def test_streams_share_one_code(streams: list[tuple[int, int, float]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    drawn = [
        Stream(np.where(rng.random(n) < zeros, 0, rng.integers(0, alphabet, n)).astype(np.uint16), alphabet)
        for n, alphabet, zeros in streams
    ]
    content = entropy.encode(drawn)
    again = entropy.decode(content, [(n, alphabet) for n, alphabet, _ in streams])
    assert all(np.array_equal(a, b.symbols) for a, b in zip(again, drawn, strict=True))
    assert len(content) <= sum(stream.bytes for stream in drawn) + 40 + 4 * len(drawn)


@settings(max_examples=40)
@given(
    st.integers(0, 3000),
    st.integers(1, ALPHABET),
    st.integers(0, 2**31),
    st.sampled_from(["uniform", "skewed", "one", "last", "geometric", "runs"]),
)
@example(1, 2, 0, "last")
@example(2 * LANES + 1, 4, 0, "uniform")
def test_what_goes_in_comes_out(count: int, alphabet: int, seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    symbols = {
        "uniform": lambda: rng.integers(0, alphabet, count),
        "skewed": lambda: np.where(rng.random(count) < 0.999, alphabet // 2, rng.integers(0, alphabet, count)),
        "one": lambda: np.full(count, alphabet // 3),
        "last": lambda: np.full(count, alphabet - 1),
        "geometric": lambda: np.minimum(rng.geometric(0.3, count) - 1, alphabet - 1),
        "runs": lambda: np.sort(rng.integers(0, alphabet, count)),
    }[kind]()
    content = encode(symbols.astype(np.uint16), alphabet)
    assert np.array_equal(decode(content, count, alphabet), symbols)
    assert encode(symbols.astype(np.uint16), alphabet) == content


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=200).filter(any), st.integers(8, 14))
def test_frequencies_are_shares_of_the_whole(counts: list[int], precision: int) -> None:
    table = frequencies(np.array(counts), precision)
    assert table.sum() == 1 << precision and ((table > 0) == (np.array(counts) > 0)).all()


@pytest.mark.parametrize("alphabet", [2, 32, 256])
def test_within_two_percent_of_the_entropy(alphabet: int) -> None:
    rng = np.random.default_rng(alphabet)
    for part in (0.0, 0.5, 0.9):
        bell = np.clip(np.rint(rng.standard_normal(200_000) * alphabet / 6 + alphabet / 2), 0, alphabet - 1)
        symbols = np.where(rng.random(200_000) < part, 0, bell).astype(np.uint16)
        least = entropy.entropy(np.bincount(symbols)) * len(symbols) / 8
        assert len(encode(symbols, alphabet)) < 1.02 * least


def test_entropy_is_that_of_its_formula() -> None:
    assert entropy.entropy(np.array([1, 1, 2, 0])) == 1.5
    assert entropy.entropy(np.array([0, 7])) == 0
    assert entropy.entropy(np.zeros(3)) == 0


def test_damage_is_refused_or_gives_as_many_symbols() -> None:
    rng = random.Random(0)
    symbols = np.random.default_rng(0).integers(0, 9, 700).astype(np.uint16)
    content, refused = encode(symbols, 9), 0
    for _ in range(150):
        damaged = damaged_bytes(content, rng)
        try:
            decoded = decode(damaged, 700, 9)
        except Corrupt:
            refused += 1
        else:
            assert len(decoded) == 700 and decoded.max() < 9
            assert damaged == content or not np.array_equal(decoded, symbols)
    assert refused > 120
    for wrong in (b"", b"\0\0", b"\xff\xff" + content[2:], b"\1\0" + b"\xff" * 40):
        with pytest.raises(Corrupt):
            decode(wrong, 700, 9)
    with pytest.raises(Corrupt):
        decode(b"x", 0, 9)


def test_many_short_streams_take_little_memory() -> None:
    """A code of a few bytes a stream may not ask for a table of the highest precision for each."""
    drawn = [Stream(np.arange(2, dtype=np.uint16), 2)] * 2000
    content = entropy.encode(drawn)
    precise = content.replace(bytes([8, 128, 1, 128, 1]), bytes([14, 128, 64, 128, 64]))
    assert len(precise) == len(content) and precise != content
    tracemalloc.start()
    assert len(entropy.decode(content, [(2, 2)] * 2000)) == 2000
    with pytest.raises(Corrupt, match="precision"):
        entropy.decode(precise, [(2, 2)] * 2000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6
