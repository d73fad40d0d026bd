"""Layers that a network has not yet, in no framework's words: what `slimline.graph.edits.Replace` puts in."""

from __future__ import annotations

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


Operator = Linear | Convolution | Table | Rectifier | Mean
