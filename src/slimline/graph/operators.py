"""Layers that a network has not yet, in no framework's words: what `slimline.graph.edits.Replace` puts in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from slimline.graph.equation import Window

Array = NDArray[Any]


@dataclass(frozen=True)
class Linear:
    """``y = x Wᵀ + b`` on the last dimension.

    Attributes
    ----------
    weight : ``(outputs, inputs)``.
    bias : ``(outputs,)``, or None.
    """

    weight: Array
    bias: Array | None = None

    @property
    def outputs(self) -> int:
        """How many."""
        return int(self.weight.shape[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its weight."""
        return tuple(self.weight.shape)


@dataclass(frozen=True)
class Convolution:
    """Convolution over the dimensions behind the channels, wherever a framework has them.

    Attributes
    ----------
    weight : ``(outputs, inputs / groups, *kernel)``.
    bias : ``(outputs,)``, or None.
    window : stride, dilation and padding; None for a kernel of ones that looks at every position alone.
    groups : into which inputs and outputs are split.
    """

    weight: Array
    bias: Array | None = None
    window: Window | None = None
    groups: int = 1

    @property
    def outputs(self) -> int:
        """How many channels."""
        return int(self.weight.shape[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its weight."""
        return tuple(self.weight.shape)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Its sizes."""
        return tuple(int(n) for n in self.weight.shape[2:])

    @property
    def looks(self) -> Window:
        """`window`, in full."""
        rank = len(self.kernel)
        return self.window or Window((1,) * rank, (1,) * rank, ((0, 0),) * rank)


@dataclass(frozen=True)
class Table:
    """Rows, looked up by whole numbers of any shape: they are the last dimension of what comes out.

    Attributes
    ----------
    weight : ``(rows, width)``.
    """

    weight: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its weight."""
        return tuple(self.weight.shape)


@dataclass(frozen=True)
class Einsum:
    """A product with a weight, as `numpy.einsum` spells it.

    Attributes
    ----------
    equation : such as ``abc,cde->abde``: what is read, the weight, what comes out; `a` is the batch.
    weight : of its letters.
    bias : of the letters `bias_axes`, in this order a part of those of what comes out; or None.
    """

    equation: str
    weight: Array
    bias: Array | None = None
    bias_axes: str = ""

    @property
    def made(self) -> str:
        """The letters of what comes out."""
        return self.equation.partition("->")[2]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its weight."""
        return tuple(self.weight.shape)

    def sizes(self, read: Sequence[int | None]) -> tuple[int | None, ...]:
        """Of the dimensions of what comes out, from those of what is `read`."""
        left, _, _ = self.equation.partition("->")
        operand, weight = left.split(",")
        known = dict(zip(operand, read, strict=True)) | dict(zip(weight, self.weight.shape, strict=True))
        return tuple(known[letter] for letter in self.made)


@dataclass(frozen=True)
class Rectifier:
    """``max(x, 0)`` of every number."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its weight, which it has not."""
        return ()


@dataclass(frozen=True)
class Mean:
    """The mean over all places of a map: of its dimensions but the batch and the channels, which are gone then.

    Attributes
    ----------
    places : how many dimensions, 1 to 3.
    """

    places: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its weight, which it has not."""
        return ()


Operator = Linear | Convolution | Einsum | Table | Rectifier | Mean
