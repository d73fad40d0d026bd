"""Residual streams that can be rotated: sums of layers' outputs that RMS norms alone read, in front of layers.

An RMS norm divides by a length, which a rotation does not change. Once its scale is part of the layers behind it, the
whole stream can be rotated where it is written and back where it is read (QuaRot, Ashkboos et al. 2024,
arXiv:2404.00456).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slimline.graph.ir import Graph, Node
from slimline.graph.matrix import LayerMatrix, matrices

Array = np.ndarray[Any, np.dtype[Any]]

_SQUARES, _ROOTS = ("pow", "square"), ("add", "sqrt", "rsqrt", "reciprocal")


@dataclass
class Stream:
    """What is stored of a stream.

    Attributes
    ----------
    width : its channels.
    writers : layers whose outputs are added to it.
    tables : stored tensors that are, or whose rows are: embeddings and positions.
    readers : layers behind its norms, each with the norm's scale, if it has one.
    """

    width: int
    writers: list[LayerMatrix] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    readers: list[tuple[LayerMatrix, str | None]] = field(default_factory=list)

    @property
    def parameters(self) -> set[str]:
        """All that `rotate` changes."""
        biases = {writer.bias for writer in self.writers if writer.bias is not None}
        scales = {scale for _, scale in self.readers if scale is not None}
        weights = {layer.weight for layer in (*self.writers, *(reader for reader, _ in self.readers))}
        return weights | biases | scales | set(self.tables)

    def rotate(self, tensors: dict[str, Array], rotation: Array) -> None:
        """Rotate the stream by an orthogonal matrix ``(width, width)``, in place."""
        for name in self.tables:
            tensors[name] = tensors[name] @ rotation
        for reader, scale in self.readers:
            matrix, shape = reader.matrix(tensors[reader.weight]), tensors[reader.weight].shape
            own = 1.0 if scale is None else tensors[scale].reshape(-1)
            tensors[reader.weight] = reader.tensor((matrix * own) @ rotation, shape)
        for scale in {scale for _, scale in self.readers if scale is not None}:
            tensors[scale] = np.ones_like(tensors[scale])
        for writer in self.writers:
            matrix, shape = writer.matrix(tensors[writer.weight]), tensors[writer.weight].shape
            tensors[writer.weight] = writer.tensor(rotation.T @ matrix, shape)
            if writer.bias is not None:
                vector = writer.vector(tensors[writer.bias])
                assert vector is not None
                tensors[writer.bias] = writer.as_bias(vector @ rotation, tensors[writer.bias].shape)


class Unrotatable(Exception):
    """Why a stream cannot be rotated, in words that follow "since"."""


@dataclass(frozen=True)
class _Norm:
    """One that reads `value` by the operators `inside`, and what it makes."""

    value: str
    output: str
    scale: str | None
    inside: frozenset[str]


def streams(graph: Graph) -> tuple[list[Stream], list[str]]:
    """All that can be rotated, and why others cannot."""
    search = _Search(graph)
    every: list[Stream] = []
    reasons: list[str] = []
    seen: set[str] = set()
    for value in search.norms:
        if value in seen:
            continue
        try:
            stream, values = search.stream(value)
            every.append(stream)
            seen |= values
        except Unrotatable as reason:
            reasons.append(str(reason))
    return every, list(dict.fromkeys(reasons))


class _Search:
    def __init__(self, graph: Graph) -> None:
        self.graph, self.makers, self.readers = graph, graph.producers(), graph.consumers()
        self.stored = set(graph.parameters)
        self.layers = {layer.node: layer for layer in matrices(graph)}
        self.norms: dict[str, list[_Norm]] = {}
        for node in graph.nodes:
            norm = self._norm(node)
            if norm is not None:
                self.norms.setdefault(norm.value, []).append(norm)

    def stream(self, start: str) -> tuple[Stream, set[str]]:
        """The stream that a value belongs to, and its values.

        Raises
        ------
        Unrotatable : something else reads or makes a part of it.
        """
        width = self.graph.values[start].shape[-1]
        stream, values, pending = Stream(width), set[str](), [start]
        while pending:
            value = pending.pop()
            if value in values:
                continue
            values.add(value)
            if value in self.graph.outputs or self.graph.values[value].shape[-1] != width:
                raise Unrotatable(f"{value} is an output of the model, or of another width")
            pending += self._before(value, stream)
            pending += self._behind(value, stream)
        self._check(stream)
        return stream, values

    def _before(self, value: str, stream: Stream) -> list[str]:
        node = self.makers.get(value)
        if node is None:
            raise Unrotatable(f"the model's input {value} is a part of it")
        if node.name in self.layers:
            stream.writers.append(self._whole(self.layers[node.name], self.layers[node.name].output_axes))
            return []
        if node.kind == "embedding":
            stream.tables.append(str(node.inputs[1]))
            return []
        if not self._passes(node):
            raise Unrotatable(f"{node.label} makes a part of it")
        held = [str(name) for name in node.inputs if name in self.stored]
        if any(self.graph.values[name].shape[-1:] != (stream.width,) for name in held):
            raise Unrotatable(f"{node.label} adds a number to it")
        stream.tables += held
        return [str(name) for name in node.inputs if name not in self.stored]

    def _behind(self, value: str, stream: Stream) -> list[str]:
        norms = self.norms.get(value, [])
        inside = frozenset().union(*(norm.inside for norm in norms)) if norms else frozenset()
        for norm in norms:
            for node in self.readers[norm.output]:
                layer = self.layers.get(node.name)
                if layer is None or layer.input != norm.output or norm.output in self.graph.outputs:
                    raise Unrotatable(f"{node.label} reads what a norm of it makes")
                stream.readers.append((self._whole(layer, layer.channel_axes), norm.scale))
        others = [node for node in self.readers[value] if node.name not in inside]
        for node in others:
            if not self._passes(node):
                raise Unrotatable(f"{node.label} reads it")
        return [node.outputs[0] for node in others]

    def _whole(self, layer: LayerMatrix, axes: tuple[int, ...] | None) -> LayerMatrix:
        """A layer whose channels are the last dimension."""
        rank = len(self.graph.values[layer.input].shape)
        if axes != (rank - 1,) or layer.kernel or layer.groups or not layer.one_to_one:
            raise Unrotatable(f"{layer.layer} is not one matrix")
        return layer

    def _passes(self, node: Node) -> bool:
        """Whether what an operator gives is its inputs, added up."""
        if node.kind != "elementwise":
            return False
        function, rank = node.attributes["function"], len(self.graph.values[node.outputs[0]].shape)
        alike = all(len(self.graph.values[n].shape) == rank for n in node.inputs if n not in self.stored and n)
        return alike and ((function == "add" and len(node.inputs) == 2) or (function == "identity"))

    def _check(self, stream: Stream) -> None:
        """All tensors belong to the stream alone, in one role."""
        roles = [w.weight for w in stream.writers] + [r.weight for r, _ in stream.readers]
        roles += [w.bias for w in stream.writers if w.bias is not None] + list(dict.fromkeys(stream.tables))
        for name in roles:
            if roles.count(name) > 1 or len(self.readers[name]) != 1:
                raise Unrotatable(f"{name} is read by several operators")
        for writer in stream.writers:
            if writer.bias is not None and writer.vector(np.zeros(self.graph.values[writer.bias].shape)) is None:
                raise Unrotatable(f"the bias of {writer.layer} is not one number for each output")
        values = {reader.input for reader, _ in stream.readers}
        for scale in {scale for _, scale in stream.readers if scale is not None}:
            owners = {n.output for norms in self.norms.values() for n in norms if n.scale == scale}
            if len(self.readers[scale]) != len(owners) or not owners <= values:
                raise Unrotatable(f"{scale} scales something else too")

    def _norm(self, node: Node) -> _Norm | None:
        """The RMS norm whose last operator a node is; written out, that is the product with what is not its scale."""
        if node.kind == "layer_norm" and node.attributes["norm"] == "rms":
            value, scale, shift = (*node.inputs, None, None)[:3]
            last = self.graph.values[str(value)].shape[-1] if value is not None else 0
            plain = shift is None and (scale is None or math.prod(self.graph.values[scale].shape) == last)
            return _Norm(str(value), node.outputs[0], scale, frozenset({node.name})) if plain else None
        if node.kind != "elementwise" or node.attributes["function"] != "mul" or len(node.inputs) != 2:
            return None
        for value, length in (node.inputs, node.inputs[::-1]):
            inside = None if value is None or length is None else self._length(length, value)
            if value is not None and inside is not None:
                output, scale, more = self._scaled(node)
                return _Norm(value, output, scale, inside | {node.name} | more)
        return None

    def _length(self, value: str, of: str) -> frozenset[str] | None:
        """The operators that make of a value one over its root mean square."""
        inside: list[str] = []
        means = 0
        while value != of:
            node = self.makers.get(value)
            if node is None or len(self.readers[value]) != 1 or len(node.inputs) != 1 or value in self.graph.outputs:
                return None
            function = node.attributes.get("function")
            rank = len(self.graph.values[str(node.inputs[0])].shape)
            mean = node.kind in ("reduce", "pool") and function == "mean"
            if mean and self.graph.values[value].shape[-1] != 1:
                return None
            if not mean and (node.kind != "elementwise" or function not in (*_SQUARES, *_ROOTS) or rank < 2):
                return None
            means += mean
            inside.append(node.name)
            value = str(node.inputs[0])
        return frozenset(inside) if means == 1 else None

    def _scaled(self, node: Node) -> tuple[str, str | None, frozenset[str]]:
        """What a norm gives, and its scale."""
        value = node.outputs[0]
        readers = self.readers[value]
        if len(readers) == 1 and readers[0].kind == "elementwise" and readers[0].attributes["function"] == "mul":
            held = [name for name in readers[0].inputs if name in self.stored]
            if len(held) == 1 and self.graph.values[held[0]].shape == self.graph.values[value].shape[-1:]:
                return readers[0].outputs[0], held[0], frozenset({readers[0].name})
        return value, None, frozenset()
