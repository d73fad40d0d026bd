"""Which sizes of a model's inputs may be any, and the sizes at which that is tried.

A file names them; whether the network takes other ones, only running it tells. The sizes tried are few, near the
example's and far from it: what is the same at all of them counts as fixed, so that a number which follows a size up to
a limit has to be met beyond that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from slimline.frameworks.base import Array

log = logging.getLogger(__name__)

BATCH = "batch"
"""The symbol of the first dimension of the inputs that are as long as the first of them."""
BATCHES = (2, 3, 5, 67)
"""At which what sizes decide is computed: small ones, and one beyond the limits that networks set to a batch."""
GROWTH = 64
"""Most times the numbers of the example that inputs of another size may have."""
Symbols = tuple[tuple[str | None, ...], ...]
"""Of every input and dimension the name of its size where it is free; dimensions of one name are of one size."""
Inputs = tuple[Array, ...]


def symbols_of(graph: ir.Graph) -> Symbols:
    """Those of a graph in canonical form."""
    shapes = [value.shape or ir.Shape([]) for value in graph.inputs]
    return tuple(tuple(_parameter(shape, d) for d in range(len(shape))) for shape in shapes)


def named(graph: ir.Graph, example: Sequence[Array]) -> Symbols:
    """The sizes that the inputs leave free. Those of 1 in the example count as fixed, but for the batch."""
    shapes = [value.shape for value in graph.inputs]
    first = [x.ndim > 0 and (s is None or not isinstance(s[0], int)) for s, x in zip(shapes, example, strict=True)]
    rows = next((len(x) for f, x in zip(first, example, strict=True) if f), 0)
    first = [f and len(x) == rows for f, x in zip(first, example, strict=True)]
    own = {_parameter(s, 0) for s, f in zip(shapes, first, strict=True) if f} - {None}
    sizes: dict[str, int] = {}
    symbols = []
    for shape, array, batched in zip(shapes, example, first, strict=True):
        names: list[str | None] = []
        for d, size in enumerate(array.shape):
            told = _parameter(shape, d)
            if d == 0 and batched:
                name: str | None = BATCH
            elif (shape is not None and isinstance(shape[d], int)) or size <= 1:
                name = None
            elif told in own and size == rows:
                name = BATCH
            else:
                name = told if told is not None and told != BATCH else f"size_{d}_{size}"
                if sizes.setdefault(name, size) != size:
                    name = f"{name}_{size}"
                    sizes[name] = size
            names.append(name)
        symbols.append(tuple(names))
    return tuple(symbols)


def _parameter(shape: ir.Shape | None, d: int) -> str | None:
    held = None if shape is None else shape[d]
    return held.value if isinstance(held, ir.SymbolicDim) and held.value else None


def batch_only(symbols: Symbols) -> Symbols:
    """Those of the batch as the first dimension."""
    return tuple(tuple(BATCH if n == BATCH and d == 0 else None for d, n in enumerate(names)) for names in symbols)


def others(symbols: Symbols) -> list[str]:
    """The names besides the batch's."""
    return list(dict.fromkeys(n for names in symbols for n in names if n not in (None, BATCH)))


def is_wide(symbols: Symbols) -> bool:
    """Whether more is free than the batch as the first dimension."""
    return symbols != batch_only(symbols)


def size_of(symbol: str, symbols: Symbols, inputs: Sequence[Array]) -> int:
    """The size that a symbol has in inputs; 0 where they do not have it."""
    return next(
        (x.shape[d] for names, x in zip(symbols, inputs, strict=True) for d, n in enumerate(names) if n == symbol), 0
    )


def resized(inputs: Sequence[Array], symbols: Symbols, sizes: Mapping[str, int]) -> Inputs:
    """The inputs with these sizes, their numbers again and again or cut off."""

    def one(array: Array, names: tuple[str | None, ...]) -> Array:
        for d, name in enumerate(names):
            if name is not None and sizes.get(name, array.shape[d]) != array.shape[d]:
                array = array.take(np.arange(sizes[name]) % array.shape[d], d)
        return np.ascontiguousarray(array) if array.ndim else array

    return tuple(one(x, names) for x, names in zip(inputs, symbols, strict=True))


def blank(inputs: Sequence[Array], symbols: Symbols, sizes: Mapping[str, int]) -> Inputs:
    """Zeros of the shapes of `resized`, which take no memory as long as nothing but their sizes is read."""
    shapes = [
        [n if name is None else sizes.get(name, n) for n, name in zip(x.shape, names, strict=True)]
        for x, names in zip(inputs, symbols, strict=True)
    ]
    return tuple(np.zeros(shape, x.dtype) for x, shape in zip(inputs, shapes, strict=True))


def probes(symbols: Symbols, example: Inputs, runs: Callable[[Inputs], bool]) -> tuple[Symbols, list[Inputs]]:
    """The symbols that the network leaves free, and inputs at which to ask what sizes decide.

    The first are the example, with the first batch size; in the second all sizes are others.

    Parameters
    ----------
    runs : whether the network takes inputs.
    """
    batched = size_of(BATCH, symbols, example) > 0
    base = resized(example, symbols, {BATCH: BATCHES[0]})
    free: dict[str, dict[str, int]] = {}
    stuck: dict[int, list[str]] = {}
    for name in others(symbols):
        tried = _tried(symbols, base, name, runs)
        if tried:
            free[name] = tried
        else:
            stuck.setdefault(size_of(name, symbols, base), []).append(name)
    for size, names in stuck.items():  # sizes that only change together are one
        if len(names) > 1:
            joined = _renamed(symbols, dict.fromkeys(names, names[0]))
            if tried := _tried(joined, base, names[0], runs):
                symbols, free[names[0]] = joined, tried
                continue
        symbols = _renamed(symbols, dict.fromkeys(names, None))
        log.warning("The network takes no other size than %d where its file leaves %s free.", size, ", ".join(names))
    near = {name: tried["near"] for name, tried in free.items()}
    sets: list[dict[str, int]] = [{}, {**near, **({BATCH: BATCHES[1]} if batched else {})}]
    sets += [{BATCH: rows} for rows in BATCHES[2:] if batched]
    sets += [{name: size} for name, tried in free.items() for kind, size in tried.items() if kind != "near"]
    return symbols, [resized(base, symbols, sizes) for sizes in sets]


def _tried(symbols: Symbols, base: Inputs, name: str, runs: Callable[[Inputs], bool]) -> dict[str, int]:
    """Other sizes that the network takes: one near the example's, one far above it and one below; empty where it takes
    none above."""
    n = size_of(name, symbols, base)

    def first(candidates: Sequence[int]) -> int | None:
        for size in dict.fromkeys(candidates):
            inputs = resized(base, symbols, {name: size})
            if sum(x.size for x in inputs) <= GROWTH * sum(x.size for x in base) and runs(inputs):
                return size
        return None

    near = first([n + 1, n + 2, n + 4, n + 8, n + 16, n + 32, 2 * n])
    if near is None:
        return {}
    above = [max(4 * n, 67), 4 * n, 3 * n, 2 * n + 1, 2 * n, n + 32, n + 16, n + 8, n + 4, n + 3, n + 2]
    far = first([size for size in above if size > near])
    below = first([size for size in (2, 3, 4, n // 4, n // 2, n - 1) if 1 < size < n])
    return {kind: size for kind, size in (("near", near), ("far", far), ("below", below)) if size is not None}


def _renamed(symbols: Symbols, names: Mapping[str, str | None]) -> Symbols:
    return tuple(tuple(names.get(n, n) if n is not None else None for n in dims) for dims in symbols)
