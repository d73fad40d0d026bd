"""Samples that occur again: by a hash of what the model is shown, whatever the dtype it was given in.

The hash is 64 bits of BLAKE2b over a sample's inputs as float32 (integers beyond 2^24 as int64), so the same image as
bytes and as floats of the same values has one hash. It costs about as much as reading the data once, and eight bytes a
sample to keep.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from slimline.basics.arrays import Array
from slimline.basics.errors import SlimlineError, raised

_CHUNK_BYTES = 2**24
_EXACT = 2**24
"""Integers up to this are exact in float32."""


def keys(inputs: Sequence[Array]) -> Array:
    """A hash of every sample of `inputs`, each ``(n, …)``: ``(n,)`` uint64."""
    n = len(inputs[0])
    hashes = np.empty(n, np.uint64)
    row_bytes = max(1, sum(4 * a[0].size for a in inputs))
    rows = max(1, _CHUNK_BYTES // row_bytes)
    for start in range(0, n, rows):
        parts = [_canonical(a[start : start + rows]) for a in inputs]
        for i in range(len(parts[0])):
            digest = hashlib.blake2b(digest_size=8)
            for part in parts:
                digest.update(part[i])
            hashes[start + i] = int.from_bytes(digest.digest(), "little")
    return hashes


def _canonical(array: Array) -> Sequence[bytes | memoryview]:
    """The bytes of each row."""
    flat = array.reshape(len(array), -1)
    small = np.ascontiguousarray(flat, np.float32) + np.float32(0)  # minus zero is zero
    width = 4 * flat.shape[1]
    if not width:
        return [b""] * len(flat)
    view = small.data.cast("B")
    rows: list[bytes | memoryview] = [view[i * width : (i + 1) * width] for i in range(len(flat))]
    if flat.dtype.kind in "iu" and flat.dtype.itemsize > 2:
        wide = (flat > _EXACT).any(1) | (flat < -_EXACT).any(1)
        for i in np.flatnonzero(wide):
            rows[i] = np.ascontiguousarray(flat[i]).astype(np.int64).tobytes()
    return rows


def originals(hashes: Array) -> Array:
    """Positions of samples that are no copies of an earlier one, ascending."""
    return np.sort(np.unique(hashes, return_index=True)[1])


def units(hashes: Array | None, groups: Array | None) -> Array | None:
    """``(n,)``: equal numbers for samples that belong together by group or as copies; None if no two do."""
    numbered = [np.unique(labels, return_inverse=True)[1] for labels in (hashes, groups) if labels is not None]
    shared = [labels for labels in numbered if labels.max() + 1 < len(labels)]
    if not shared:
        return None
    return shared[0] if len(shared) == 1 else _joined(*shared)


def _joined(one: Array, other: Array) -> Array:
    """The connected components of samples that share either number."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n, first = len(one), int(one.max()) + 1
    size = first + int(other.max()) + 1
    graph = coo_array((np.ones(n, np.int8), (one, first + other)), shape=(size, size))
    labels = connected_components(graph, directed=False)[1]
    return np.asarray(labels[one])


def divide(n: int, units: Array | None, sizes: Sequence[int], rng: np.random.Generator) -> list[Array]:
    """`n` samples in parts of about `sizes`, and the rest; no unit is divided. Each part is sorted."""
    if units is None:
        order = rng.permutation(n)
        return [np.sort(part) for part in np.split(order, np.cumsum(sizes))]
    numbers, place, counts = np.unique(units, return_inverse=True, return_counts=True)
    order = rng.permutation(len(numbers))
    ends = np.cumsum(counts[order])
    part_of = np.empty(len(numbers), int)
    taken = first = 0
    for part, size in enumerate(sizes):
        last = max(first + 1, int(np.searchsorted(ends, taken + size, "right")))
        part_of[order[first:last]] = part
        first, taken = last, int(ends[min(last, len(ends)) - 1])
    part_of[order[first:]] = len(sizes)
    return [np.flatnonzero(part_of[place] == part) for part in range(len(sizes) + 1)]


def names(labels: object, n: int, where: str) -> Array:
    """The groups that a user named, one for each of `n` samples, as text; numbers, names and dates will all do."""
    what = f"The groups of the {where} data"
    try:
        array = np.asarray(labels)
    except Exception as e:
        raise SlimlineError(f"{what} {raised(e)} when they were read: give an array of labels.") from e
    if array.ndim != 1 or len(array) != n:
        raise SlimlineError(f"{what} have shape {array.shape} for {n} samples: give one label per sample.")
    if array.dtype.kind == "O":
        missing = any(v is None or v != v for v in array)
    else:
        missing = array.dtype.kind in "fM" and bool((array != array).any())
    if array.dtype.kind not in "biufUSOM" or missing:
        raise SlimlineError(f"{what} miss labels or are {array.dtype}: give a number or a name per sample.")
    return array.astype(str)
