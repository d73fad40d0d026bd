"""Cuts: layers that read less of their input, by themselves: fewer input channels, or fewer positions of their kernel.

A unit takes a position from every layer that carries it. A cut takes it from one reader alone: a selection of channels
in front of the layer, or a smaller kernel with other padding, dilation or cropping. So it also serves where a unit
cannot go, such as along a residual stream; and what it computes is what zeros in the weight compute.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimline.graph.ir import Graph, Node
from slimline.graph.matrix import LayerMatrix, matrices
from slimline.methods import kernels
from slimline.methods.kernels import Window

Index = NDArray[np.int64]


@dataclass(frozen=True)
class Reader:
    """A layer whose input can be cut: the only operator that reads its weight, and it is trained.

    Attributes
    ----------
    layer : as a matrix.
    node : the operator.
    channel : dimension of the input that holds the channels, and of the weight; None where they cannot be selected
        (groups, several axes in one).
    kernel : dimensions of the weight that are the kernel.
    places : dimensions of the input over which the kernel moves.
    sizes : of these dimensions.
    rank : of the weight.
    """

    layer: LayerMatrix
    node: Node
    channel: tuple[int, int] | None
    kernel: tuple[int, ...]
    places: tuple[int, ...]
    sizes: tuple[int, ...]
    rank: int

    @property
    def channels(self) -> int:
        """Channels of a group that the layer reads."""
        return self.layer.shape[2] // math.prod(self.layer.kernel)

    @property
    def windows(self) -> list[Window]:
        """Kernels that its kernel can become, itself first: dilated ones where frameworks and runtimes take them, which
        is without a stride and in up to two dimensions."""
        window = self.layer.window
        dilated = window is not None and set(window.stride) == {1} and len(self.layer.kernel) < 3
        return kernels.windows(self.layer.kernel, dilated)


def readers(graph: Graph) -> tuple[Reader, ...]:
    """Every layer whose input can be cut, in graph order."""
    read = graph.consumers()
    nodes = {node.name: node for node in graph.nodes}
    result = []
    for layer in matrices(graph):
        alone = layer.weight in graph.trainable and len(read[layer.weight]) == 1 and layer.one_to_one
        if alone and "/" not in layer.node and layer.layer:
            result.append(_reader(graph, nodes[layer.node], layer))
    return tuple(result)


def _reader(graph: Graph, node: Node, layer: LayerMatrix) -> Reader:
    equation = node.attributes["equation"]
    inputs, weight = equation.inputs[:2]
    names = [name for name, _ in layer.inputs if not name.startswith(".")]
    channel = None
    if not layer.groups and len(names) == 1 and (names[0],) in inputs and (names[0],) in weight:
        channel = inputs.index((names[0],)), weight.index((names[0],))
    places = tuple(d for d, dim in enumerate(inputs) if dim == (".",)) if layer.kernel else ()
    return Reader(
        layer,
        node,
        channel,
        tuple(d for d, dim in enumerate(weight) if dim == (".",)),
        places,
        tuple(graph.values[layer.input].shape[d] for d in places),
        len(weight),
    )


@dataclass(frozen=True)
class Cut:
    """What stays of one layer's input.

    Attributes
    ----------
    reader : the layer.
    window : what stays of its kernel; None where all does.
    channels : positions that stay of its input channels, ascending; None where all do.
    error : the part of the layer's output that goes with it, where that was asked.
    """

    reader: Reader
    window: Window | None = None
    channels: tuple[int, ...] | None = None
    error: float | None = None

    @property
    def retained(self) -> tuple[Index | None, ...]:
        """Per dimension of the weight the positions that stay; None where all do."""
        indices: list[Index | None] = [None] * self.reader.rank
        if self.window is not None:
            for dim, index in zip(self.reader.kernel, kernels.along(self.window), strict=True):
                indices[dim] = index
        if self.channels is not None and self.reader.channel is not None:
            indices[self.reader.channel[1]] = np.array(self.channels)
        return tuple(indices)

    @property
    def selection(self) -> tuple[int, Index] | None:
        """Dimension of the input, and the positions that are read of it."""
        if self.channels is None or self.reader.channel is None:
            return None
        return self.reader.channel[0], np.array(self.channels)

    @property
    def dilation(self) -> tuple[int, ...]:
        """Of the new kernel, 1 along a single position."""
        assert self.window is not None and self.reader.layer.window is not None
        old = self.reader.layer.window.dilation
        return tuple(d * step if n > 1 else 1 for d, (_, n, step) in zip(old, self.window, strict=True))

    @property
    def zeros(self) -> tuple[tuple[int, int], ...]:
        """Zeros before and after each spatial dimension that give the places as before; negative ones crop."""
        assert self.window is not None and self.reader.layer.window is not None
        kernel, old = self.reader.layer.kernel, self.reader.layer.window
        around = old.zeros(self.reader.sizes, kernel)
        return tuple(
            (before - first * d, after - (size - 1 - first - (n - 1) * step) * d)
            for (before, after), size, d, (first, n, step) in zip(
                around, kernel, old.dilation, self.window, strict=True
            )
        )

    @property
    def remaining(self) -> float:
        """The part of the layer's weights that stays."""
        window = 1.0 if self.window is None else kernels.count(self.window) / math.prod(self.reader.layer.kernel)
        return window * (1.0 if self.channels is None else len(self.channels) / self.reader.channels)

    def summary(self) -> dict[str, Any]:
        """Ready for JSON."""
        record: dict[str, Any] = {"layer": self.reader.layer.layer, "node": self.reader.node.name}
        if self.window is not None:
            record |= {"kernel": list(self.reader.layer.kernel), "window": [list(side) for side in self.window]}
        if self.channels is not None:
            gone = sorted(set(range(self.reader.channels)) - set(self.channels))
            record |= {"channels": self.reader.channels, "removed": gone}
        return record | ({} if self.error is None else {"error": self.error})

    def __str__(self) -> str:
        parts = []
        if self.window is not None:
            before = "x".join(map(str, self.reader.layer.kernel))
            after = "x".join(str(n) for _, n, _ in self.window)
            apart = "" if all(step == 1 for *_, step in self.window) else ", dilated"
            parts.append(f"kernel {before} -> {after}{apart}")
        if self.channels is not None:
            parts.append(f"input channels {self.reader.channels} -> {len(self.channels)}")
        error = "" if self.error is None else f", error {self.error:.3g}"
        return f"{self.reader.layer.layer}: {', '.join(parts)}{error}"
