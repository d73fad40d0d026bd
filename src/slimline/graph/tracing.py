"""Which outputs of a layer the channels of a later value are, where only moves and products lie between.

Every position of the value is numbered by its channel, and the numbers are carried back, operator by operator, through
the equations that say how axes pass. What attention makes of a channel of its values has the number of that channel;
where heads share their values, several numbers meet in one channel, and become one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slimline.graph.equation import Dims
from slimline.graph.ir import Graph, Node
from slimline.graph.matrix import LayerMatrix

Array = np.ndarray[Any, np.dtype[Any]]

_MOVES = ("reshape", "permute", "expand")
_PARTS = ("split", "slice", "select")
_PLAIN = ("identity", "mul")  # of one value, `mul` by a number


@dataclass(frozen=True)
class Traced:
    """Where channels come from.

    Attributes
    ----------
    maker : the layer.
    shares : ``(channels,)``, channels with the same number come of the same outputs.
    made : ``(groups, outputs)`` of the layer, the number of each output; -1 for what has none.
    """

    maker: LayerMatrix
    shares: Array
    made: Array


class Tracer:
    """Looks for the makers of channels in one graph.

    Parameters
    ----------
    layers : by operator, those that can be makers.
    """

    def __init__(self, graph: Graph, layers: Mapping[str, LayerMatrix]) -> None:
        self.graph, self.layers = graph, layers
        self.makers, self.readers, self.stored = graph.producers(), graph.consumers(), set(graph.parameters)

    def trace(self, value: str, axes: Sequence[int]) -> Traced | None:
        """The layer that makes a value's channels, which lie along `axes` (ascending); None where there is none, or
        something else comes of them too."""
        shape = self.graph.values[value].shape
        lies = [n if d in axes else 1 for d, n in enumerate(shape)]
        merged = _Merged(math.prod(lies))
        labels = np.broadcast_to(np.arange(math.prod(lies)).reshape(lies), shape)
        seen: set[str] = set()
        while (node := self.makers.get(value)) is not None and value not in self.graph.outputs and value not in seen:
            seen.add(value)
            if not self._alone(value, labels):
                return None
            if node.name in self.layers:
                return self._made(self.layers[node.name], labels, merged)
            step = self._back(node, value, labels, merged)
            if step is None:
                return None
            value, labels = step
        return None

    def _made(self, maker: LayerMatrix, labels: Array, merged: _Merged) -> Traced | None:
        if not maker.one_to_one or maker.output not in self.graph.values:
            return None
        rows = maker.results(merged.of(labels))
        if not (rows == rows[:, :1]).all():
            return None
        shares, made = merged.shares(), rows[:, 0]
        known = np.unique(shares[shares >= 0])
        position = np.full(merged.count + 1, -1)
        position[known] = np.arange(len(known))
        return Traced(maker, position[shares], position[made])

    def _alone(self, value: str, labels: Array) -> bool:
        """Whether nothing reads what is numbered but the way that the numbers came."""
        readers = self.readers[value]
        if len(readers) == 1:
            return True
        if not all(node.kind in _PARTS for node in readers):
            return False
        times = np.sum([_region(node, labels.shape) for node in readers], axis=0)
        return bool((times[labels >= 0] == 1).all())

    def _back(self, node: Node, value: str, labels: Array, merged: _Merged) -> tuple[str, Array] | None:
        """The value before an operator, and its numbers."""
        if node.kind in _PARTS:
            source = str(node.inputs[0])
            whole = np.full(self.graph.values[source].shape, -1)
            whole[_index(node, node.outputs.index(value))] = labels
            return source, whole
        operand = self._operand(node, labels)
        if operand is None:
            return None
        source, equation = str(node.inputs[operand]), node.attributes["equation"]
        shape = self.graph.values[source].shape
        if node.kind == "reshape":
            return source, labels.reshape(shape)
        before = _carried(labels, equation.outputs[0], equation.inputs[operand], shape, equation.sizes, merged)
        return None if before is None else (source, before)

    def _operand(self, node: Node, labels: Array) -> int | None:
        """Which of an operator's inputs the numbers belong to."""
        computed = [k for k, name in enumerate(node.inputs) if name is not None and name not in self.stored]
        if node.kind in _MOVES and len(computed) == 1:
            return computed[0]
        if node.kind == "elementwise" and node.attributes["function"] in _PLAIN and len(node.inputs) == 1:
            return 0
        if node.kind == "attention":
            return 2
        if node.kind not in ("matmul", "einsum") or len(computed) != 2 or len(node.inputs) != 2:
            return None
        equation = node.attributes["equation"]
        varying = {
            name
            for d, dim in enumerate(equation.outputs[0])
            if not (labels == labels.take([0], axis=d)).all()
            for name in dim
        }
        own = [k for k in computed if varying <= {name for dim in equation.inputs[k] for name in dim}]
        return own[0] if len(own) == 1 else None


