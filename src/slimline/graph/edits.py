"""Edits: what can be done to a network, as data over the names of its graph. Adapters carry them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from slimline.basics.errors import SlimlineError, first_line
from slimline.graph.cuts import Cut
from slimline.graph.operators import Operator
from slimline.graph.quantization import Quantization
from slimline.graph.removal import Removal

Array = NDArray[Any]


@dataclass(frozen=True)
class Resize:
    """Positions really go: parameters are sliced, and shape constants that count them rewritten."""

    removal: Removal


@dataclass(frozen=True)
class Mask:
    """The same shapes, but what `Resize` would remove is zero, and left out of every statistic."""

    removal: Removal


@dataclass(frozen=True)
class Narrow:
    """Layers read only what their cuts leave of their input; all names stay."""

    cuts: Sequence[Cut]


@dataclass(frozen=True)
class Rewire:
    """Readers of a value (key) read another of its shape (value) instead; what no output needs any more is gone."""

    instead: Mapping[str, str]


@dataclass(frozen=True)
class Silence:
    """These activations are zero."""

    values: Sequence[str]


@dataclass(frozen=True)
class Threshold:
    """Of these activations all that is not above the number is zero (FATReLU, Kurtz et al. 2020, PMLR 119)."""

    thresholds: Mapping[str, float]


@dataclass(frozen=True)
class Subtract:
    """Layers read their input less numbers of their own, which train as biases do.

    Attributes
    ----------
    numbers : by the value that a layer makes, what it reads first, and the numbers, of one dimension: one for each
        position of one dimension of that, or a single one.
    axes : by the same value that dimension; those left out have single numbers.
    """

    numbers: Mapping[str, tuple[str, Array]]
    axes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Multiply:
    """Layers read a value times numbers of its channels, one product for all of them; the numbers train as biases do.

    Attributes
    ----------
    readers : by the value, what the layers make that read the product instead; whatever else reads the value still
        does.
    numbers : by the value one for each position of one of its dimensions, ``(channels,)``.
    axes : by the value that dimension.
    """

    readers: Mapping[str, Sequence[str]]
    numbers: Mapping[str, Array]
    axes: Mapping[str, int]


@dataclass(frozen=True)
class Compute:
    """Values are another function of one value now, and what only served to make them is gone.

    Attributes
    ----------
    functions : by value the function (of `slimline.methods.activations.FUNCTIONS`), and the value of the same shape
        that it is applied to.
    """

    functions: Mapping[str, tuple[str, str]]


@dataclass(frozen=True)
class PutTensors:
    """Stored tensors, of the same shapes, in place of those of these names."""

    tensors: Mapping[str, Array]


@dataclass(frozen=True)
class Tie:
    """Readers of a stored tensor (key) read another of its shape and type (value), which learns for all of them; the
    first is gone. Of a layer all weights go, for those of one layer of the same settings."""

    instead: Mapping[str, str]


@dataclass(frozen=True)
class PoolInput:
    """Readers of an image, an input of the model, read it with height and width divided by a number: means of squares
    of places, without overlap. The framework's own layout says which dimensions these are.

    Attributes
    ----------
    input : of four dimensions, height and width multiples of `factor`.
    """

    input: str
    factor: int

    def misfit(self, reason: BaseException) -> SlimlineError:
        """The error of a model that does not run on the smaller image."""
        return SlimlineError(
            f"The model does not run on images of 1/{self.factor} of height and width, as it fixes their size "
            f"({first_line(reason)}): leave resolution out."
        )


@dataclass(frozen=True)
class Replace:
    """A layer gives way to operators, one behind the other.

    Attributes
    ----------
    layer : the user's name of it; its parts are called ``layer.0``, ``layer.1`` ….
    input : the value that the first of them reads.
    output : the value that the layer made, which the last makes now, of the same shape.
    operators : in the order in which they run.
    """

    layer: str
    input: str
    output: str
    operators: Sequence[Operator]

    def misfit(self) -> SlimlineError:
        """The error of operators that do not take what the one before gives."""
        shapes = " and ".join(str(operator.shape) for operator in self.operators if operator.shape)
        return SlimlineError(
            f"What is to replace {self.layer} does not fit together or what it reads, with weights {shapes}: make each "
            "operator take what the one before gives."
        )

    def check_shape(self, before: tuple[int | None, ...], after: tuple[int | None, ...]) -> None:
        """Refuse operators that give another shape than the layer did: what reads it might broadcast in silence. A
        size that is not known fits any."""
        if len(before) != len(after) or any(None not in (b, a) and b != a for b, a in zip(before, after, strict=True)):
            raise SlimlineError(
                f"What is to replace {self.layer} gives {after} where the layer gave {before}: make its last operator "
                "give the same."
            )


@dataclass(frozen=True)
class Project:
    """A recurrent layer reads its input times a matrix, by weights of as many columns.

    Attributes
    ----------
    layer : the user's name of it; what makes the product is a linear layer called ``layer.0``.
    weight : of that, ``(rank, inputs)``.
    kernels : all weights by which the layer reads its input, by name; `rank` takes the place of the inputs in their
        shapes.
    """

    layer: str
    weight: Array
    kernels: Mapping[str, Array]


@dataclass(frozen=True)
class Extract:
    """Nothing is left but what computes some activations from others, as in inference: norms keep their statistics,
    and nothing is dropped. Names stay.

    Attributes
    ----------
    inputs : activations whose first dimension is the batch, which are its inputs.
    outputs : activations, which are its outputs, called by these names.
    """

    inputs: Sequence[str]
    outputs: Sequence[str]


@dataclass(frozen=True)
class FoldNorms:
    """Batch norms are folded into the convolutions before them where the runtime wants that."""


@dataclass(frozen=True)
class Round:
    """Weights and activations are rounded to their formats, as the artifact will.

    Attributes
    ----------
    composed : what the runtime computes in integers by other operators, see `slimline.graph.placement.Policy`.
    """

    quantization: Quantization
    composed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class LearnRounding:
    """As `Round`, but what formats are made of are weights that training moves: scales and, of affine grids with their
    zero inside, zero points. For training only: `Adapter.learned` reads the formats.

    Attributes
    ----------
    shared : by activation a name under which it shares its format with others; those left out have their own.
    fixed : activations and weights whose format stays as it is.
    delayed : activations that stay as they are until the loop that trains the model lets their rounding begin; only
        where `Adapter.delays_formats`.
    clipped : activations of whose scale only the end of the grid is learned, from what lies beyond it.
    skewed : weights on levels, of which those below zero learn a factor of their own (`methods.levels.skewed`).
    softened : by weight on an integer grid, which then stays as it is, how strong the penalty is that drives each of
        its numbers to the code below or above, between which it moves (`methods.adaround`); `Adapter.softened` reads
        them.
    turns : passes of training over which that penalty becomes steep.
    drop : part of an activation's numbers, drawn anew each time, that stay as they are while the model trains.
    """

    quantization: Quantization
    shared: Mapping[str, str] = field(default_factory=dict)
    fixed: frozenset[str] = frozenset()
    delayed: frozenset[str] = frozenset()
    clipped: frozenset[str] = frozenset()
    skewed: frozenset[str] = frozenset()
    softened: Mapping[str, float] = field(default_factory=dict)
    turns: int = 0
    drop: float = 0.0


@dataclass(frozen=True)
class Unround:
    """What `Round` put there for these formats is gone again."""

    quantization: Quantization


Edit = (
    Resize
    | Mask
    | Narrow
    | Replace
    | Project
    | Rewire
    | Silence
    | Threshold
    | Subtract
    | Multiply
    | Compute
    | PutTensors
    | Tie
    | PoolInput
    | Extract
    | FoldNorms
    | Round
    | LearnRounding
    | Unround
)

__all__ = [
    "Compute",
    "Edit",
    "Extract",
    "FoldNorms",
    "LearnRounding",
    "Mask",
    "Multiply",
    "Narrow",
    "PoolInput",
    "Project",
    "PutTensors",
    "Replace",
    "Resize",
    "Rewire",
    "Round",
    "Silence",
    "Subtract",
    "Threshold",
    "Tie",
    "Unround",
]
