"""What a layer reads once the layers before it have changed, beside what it gave before any of them did.

A layer that is rounded by the inputs of the network as it was knows nothing of the error that these inputs have by now.
With the products of its inputs as they are and of its outputs as they were, it can make up for that too (Qronos, Zhang
et al. 2025, arXiv:2505.11695; QEP, Arai and Ichikawa 2025, arXiv:2504.09629).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.evidence.walk import MEMORY, Batches, Walk
from slimline.graph.edits import PutTensors
from slimline.graph.ir import Graph
from slimline.graph.matrix import LayerMatrix
from slimline.methods.gram import Gram
from slimline.model import Model

Array = np.ndarray[Any, np.dtype[Any]]
Change = Callable[[LayerMatrix, Gram], Mapping[str, Array]]

ROWS = 65536  # of a layer over all batches; more say the same


def layer_by_layer(
    model: Model,
    layers: Sequence[LayerMatrix],
    batches: Batches,
    start: Mapping[str, Array],
    change: Change,
    now: Batches | None = None,
) -> dict[str, Array]:
    """By name the tensors of `start` and those that `change` made, one layer after the other.

    Layers that do not depend on each other go together. Activations of one place of the network are kept at a time.

    Parameters
    ----------
    model : as it was before anything changed.
    layers : that change; each alone reads its weight.
    batches : inputs of the model, each ``(batch, …)``, at least one.
    start : tensors that have changed before the first of the layers does.
    change : gives a layer's new tensors by the Gram matrix of what it reads by now, which is paired with what it gave
        in `model`, without its bias.
    now : what has become of `batches` where networks before this one have changed too.

    Raises
    ------
    SlimlineError : an activation that is not finite.
    """
    adapter, stored, tensors = model.adapter, model.parameters(), dict(start)
    native = adapter.edit(model.native, (PutTensors(tensors),), model.example) if tensors else model.native
    schedule = levels(model.graph, layers)
    stops = [list(dict.fromkeys(layer.input for layer in level)) for level in schedule]
    before, after = Walk(model, batches, stops), Walk(model, batches if now is None else now, stops)
    for level in schedule:
        width = 4 * sum(layer.shape[0] * layer.shape[1] for layer in level)
        limit = max(1, min(ROWS, MEMORY // width) // len(batches))
        outputs = _outputs(level, stored, before, model, limit)
        grams = _grams(level, outputs, after, native, limit)
        new = {name: tensor for layer in level for name, tensor in change(layer, grams[layer.node]).items()}
        native = adapter.edit(native, (PutTensors(new),), model.example)
        tensors |= new
    return tensors


def levels(graph: Graph, layers: Sequence[LayerMatrix]) -> list[list[LayerMatrix]]:
    """Layers by how many others lie before them, so that those of one level do not depend on each other."""
    own = {layer.node: layer for layer in layers}
    before: dict[str, int] = {}
    result: list[list[LayerMatrix]] = []
    for node in graph.nodes:
        depth = max((before.get(name, 0) for name in node.inputs if name is not None), default=0)
        if (layer := own.get(node.name)) is not None:
            result += [[]] if depth == len(result) else []
            result[depth].append(layer)
            depth += 1
        before.update(dict.fromkeys(node.outputs, depth))
    return result


def _outputs(
    level: Sequence[LayerMatrix], stored: Mapping[str, Array], walk: Walk, model: Model, limit: int
) -> dict[str, list[Array]]:
    """By operator and batch what a layer gives without its bias, ``(groups, rows, outputs)`` in float32."""
    outputs: dict[str, list[Array]] = {layer.node: [] for layer in level}
    weights = {layer.node: layer.matrix(stored[layer.weight]).swapaxes(1, 2) for layer in level}

    def see(name: str, array: Array) -> None:
        for layer in level:
            if layer.input == name:
                rows = layer.rows(_finite(array, layer), limit)
                outputs[layer.node].append(np.asarray(rows @ weights[layer.node], np.float32))

    walk.on(model.native, see)
    return outputs


def _grams(
    level: Sequence[LayerMatrix], outputs: Mapping[str, list[Array]], walk: Walk, native: Any, limit: int
) -> dict[str, Gram]:
    """By operator the Gram matrix of what a layer reads in `native`, paired with `outputs`."""
    grams = {layer.node: Gram(layer.shape[0], layer.shape[2], layer.shape[1]) for layer in level}
    pending = {node: iter(batches) for node, batches in outputs.items()}

    def see(name: str, array: Array) -> None:
        for layer in level:
            if layer.input == name:
                grams[layer.node].see(layer.rows(_finite(array, layer), limit), next(pending[layer.node]))

    walk.on(native, see)
    return grams


def _finite(array: Array, layer: LayerMatrix) -> Array:
    if not np.isfinite(array).all():
        raise SlimlineError(f"The input of {layer.layer} is not finite: check data and weights.")
    return array
