"""Where the channels of a value can be divided as it is made and multiplied back as it is read, without a change of the
answers: what equalisation, SmoothQuant and AWQ have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from slimline.graph.ir import Graph, Node
from slimline.graph.matrix import LayerMatrix, matrices
from slimline.graph.tracing import Tracer

Array = np.ndarray[Any, np.dtype[Any]]

_HOMOGENEOUS = ("relu", "leaky_relu", "prelu", "identity")  # f(s x) = s f(x) for positive s
_NORMS = ("layer_norm", "batch_norm")


@dataclass(frozen=True)
class Crossing:
    """A value that only layers with weights read, and what scales its channels.

    Attributes
    ----------
    value : its name.
    axes : its dimensions that hold the channels.
    vectors : stored vectors, one number a channel, that are divided: scale and shift of a norm.
    maker : the layer whose outputs are divided; None where `vectors` are enough.
    readers : the layers whose inputs are multiplied.
    shares : ``(channels,)``, channels with the same number are divided alike; those with -1 are not divided.
    made : ``(groups, outputs)`` of the maker, the number of each output; -1 for one that no channel comes of.
    """

    value: str
    axes: tuple[int, ...]
    vectors: tuple[str, ...]
    maker: LayerMatrix | None
    readers: tuple[LayerMatrix, ...]
    shares: Array
    made: Array | None

    @property
    def channels(self) -> int:
        """How many there are."""
        return len(self.shares)

    @property
    def parameters(self) -> tuple[str, ...]:
        """All that `divide` changes."""
        maker = () if self.maker is None else (self.maker.weight, self.maker.bias)
        return (*self.vectors, *(name for name in maker if name is not None), *(r.weight for r in self.readers))

    def rows(self, array: Array) -> Array:
        """The value, an activation, as ``(rows, channels)``."""
        return np.moveaxis(array, self.axes, range(-len(self.axes), 0)).reshape(-1, self.channels)

    def alike(self, by: Array) -> Array:
        """Positive numbers ``(channels,)``: those that have to be the same are their geometric mean, and those of
        channels that cannot be divided 1."""
        held = self.shares >= 0
        count = np.bincount(self.shares[held], minlength=1)
        mean = np.exp(np.bincount(self.shares[held], np.log(by[held]), len(count)) / count.clip(1))
        return np.where(held, mean[self.shares], 1.0)

    def divide(self, tensors: dict[str, Array], by: Array) -> None:
        """Divide the channels of the value by positive numbers ``(channels,)``, `alike`, and multiply them back, in
        place."""
        for name in self.vectors:
            tensors[name] = tensors[name] / by.reshape(tensors[name].shape)
        if (maker := self.maker) is not None:
            assert self.made is not None
            each = np.ones(self.shares.max(initial=-1) + 2)  # the last is that of -1
            each[self.shares] = by
            each[-1] = 1.0
            outputs = 1 / each[self.made]
            tensors[maker.weight] = _times(maker, tensors[maker.weight], outputs[:, :, None])
            if maker.bias is not None:
                vector = maker.vector(tensors[maker.bias])
                assert vector is not None
                tensors[maker.bias] = maker.as_bias(vector * outputs, tensors[maker.bias].shape)
        for reader in self.readers:
            inputs = reader.per_input(by)
            assert inputs is not None
            tensors[reader.weight] = _times(reader, tensors[reader.weight], inputs)


def crossings(graph: Graph) -> list[Crossing]:
    """All of a graph, in the order of the values; a value that is also an output, or added to another, is none."""
    return _Search(graph).all()


def uncrossed(graph: Graph) -> dict[tuple[str, int], list[LayerMatrix]]:
    """What linear layers read of values that are no crossing: by the value and its one dimension of channels the
    layers. A product put between them (`slimline.graph.edits.Multiply`) makes one of it."""
    crossed, readers = {each.value for each in crossings(graph)}, graph.consumers()
    read: dict[tuple[str, int], list[LayerMatrix]] = {}
    for layer in matrices(graph):
        axes = layer.channel_axes
        if layer.kernel or layer.input in crossed or layer.node in graph.idle or axes is None or len(axes) != 1:
            continue
        if len(readers[layer.weight]) == 1 and layer.weight not in graph.outputs:
            read.setdefault((layer.input, axes[0]), []).append(layer)
    return read


def _times(layer: LayerMatrix, weight: Array, factors: Array) -> Array:
    return layer.tensor(layer.matrix(weight) * factors, weight.shape)


class _Search:
    def __init__(self, graph: Graph) -> None:
        self.graph, self.readers, self.makers = graph, graph.consumers(), graph.producers()
        self.stored = set(graph.parameters)
        self.layers = {layer.node: layer for layer in matrices(graph)}
        self.tracer = Tracer(graph, self.layers)

    def all(self) -> list[Crossing]:
        every = []
        for value in dict.fromkeys(layer.input for layer in self.layers.values()):
            readers = tuple(self.layers[n.name] for n in self.readers[value] if n.name in self.layers)
            lie = {reader.channel_axes for reader in readers}
            if value in self.graph.outputs or len(readers) != len(self.readers[value]) or len(lie) != 1:
                continue
            axes = lie.pop()
            own = all(reader.input == value and self._alone(reader.weight) for reader in readers)
            if axes is None or not own or len({reader.weight for reader in readers}) != len(readers):
                continue
            channels = math.prod(self.graph.values[value].shape[axis] for axis in axes)
            if any(reader.per_input(np.ones(channels)) is None for reader in readers):
                continue
            crossing = self._crossing(value, axes, channels, readers)
            every += [] if crossing is None else [crossing]
        return every

    def _crossing(
        self, value: str, axes: tuple[int, ...], channels: int, readers: tuple[LayerMatrix, ...]
    ) -> Crossing | None:
        source = self._source(value, axes[0], channels) if len(axes) == 1 else None
        if source is not None:
            vectors, maker = source
            made = None if maker is None else maker.per_output(np.arange(channels))
            return Crossing(
                value, axes, vectors, maker, readers, np.arange(channels), None if made is None else made[:, :, 0]
            )
        traced = self.tracer.trace(value, axes)
        if traced is None or not self._scales(traced.maker) or (traced.shares < 0).all():
            return None
        return Crossing(value, axes, (), traced.maker, readers, traced.shares, traced.made)

    def _source(self, value: str, axis: int, channels: int) -> tuple[tuple[str, ...], LayerMatrix | None] | None:
        """The vectors, or the layer, that scale the channels of a value."""
        node = self.makers.get(value)
        if node is None or len(node.outputs) != 1:
            return None
        if node.name in self.layers:
            layer = self.layers[node.name]
            return ((), layer) if self._divisible(layer, axis, channels) else None
        if node.kind in _NORMS:
            slots = [k for k, name in enumerate(node.inputs[1:3], 1) if name is not None]
            sound = 1 in slots and all(self._is_vector(node, k, axis, channels) for k in slots)
            return (tuple(str(node.inputs[k]) for k in slots), None) if sound else None
        return self._passed(node, axis, channels)

    def _passed(self, node: Node, axis: int, channels: int) -> tuple[tuple[str, ...], LayerMatrix | None] | None:
        """Of what is computed element by element."""
        function = node.attributes.get("function")
        held = [k for k, name in enumerate(node.inputs) if name in self.stored]
        computed = [k for k, name in enumerate(node.inputs) if name is not None and k not in held]
        bends = node.kind == "elementwise" and function in _HOMOGENEOUS
        if (bends or (node.kind == "pool" and function in ("max", "mean"))) and len(computed) == 1:
            return self._before(node, computed[0], axis, channels)
        if node.kind != "elementwise" or len(node.inputs) != 2:
            return None
        if function == "mul" and len(held) == 1 and self._is_vector(node, held[0], axis, channels):
            return (str(node.inputs[held[0]]),), None
        if function == "mul" and not held:
            ways = (self._before(node, k, axis, channels) for k in computed)
            return next((way for way in ways if way is not None), None)
        if function == "add" and len(held) == 1 and self._is_vector(node, held[0], axis, channels):
            way = self._before(node, computed[0], axis, channels)
            return None if way is None else ((*way[0], str(node.inputs[held[0]])), way[1])
        return None

    def _before(
        self, node: Node, operand: int, axis: int, channels: int
    ) -> tuple[tuple[str, ...], LayerMatrix | None] | None:
        value, equation = str(node.inputs[operand]), node.attributes["equation"]
        if value in self.graph.outputs or len(self.readers[value]) != 1:
            return None
        same = len(equation.inputs[operand]) == len(equation.outputs[0])
        if not same or equation.inputs[operand][axis] != equation.outputs[0][axis]:
            return None
        return self._source(value, axis, channels)

    def _divisible(self, layer: LayerMatrix, axis: int, channels: int) -> bool:
        """Whether a layer's outputs can be divided one by one."""
        outputs = math.prod(layer.shape[:2])
        every = layer.one_to_one and outputs == channels and layer.per_output(np.ones(channels)) is not None
        return every and layer.output_axes == (axis,) and self._scales(layer)

    def _scales(self, layer: LayerMatrix) -> bool:
        """Whether a layer's weight and bias are its own, and have a number for each output."""
        held = [layer.weight, *([] if layer.bias is None else [layer.bias])]
        biased = layer.bias is None or layer.vector(np.zeros(self.graph.values[layer.bias].shape)) is not None
        return biased and all(map(self._alone, held))

    def _is_vector(self, node: Node, operand: int, axis: int, channels: int) -> bool:
        """Whether an operand is stored for this operator alone, a number for each channel."""
        name, equation = node.inputs[operand], node.attributes["equation"]
        lies = [dim for dim in equation.inputs[operand] if dim != ("1",)] == [equation.outputs[0][axis]]
        return lies and name in self.stored and self._alone(name) and self._size(str(name)) == channels

    def _alone(self, name: str | None) -> bool:
        return name is not None and len(self.readers[name]) == 1

    def _size(self, name: str) -> int:
        return math.prod(self.graph.values[name].shape)
