"""As many samples at a time as take little memory, and the same answers as of all at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from slimline.measure.probes import Arrays

if TYPE_CHECKING:
    from slimline.model import Model

BYTES = 2**25
"""Of activations that are computed at a time, where a sample takes no more."""
_WIDTH = 4  # bytes of a number, whatever its type


def batched_inputs(model: Model) -> list[bool]:
    """Which inputs have a batch that may be of any size."""
    free = model.adapter.free(model.native)
    rows = len(model.example[0]) if model.example and model.example[0].ndim else -1
    return [free != "none" and x.ndim > 0 and len(x) == rows for x in model.example]


def portion(model: Model, values: Iterable[str] | None = None) -> int | None:
    """Samples of which `values`, by default all that the model computes, take `BYTES`; None where an input has no batch
    that may be of any size."""
    if not all(batched_inputs(model)):
        return None
    graph = model.graph
    names = graph.values.keys() - graph.parameters if values is None else values
    numbers = sum(math.prod(graph.values[name].shape) for name in names) / graph.batch
    return max(1, int(BYTES / max(_WIDTH * numbers, 1)))


def portions(batches: Iterable[Arrays], rows: int | None) -> Iterator[Arrays]:
    """The batches in portions of at most `rows` samples; as they are for None."""
    for batch in batches:
        for start in range(0, len(batch[0]), rows or max(len(batch[0]), 1)):
            yield batch if rows is None else tuple(x[start : start + rows] for x in batch)


def answers(model: Model, run: Callable[[Arrays], Sequence[np.ndarray]], inputs: Arrays) -> tuple[np.ndarray, ...]:
    """What `run`, which computes what `model` does, answers to `inputs`: in portions, where there is an answer to each
    sample."""
    rows, graph = portion(model), model.graph
    each = graph.batch > 1 and all(graph.values[name].shape[:1] == (graph.batch,) for name in graph.outputs)
    if rows is None or not each:
        return tuple(run(inputs))
    parts = [run(part) for part in portions([inputs], rows)]
    return tuple(np.concatenate(outputs) for outputs in zip(*parts, strict=True))
