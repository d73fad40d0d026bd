"""Layers that see no more of their input than its sign: binary activations (XNOR-Net, ReActNet).

A layer reads what stands before it less a threshold of each channel, which is a stored tensor like any bias; the value
that this gives is then rounded to plus and minus one number. Whatever else reads the same input reads it as it was, so
that residual connections keep their numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from slimline.graph.edits import PutTensors, Subtract
from slimline.graph.matrix import LayerMatrix, constant_slot, matrices
from slimline.methods.formats import Levels
from slimline.methods.scales import SMALLEST
from slimline.model import Model
from slimline.recipe.layers import first_match
from slimline.steps.quantization_aware.step import QuantizationAwareTraining

Array = np.ndarray[Any, np.dtype[Any]]
Batches = Sequence[tuple[Array, ...]]


def signed(step: QuantizationAwareTraining, model: Model, weights: Collection[str]) -> tuple[LayerMatrix, ...]:
    """The layers with one of these weights that see signs."""
    types = model.graph.types
    return tuple(
        layer
        for layer in matrices(model.graph)
        if layer.weight in weights and step.reads_signs(first_match((layer.layer,), step.overrides, types))
    )


def with_thresholds(model: Model, layers: Sequence[LayerMatrix], batches: Batches) -> Model:
    """A model in which each of the layers reads its input less the mean of every channel, over all batches.

    What a layer loses by that its bias, or the batch norm behind it, makes up for, but where a convolution looks beyond
    the edges.
    """
    means = _means(model, layers, batches)
    graph, stored = model.graph, model.parameters()
    readers, tensors = graph.consumers(), dict[str, Array]()
    for layer in layers:
        spread = layer.per_input(means[layer.output])
        slot, minus = constant_slot(graph, layer, readers)
        if spread is None or slot is None:
            continue
        lost = np.sum(layer.matrix(stored[layer.weight]).astype(np.float64) * spread, axis=-1)
        sums = -lost if minus else lost
        now = tensors.get(slot, stored[slot])
        change = layer.as_bias(sums, now.shape) if slot == layer.bias else sums.reshape(now.shape)
        tensors[slot] = (now + change).astype(now.dtype)
    axes = {each.output: axis for each in layers if (axis := _axis(each)) is not None}
    numbers = {each.output: (each.input, means[each.output].astype(np.float32)) for each in layers}
    return replace(model, native=model.edit(PutTensors(tensors), Subtract(numbers, axes)))


def sign_formats(model: Model, signs: Collection[str], batches: Batches) -> dict[str, Levels]:
    """Plus and minus the mean magnitude of these activations, which is the number of least squared error."""
    sums, counts = dict.fromkeys(signs, 0.0), dict.fromkeys(signs, 0)

    def see(name: str, array: Array) -> None:
        sums[name] += float(np.sum(np.abs(array), dtype=np.float64))
        counts[name] += array.size

    model.adapter.observe(model.native, batches, list(signs), see)
    means = {name: max(sums[name] / max(counts[name], 1), SMALLEST) for name in signs}
    return {name: Levels.binary(np.asarray(mean, np.float32)) for name, mean in means.items()}


def _axis(layer: LayerMatrix) -> int | None:
    """The dimension of a layer's input that holds its channels; None where that is not one."""
    axes = layer.channel_axes
    return axes[0] if axes is not None and len(axes) == 1 else None


def _means(model: Model, layers: Sequence[LayerMatrix], batches: Batches) -> dict[str, Array]:
    """By the output of a layer, the mean of every channel of its input, or the only one of all, ``(channels,)``."""
    read: dict[str, list[LayerMatrix]] = {}
    for layer in layers:
        read.setdefault(layer.input, []).append(layer)
    sums: dict[str, Array] = {layer.output: np.zeros(1) for layer in layers}
    counts = dict.fromkeys(sums, 0)

    def see(name: str, array: Array) -> None:
        for layer in read[name]:
            axis = _axis(layer)
            others = tuple(d for d in range(array.ndim) if d != axis)
            total = np.sum(array, axis=others, dtype=np.float64).reshape(-1)
            sums[layer.output] = sums[layer.output] + total
            counts[layer.output] += array.size // total.size

    model.adapter.observe(model.native, batches, list(read), see)
    return {name: total / max(counts[name], 1) for name, total in sums.items()}
