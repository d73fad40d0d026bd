"""ReLUs that stand in the way of even channels: those that clip at 6, and those that never clip.

Dividing the channels before a ReLU6 would clip each of them at another number, which no runtime fuses with the layer
before. Where the samples hardly reach the 6, the ReLU6 can be a ReLU instead. What a channel has at least on all
samples passes the ReLU as it is, and can be added behind the next layer instead; what is left takes less of a grid.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from slimline.graph.crossings import Crossing, crossings
from slimline.graph.edits import Compute, PutTensors
from slimline.graph.ir import Graph, Node
from slimline.graph.matrix import LayerMatrix, constant_slot
from slimline.model import Model

_log = logging.getLogger(__name__)
Array = np.ndarray[Any, np.dtype[Any]]
Batches = Sequence[tuple[Array, ...]]

_JUDGED = 256
"""Samples on which the outputs are compared."""


def unclipped(model: Model, tolerance: float, batches: Batches) -> Model:
    """`model` with ReLU in place of ReLU6 between layers whose channels can then be divided (Nagel et al. 2019,
    arXiv:1906.04721, replace all of them).

    Those go that clip the least, as many as leave the outputs where they were.

    Parameters
    ----------
    tolerance : squared change of the outputs on calibration samples that is borne, as part of their energy.
    batches : calibration inputs of the model.
    """
    clips = {str(node.inputs[0]): node for node in model.graph.nodes if _is(node, "relu6")}
    if not clips:
        return model
    between = _between(_with_relu(model, list(clips.values())).graph, set(clips))
    beyond = dict.fromkeys(between, 0.0)

    def see(name: str, array: Array) -> None:
        beyond[name] += float(np.square(np.maximum(array - 6, 0), dtype=np.float64).sum())

    if beyond:
        model.adapter.observe(model.native, batches, list(beyond), see)
    order = [clips[name] for name in sorted(beyond, key=lambda name: beyond[name])]
    judged = [tuple(x[: -(-_JUDGED // len(batches))] for x in batch) for batch in batches]
    truth = [model.outputs(*batch) for batch in judged]

    def change(count: int) -> float:
        other = _with_relu(model, order[:count])
        return _change(truth, [other.outputs(*batch) for batch in judged])

    counts = range(1, len(order) + 1)
    all_of_them = bool(order) and change(len(order)) <= tolerance
    most = len(order) if all_of_them else bisect_right(counts, tolerance, key=change)
    _log.info("%d of %d ReLU6 are ReLU", most, len(order))
    return _with_relu(model, order[:most]) if most else model


def clipping(graph: Graph) -> int:
    """How many ReLU6 there are."""
    return sum(_is(node, "relu6") for node in graph.nodes)


def absorbed(model: Model, batches: Batches) -> Model:
    """`model` with what channels have at least behind a ReLU added behind the layers that read them instead (high-bias
    absorption, Nagel et al. 2019, arXiv:1906.04721, who take it from batch norms).

    On all of the samples it answers the same. Layers that pad what they read with zeros are left alone.

    Parameters
    ----------
    batches : calibration inputs of the model.
    """
    absorbing = _Absorbing(model)
    every = [each for each in crossings(model.graph) if absorbing.can(each)]
    of_value = {each.value: each for each in every}
    least = {each.value: np.full(each.channels, np.inf) for each in every}

    def see(name: str, array: Array) -> None:
        np.minimum(least[name], of_value[name].rows(array).min(axis=0), out=least[name])

    if not every:
        return model
    model.adapter.observe(model.native, batches, list(least), see)
    for each in every:
        absorbing.move(each, least[each.value])
    stored = model.parameters()
    tensors = {name: array.astype(stored[name].dtype) for name, array in absorbing.tensors.items()}
    return replace(model, native=model.edit(PutTensors(tensors)))


class _Absorbing:
    """Constants of the channels before a ReLU, and where they can go.

    Attributes
    ----------
    tensors : that hold other numbers now.
    """

    def __init__(self, model: Model) -> None:
        self.graph, self.stored = model.graph, model.parameters()
        self.makers, self.readers = self.graph.producers(), self.graph.consumers()
        self.tensors: dict[str, Array] = {}

    def can(self, each: Crossing) -> bool:
        """Whether a constant of the channels can be taken from before the value, a ReLU, and given to its readers."""
        node = self.makers[each.value]
        return _is(node, "relu") and self._before(node, each) is not None and all(map(self._takes, each.readers))

    def move(self, each: Crossing, constant: Array) -> None:
        """Take the constant, ``(channels,)``, from the channels and give it to their readers."""
        name = self._before(self.makers[each.value], each)
        assert name is not None
        if each.maker is None:
            self._add(name, -constant.reshape(self.stored[name].shape))
        else:
            outputs = each.maker.per_output(constant)
            assert outputs is not None
            self._add(name, -each.maker.as_bias(outputs[:, :, 0], self.stored[name].shape))
        for reader in each.readers:
            (slot, negative), inputs = constant_slot(self.graph, reader, self.readers), reader.per_input(constant)
            assert slot is not None and inputs is not None
            lack = (np.asarray(reader.matrix(self.stored[reader.weight]), np.float64) * inputs).sum(axis=2)
            self._add(slot, reader.as_bias(-lack if negative else lack, self.stored[slot].shape))

    def _add(self, name: str, change: Array) -> None:
        self.tensors[name] = np.asarray(self.tensors.get(name, self.stored[name]), np.float64) + change

    def _before(self, node: Node, each: Crossing) -> str | None:
        """The bias of the layer, or the shift of the batch norm, that makes what the ReLU reads."""
        maker = self.makers.get(str(node.inputs[0]))
        if maker is not None and maker.kind == "batch_norm" and each.maker is None:
            name = maker.inputs[2]
        else:
            name = (
                None
                if each.maker is None or each.vectors or maker is None or maker.name != each.maker.node
                else (each.maker.bias)
            )
        return name if name is not None and len(self.readers[name]) == 1 else None

    def _takes(self, reader: LayerMatrix) -> bool:
        """Whether all of its outputs see every input, and it has where a constant goes."""
        slot, _ = constant_slot(self.graph, reader, self.readers)
        taken = slot is not None and reader.vector(np.zeros(self.graph.values[slot].shape)) is not None
        window = reader.window
        if window is None:
            return taken and reader.one_to_one
        padding = [] if isinstance(window.padding, str) else [n for ends in window.padding for n in ends]
        whole = not any(padding) if not isinstance(window.padding, str) else max(reader.kernel, default=1) == 1
        return taken and whole


def _is(node: Node, function: str) -> bool:
    return node.kind == "elementwise" and node.attributes["function"] == function and len(node.inputs) == 1


def _with_relu(model: Model, nodes: Sequence[Node]) -> Model:
    functions = {node.outputs[0]: ("relu", str(node.inputs[0])) for node in nodes}
    return replace(model, native=model.edit(Compute(functions)))


def _between(graph: Graph, sources: set[str]) -> list[str]:
    """Those of `sources` that a ReLU reads on the way from what makes a value to the one layer that reads it."""
    makers = graph.producers()
    passed = []
    for each in crossings(graph):
        name = each.value
        while (
            len(each.readers) == 1 and (node := makers.get(name)) is not None and node.kind in ("elementwise", "pool")
        ):
            computed = [x for x in node.inputs if x is not None and x not in graph.parameters]
            if len(computed) != 1:
                break
            name = computed[0]
            passed += [name] if name in sources else []
    return passed


def _change(before: Sequence[Sequence[Array]], after: Sequence[Sequence[Array]]) -> float:
    """Squared, of the output that changed most, as part of its energy."""
    changes = []
    for was, now in zip(zip(*before, strict=True), zip(*after, strict=True), strict=True):
        lost = sum(float(np.square(np.asarray(a, np.float64) - b).sum()) for a, b in zip(was, now, strict=True))
        changes.append(lost / max(sum(float(np.square(a, dtype=np.float64).sum()) for a in was), 1e-300))
    return max(changes, default=0.0)
