"""The calibration pass that all post-training methods share: each layer's Gram matrix, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from slimline.errors import SlimlineError
from slimline.graph.matrix import LayerMatrix
from slimline.methods.gram import Gram
from slimline.model import Model

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
    found: dict[str, Gram] = {}
    for part in _parts(layers, memory):
        readers: dict[str, list[LayerMatrix]] = {}
        for layer in part:
            groups, _, inputs = layer.shape
            found[layer.node] = Gram(groups, inputs)
            readers.setdefault(layer.input, []).append(layer)

        def see(name: str, array: np.ndarray, readers: dict[str, list[LayerMatrix]] = readers) -> None:
            if not np.isfinite(array).all():
                raise SlimlineError(f"The input of {readers[name][0].layer} is not finite: check data and weights.")
            for layer in readers[name]:
                found[layer.node].see(layer.rows(array, rows))

        model.adapter.observe(model.native, batches, list(readers), see)
    return found


def _parts(layers: Sequence[LayerMatrix], memory: int) -> Iterator[list[LayerMatrix]]:
    """The layers in runs whose matrices fit the memory (a larger one runs alone)."""
    part: list[LayerMatrix] = []
    used = 0
    for layer in layers:
        groups, _, inputs = layer.shape
        size = 8 * groups * inputs**2
        if part and used + size > memory:
            yield part
            part, used = [], 0
        part.append(layer)
        used += size
    if part:
        yield part
