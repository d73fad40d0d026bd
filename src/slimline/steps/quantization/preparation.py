"""What is done to a float model so that it loses less when it is rounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from slimline.graph.crossings import Crossing, crossings, uncrossed
from slimline.graph.edits import Multiply
from slimline.graph.ir import Graph
from slimline.graph.matrix import LayerMatrix, matrices
from slimline.methods.equalization import clipped_normal_mean, equal_scales, smoothing_scales
from slimline.model import Model
from slimline.recipe.layers import selected
from slimline.steps.channel_scaling import divided
from slimline.steps.quantization.choices import Choices
from slimline.steps.quantization.relus import absorbed, unclipped
from slimline.steps.quantization.step import StaticQuantization

Array = np.ndarray[Any, np.dtype[Any]]

_ROUNDS, _CLOSE = 20, 1e-3  # turns over all pairs at most; until no channel changes by more than this part
_CLIPS = {"relu": (0.0, np.inf), "relu6": (0.0, 6.0), "identity": (-np.inf, np.inf)}


def prepared(model: Model, step: StaticQuantization, batches: Sequence[tuple[Array, ...]]) -> Model:
    """`model` with what `step` asks for before its batch norms are folded.

    Parameters
    ----------
    batches : calibration inputs of the model.
    """
    if step.smooth is not None:
        model = smoothed(with_products(model, step), step.smooth, batches)
    if step.equalize and step.unclip:
        model = unclipped(model, step.unclip, batches)
    return absorbed(model, batches) if step.absorb_bias else model


def pairs(graph: Graph) -> list[tuple[Crossing, LayerMatrix, LayerMatrix]]:
    """All layers of a graph, whose batch norms are folded, that alone make what another layer alone reads."""
    order = {layer.node: position for position, layer in enumerate(matrices(graph))}
    alone = [(each, each.maker, each.readers[0]) for each in crossings(graph) if len(each.readers) == 1]
    between = [(each, maker, reader) for each, maker, reader in alone if maker is not None and not each.vectors]
    return sorted(between, key=lambda pair: order[pair[1].node])


def equalized(model: Model) -> tuple[Model, dict[str, Array]]:
    """The same function with channels of like range (cross-layer equalisation), and by weight, what each channel that
    it reads was divided by.

    Parameters
    ----------
    model : with its batch norms folded.
    """
    stored = model.parameters()
    every = pairs(model.graph)
    weights = {x.weight: np.asarray(x.matrix(stored[x.weight]), np.float64) for _, *both in every for x in both}
    divisors = {crossing.value: np.ones(crossing.channels) for crossing, *_ in every}
    for _ in range(_ROUNDS):
        largest = 0.0
        for crossing, first, second in every:
            outputs, read, count = _numbers(crossing, second)
            scale = equal_scales(
                _most(weights[first.weight], outputs, count + 1), _most(weights[second.weight], read, count + 1)
            )
            scale[-1] = 1.0
            weights[first.weight] /= scale[outputs]
            weights[second.weight] *= scale[read]
            divisors[crossing.value] *= scale[crossing.shares]
            largest = max(largest, float(np.abs(np.log(scale)).max(initial=0.0)))
        if largest < _CLOSE:
            break
    if not every:
        return model, {}
    scaled = divided(model, [(crossing, divisors[crossing.value]) for crossing, *_ in every], "equalize")
    return scaled, {second.weight: divisors[crossing.value] for crossing, _, second in every}


def with_products(model: Model, step: StaticQuantization) -> Model:
    """The same function with a product by ones before linear layers that are to compute in integers, where nothing
    before them can be divided; layers that read the same value share one. `smoothed` finds the numbers.
    """
    graph, choices, reduced = model.graph, Choices.of(step, model.graph), _reduced(model.graph)
    readers, numbers, axes = dict[str, list[str]](), dict[str, Array](), dict[str, int]()
    for (value, axis), layers in uncrossed(graph).items():
        own = [
            each.output
            for each in layers
            if selected((each.layer,), step.layers, step.keep, graph.types)
            and choices.of_layers((each.layer,)).type != "float32"
        ]
        # OpenVINO 2026.4 multiplies what a reduction leaves by numbers of other channels.
        if own and value not in readers and value not in reduced:
            readers[value], axes[value] = own, axis
            numbers[value] = np.ones(graph.values[value].shape[axis], np.float32)
    if not readers:
        return model
    return replace(model, native=model.edit(Multiply(readers, numbers, axes)))


def smoothed(model: Model, strength: float, batches: Sequence[tuple[Array, ...]]) -> Model:
    """The same function with less uneven channels in the values that only layers with weights read (SmoothQuant).

    Parameters
    ----------
    strength : see `smoothing_scales`.
    batches : calibration inputs of the model.
    """
    every = crossings(model.graph)
    of_value = {each.value: each for each in every}
    largest = {each.value: np.zeros(each.channels) for each in every}

    def see(name: str, array: Array) -> None:
        np.maximum(largest[name], of_value[name].rows(np.abs(array)).max(axis=0), out=largest[name])

    if not every:
        return model
    model.adapter.observe(model.native, batches, list(largest), see)
    weights = model.parameters()
    scales = []
    for each in every:
        read = np.zeros(each.channels)
        for reader in each.readers:
            channel = reader.per_input(np.arange(each.channels))
            assert channel is not None
            read = np.maximum(read, _most(reader.matrix(weights[reader.weight]), channel, each.channels))
        scales.append((each, each.alike(smoothing_scales(largest[each.value], read, strength))))
    return divided(model, scales, "smooth")


def _reduced(graph: Graph) -> set[str]:
    """The values that reductions make, and what is computed of one of them element by element."""
    reduced, stored = set[str](), frozenset(graph.parameters)
    for node in graph.nodes:
        computed = [name for name in node.inputs if name is not None and name not in stored]
        if node.kind == "reduce" or (node.kind == "elementwise" and reduced.intersection(computed)):
            reduced.update(node.outputs)
    return reduced


def _numbers(crossing: Crossing, second: LayerMatrix) -> tuple[Array, Array, int]:
    """Which number each weight of the first layer makes, and each of the second reads, -1 for none; how many there
    are."""
    read = second.per_input(crossing.shares)
    assert crossing.made is not None and read is not None
    return crossing.made[:, :, None], read, int(crossing.shares.max(initial=-1)) + 1


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
