"""The calibration pass that all post-training methods share: each layer's Gram matrix, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.graph.matrix import LayerMatrix
from slimline.methods.gram import Gram
from slimline.model import Model

T = TypeVar("T")

ROWS = 16384  # of one batch and layer that are seen; more say the same
MEMORY = 2**30  # bytes of Gram matrices in one pass over the batches


def collect(
    model: Model,
    layers: Sequence[LayerMatrix],
    batches: Sequence[tuple[np.ndarray, ...]],
    rows: int = ROWS,
    memory: int = MEMORY,
) -> dict[str, Gram]:
    """Per operator (`LayerMatrix.node`) the Gram matrix of its input rows.

    Parameters
    ----------
    batches : inputs of the model, each ``(batch, …)``; run through once for every `memory` bytes of matrices.
    rows : of one batch and layer at most, spread evenly.

    Raises
    ------
    SlimlineError : no batches, or an activation that is not finite.
    """
    if not batches:
        raise SlimlineError("There is no calibration batch: give calibration samples.")
    grams: dict[str, Gram] = {}
    for part in in_parts(layers, _size, memory):
        readers: dict[str, list[LayerMatrix]] = {}
        for layer in part:
            groups, _, inputs = layer.shape
            grams[layer.node] = Gram(groups, inputs)
            readers.setdefault(layer.input, []).append(layer)

        def see(name: str, array: np.ndarray, readers: dict[str, list[LayerMatrix]] = readers) -> None:
            if not np.isfinite(array).all():
                raise SlimlineError(f"The input of {readers[name][0].layer} is not finite: check data and weights.")
            for layer in readers[name]:
                grams[layer.node].see(layer.rows(array, rows))

        model.adapter.observe(model.native, batches, list(readers), see)
    return grams


def collect_pair(
    model: Model,
    current: Any,
    layer: LayerMatrix,
    batches: Sequence[tuple[np.ndarray, ...]],
    input: str | None = None,
) -> Gram:
    """The Gram matrix of a layer's inputs in `current`, what `model` has become, and with those in `model` itself.

    Parameters
    ----------
    input : what the layer's input is called in `current`; None: as in `model`.
    """
    groups, _, inputs = layer.shape
    gram = Gram(groups, inputs, inputs)
    rows: list[np.ndarray] = []

    def see(name: str, array: np.ndarray) -> None:
        rows.append(np.array(layer.rows(array, ROWS), np.float32))

    for batch in batches:
        rows.clear()
        for native, name in ((current, input or layer.input), (model.native, layer.input)):
            model.adapter.observe(native, [batch], [name], see)
        gram.see(rows[0], rows[1])
    return gram


def _size(layer: LayerMatrix) -> int:
    groups, _, inputs = layer.shape
    return 8 * groups * inputs**2


def in_parts(items: Sequence[T], size: Callable[[T], int], memory: int) -> Iterator[list[T]]:
    """The items in runs whose sizes fit the memory together (a larger one runs alone)."""
    part: list[T] = []
    used = 0
    for item in items:
        if part and used + size(item) > memory:
            yield part
            part, used = [], 0
        part.append(item)
        used += size(item)
    if part:
        yield part
