"""What is done to a float model so that it loses less when it is rounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from slimline.graph.edits import PutTensors
from slimline.graph.ir import Graph, Node
from slimline.graph.matrix import LayerMatrix, matrices
from slimline.methods.equalization import clipped_normal_mean, equal_scales
from slimline.model import Model

Array = np.ndarray[Any, np.dtype[Any]]

_HOMOGENEOUS = ("relu", "leaky_relu", "prelu", "identity")  # f(s x) = s f(x) for positive s
_ROUNDS, _CLOSE = 20, 1e-3  # turns over all pairs at most; until no channel changes by more than this part
_CLIPS = {"relu": (0.0, np.inf), "relu6": (0.0, 6.0), "identity": (-np.inf, np.inf)}


@dataclass(frozen=True)
class Pair:
    """Two layers, the second of which alone reads what the first makes, with nothing between that minds the scale of a
    channel."""

    first: LayerMatrix
    second: LayerMatrix
    channels: int


def pairs(graph: Graph) -> list[Pair]:
    """All pairs of a graph whose batch norms are folded."""
    readers, layers = graph.consumers(), {layer.node: layer for layer in matrices(graph)}
    crossings = []
    for first in layers.values():
        second = _reader(graph, first, readers, layers)
        held = [first.weight, *([] if first.bias is None else [first.bias]), *([second.weight] if second else [])]
        if second is None or any(len(readers[name]) != 1 for name in held):
            continue
        groups, outputs, _ = first.shape
        one = np.ones(groups * outputs)
        biased = first.bias is None or first.vector(np.zeros(graph.values[first.bias].shape)) is not None
        if first.one_to_one and biased and first.per_output(one) is not None and second.per_input(one) is not None:
            crossings.append(Pair(first, second, one.size))
    return crossings


def _reader(
    graph: Graph, first: LayerMatrix, readers: Mapping[str, list[Node]], layers: Mapping[str, LayerMatrix]
) -> LayerMatrix | None:
    value = first.output
    while value not in graph.outputs and len(readers[value]) == 1:
        node = readers[value][0]
        if node.name in layers:
            return layers[node.name] if layers[node.name].input == value else None
        own = [name for name in node.inputs if name is not None and name not in graph.parameters]
        function = node.attributes.get("function")
        bends = node.kind == "elementwise" and function in _HOMOGENEOUS
        pools = node.kind == "pool" and function in ("max", "mean")
        if own != [value] or not (bends or pools):
            return None
        value = node.outputs[0]
    return None


def equalized(model: Model) -> tuple[Model, dict[str, Array]]:
    """The same function with channels of like range (cross-layer equalisation), and by weight, what each channel that
    it reads was divided by.

    Parameters
    ----------
    model : with its batch norms folded.
    """
    stored = model.parameters()
    every = pairs(model.graph)
    weights = {x.weight: np.asarray(x.matrix(stored[x.weight]), np.float64) for p in every for x in (p.first, p.second)}
    divisors = {pair.second.weight: np.ones(pair.channels) for pair in every}
    biases = {p.first.weight: np.ones(p.channels) for p in every}
    for _ in range(_ROUNDS):
        largest = 0.0
        for pair in every:
            outputs, read = _channels(pair)
            scale = equal_scales(
                _most(weights[pair.first.weight], outputs, pair.channels),
                _most(weights[pair.second.weight], read, pair.channels),
            )
            weights[pair.first.weight] /= scale[outputs]
            weights[pair.second.weight] *= scale[read]
            divisors[pair.second.weight] *= scale
            biases[pair.first.weight] *= scale
            largest = max(largest, float(np.abs(np.log(scale)).max(initial=0.0)))
        if largest < _CLOSE:
            break
    tensors = {}
    for pair in every:
        first = pair.first
        for layer in (first, pair.second):
            shape, dtype = stored[layer.weight].shape, stored[layer.weight].dtype
            tensors[layer.weight] = layer.tensor(weights[layer.weight], shape).astype(dtype)
        if first.bias is not None:
            bias = stored[first.bias]
            vector = first.vector(bias)
            assert vector is not None
            scaled = vector / biases[first.weight][_channels(pair)[0]][:, :, 0]
            tensors[first.bias] = first.as_bias(scaled, bias.shape).astype(bias.dtype)
    if not tensors:
        return model, {}
    return replace(model, native=model.edit(PutTensors(tensors))), divisors


def _channels(pair: Pair) -> tuple[Array, Array]:
    """Which channel each weight of the first layer makes, and each of the second reads."""
    every = np.arange(pair.channels)
    outputs, read = pair.first.per_output(every), pair.second.per_input(every)
    assert outputs is not None and read is not None
    return outputs, read


def _most(weight: Array, channel: Array, channels: int) -> Array:
    """The largest absolute weight of each channel."""
    result = np.zeros(channels)
    np.maximum.at(result, np.broadcast_to(channel, weight.shape), np.abs(weight))
    return result


def mean_inputs(model: Model, divisors: Mapping[str, Array]) -> dict[str, Array]:
    """By weight, the mean of each input of its layer as far as the batch norm before it tells, ``(groups, inputs)``.

    A batch norm leaves numbers of a known mean and deviation, taken to be normal; padding is left out of account.

    Parameters
    ----------
    model : as it was trained, its batch norms in place.
    divisors : of `equalized`.
    """
    graph, stored, means = model.graph, model.parameters(), {}
    makers = graph.producers()
    for layer in matrices(graph):
        node = makers.get(layer.input)
        function = "identity"
        if node is not None and node.kind == "elementwise" and node.attributes.get("function") in _CLIPS:
            function = str(node.attributes["function"])
            node = makers.get(str(node.inputs[0]))
        if node is None or node.kind != "batch_norm":
            continue
        shape = stored[next(name for name in node.inputs[1:] if name is not None)].shape
        scale, shift = (None if name is None else np.asarray(stored[name], np.float64) for name in node.inputs[1:3])
        mean = clipped_normal_mean(
            np.zeros(shape) if shift is None else shift,
            np.ones(shape) if scale is None else np.abs(scale),
            *_CLIPS[function],
        )
        if layer.weight in divisors and divisors[layer.weight].shape == mean.shape:
            mean = mean / divisors[layer.weight]
        spread = layer.per_input(mean)
        if spread is not None:
            means[layer.weight] = spread[:, 0]
    return means