class _Merged:
    """Numbers of channels, of which some have become one."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.roots = np.arange(count + 1)  # the last is that of what has no number

    def of(self, labels: Array) -> Array:
        """The numbers that labels have become."""
        return np.asarray(np.where(labels < 0, self.count, self.roots[labels]))

    def shares(self) -> Array:
        """Of each channel; -1 where it goes with what has no number."""
        shares = self.of(np.arange(self.count))
        return np.where(shares == self.count, -1, shares)

    def unite(self, one: Array, other: Array) -> None:
        """Let numbers of one array be those of another of its shape; the largest stands for all."""
        while True:
            first, second = self.of(one), self.of(other)
            different = first != second
            if not different.any():
                return
            low, high = np.minimum(first, second)[different], np.maximum(first, second)[different]
            np.maximum.at(self.roots, low, high)
            while not np.array_equal(self.roots, self.roots[self.roots]):
                self.roots = self.roots[self.roots]


def _carried(
    labels: Array, outs: Dims, ins: Dims, shape: Sequence[int], known: Mapping[str, int], merged: _Merged
) -> Array | None:
    """The numbers of an operand of `shape`, by those of the output."""
    sizes = dict(known)
    for _ in range(2):
        for dims, lengths in ((outs, labels.shape), (ins, shape)):
            for dim, n in zip(dims, lengths, strict=True):
                unknown = [name for name in dim if name not in sizes]
                if len(unknown) == 1 and unknown[0] not in (".", "1", "*"):
                    sizes[unknown[0]] = n // math.prod(sizes[name] for name in dim if name in sizes)
    names: list[str] = []
    split: list[int] = []
    for d, dim in enumerate(outs):
        if dim == (".",) or (dim not in (("1",), ("*",)) and any(name not in sizes for name in dim)):
            return None
        single = dim in (("1",), ("*",))
        names += [f"{dim[0]}{d}"] if single else dim
        split += [labels.shape[d]] if single else [sizes[name] for name in dim]
    apart = labels.reshape(split)
    own = [name for dim in ins if dim != ("1",) for name in dim]
    if "." in own or "*" in own or any(name not in sizes for name in own) or len(set(own)) != len(own):
        return None
    for axis in range(len(names) - 1, -1, -1):
        if names[axis] not in own:
            first = apart.take([0], axis=axis)
            merged.unite(np.broadcast_to(first, apart.shape), apart)
            apart = first[(slice(None),) * axis + (0,)]
            names.pop(axis)
    held = [name for name in own if name in names]
    moved = apart.transpose([names.index(name) for name in held])
    spread = moved.reshape([sizes[name] if name in held else 1 for name in own])
    return np.broadcast_to(spread, [sizes[name] for name in own]).reshape(shape)


def _index(node: Node, output: int) -> tuple[Any, ...]:
    """Where an output of an operator that takes parts lies in its input."""
    attributes = node.attributes
    lead = (slice(None),) * attributes["axis"]
    if node.kind == "select":
        return (*lead, attributes["index"])
    if node.kind == "slice":
        return (*lead, slice(attributes["start"], attributes["stop"], attributes["step"]))
    start = sum(attributes["sizes"][:output])
    return (*lead, slice(start, start + attributes["sizes"][output]))


def _region(node: Node, shape: Sequence[int]) -> Array:
    """How often an operator that takes parts reads each position of its input."""
    times = np.zeros(shape, np.int64)
    for output in range(len(node.outputs)):
        times[_index(node, output)] += 1
    return times
