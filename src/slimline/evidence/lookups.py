"""How often the rows of tables are looked up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from slimline.graph.matrix import LayerMatrix
from slimline.model import Model

Array = np.ndarray[Any, np.dtype[Any]]


def frequencies(model: Model, layers: Sequence[LayerMatrix], batches: Sequence[tuple[Array, ...]]) -> dict[str, Array]:
    """Per operator (`LayerMatrix.node`) the part of its lookups that each row has, ``(1, rows)``: the diagonal of the
    Gram matrix of its one-hot inputs, which has nothing beside it.

    Parameters
    ----------
    layers : those of `slimline.graph.matrix.tables`.
    batches : inputs of the model, each ``(batch, …)``, at least one.
    """
    counts = {layer.node: np.zeros((1, layer.shape[2])) for layer in layers}
    readers: dict[str, list[str]] = {}
    for layer in layers:
        readers.setdefault(layer.input, []).append(layer.node)

    def see(name: str, array: Array) -> None:
        for node in readers[name]:
            rows = counts[node].shape[1]
            counts[node] += np.bincount(array.astype(np.int64).ravel() % rows, minlength=rows)

    if layers:
        model.adapter.observe(model.native, batches, list(readers), see)
    return {node: count / count.sum() for node, count in counts.items()}
