"""Activation-aware scaling: the weights of large inputs are rounded more finely than others (AWQ, Lin et al. 2023,
arXiv:2306.00978)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from slimline.graph.crossings import Crossing, crossings
from slimline.graph.matrix import LayerMatrix
from slimline.methods.equalization import salience_scales
from slimline.methods.formats import Scaled
from slimline.methods.gram import Gram, output_energy
from slimline.model import Model
from slimline.steps.channel_scaling import divided

Array = np.ndarray[Any, np.dtype[Any]]
_EXPONENTS = np.linspace(0, 1, 21)[:-1]


def scaled_by_salience(
    model: Model, grams: Mapping[str, Gram], starts: Mapping[str, Callable[[Array], Scaled]]
) -> tuple[Model, dict[str, Gram], dict[str, float]]:
    """The same function with weights that lose less when they are rounded, the Gram matrices of its inputs, and by
    weight the exponent of its inputs' sizes.

    For every value that only layers with weights read, the exponent of least error of their outputs is searched, with
    rounding to nearest; 0 leaves the value alone. A channel's size is its root mean square.

    Parameters
    ----------
    model : with its batch norms folded.
    grams : by operator.
    starts : by weight that is rounded, the format that its rounding starts from.
    """
    stored = {name: np.asarray(array, np.float64) for name, array in model.parameters().items()}
    chosen: list[tuple[Crossing, Array]] = []
    every, exponents = dict(grams), dict[str, float]()
    for crossing in crossings(model.graph):
        readers = [each for each in crossing.readers if each.weight in starts and each.node in grams]
        if not readers:
            continue
        size = _size(readers[0], grams[readers[0].node], crossing.channels)
        scales = {float(exponent): crossing.alike(salience_scales(size, exponent)) for exponent in _EXPONENTS}

        def error(exponent: float, readers: list[LayerMatrix] = readers, scales: dict[float, Array] = scales) -> float:
            return sum(
                _error(each, stored[each.weight], scales[exponent], grams[each.node], starts[each.weight])
                for each in readers
            )

        best = min(scales, key=error)
        exponents |= {each.weight: best for each in readers}
        if best:
            crossing.divide(stored, scales[best])
            chosen.append((crossing, scales[best]))
            for each in readers:
                inputs = each.per_input(scales[best])
                assert inputs is not None
                every[each.node] = grams[each.node].divided(inputs[:, 0])
    return (divided(model, chosen, "scaling") if chosen else model), every, exponents


def _size(layer: LayerMatrix, gram: Gram, channels: int) -> Array:
    """Root mean square of each channel of the input, over the positions of a kernel."""
    channel = layer.per_input(np.arange(channels))
    assert channel is not None
    index = channel.ravel()
    total = np.bincount(index, gram.norm.ravel() ** 2, channels)
    return np.asarray(np.sqrt(total / np.bincount(index, minlength=channels).clip(1)))


def _error(layer: LayerMatrix, weight: Array, by: Array, gram: Gram, start: Callable[[Array], Scaled]) -> float:
    """Of the layer's outputs, when its inputs are divided and its multiplied weight is rounded."""
    inputs = layer.per_input(by)
    assert inputs is not None
    matrix = layer.matrix(weight)
    multiplied = layer.tensor(matrix * inputs, weight.shape).astype(np.float32)
    rounded = layer.matrix(start(multiplied).round(multiplied)) / inputs
    return float(output_energy(rounded - matrix, gram.second).sum())
