"""What the networks of the zoo are made of, as data: layers, and two ways to put blocks together.

A network is a tree. Its leaves are layers, which say their sizes; `Serial` and `Parallel` name their parts, and the
names on the way to a layer are the layer's name: ``blocks.3.body.depthwise.conv``. Frameworks build modules of it and
call its layers alike, so that weights fit by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

Function: TypeAlias = Literal["relu", "relu6", "hard_swish", "hard_sigmoid", "gelu", "tanh"]

DEVIATION = 0.02
"""Standard deviation of tables of vectors before training."""
MASKED = -1e4
"""What is added to the score of a padded position, so that attention leaves it out; float16 can hold it."""


@dataclass(frozen=True)
class Identity:
    """What comes in."""


@dataclass(frozen=True)
class Conv:
    """A convolution over images, padded by zeros on all sides.

    Attributes
    ----------
    inputs, outputs : channels.
    kernel, stride : of both dimensions.
    groups : of channels; as many as there are channels make it depthwise.
    bias : whether it adds one; False where a norm follows.
    padding : places on each side; None for half a kernel, which with stride 1 leaves the size as it is.
    """

    inputs: int
    outputs: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    bias: bool = False
    padding: int | None = None

    @property
    def pad(self) -> int:
        """Places on each side."""
        return (self.kernel - 1) // 2 if self.padding is None else self.padding

    @property
    def depthwise(self) -> bool:
        """Whether each channel is convolved by itself."""
        return 1 < self.groups == self.inputs == self.outputs


@dataclass(frozen=True)
class BatchNorm:
    """Batch normalisation of images; a step moves its statistics by `momentum`."""

    width: int
    epsilon: float = 1e-5
    momentum: float = 0.1


@dataclass(frozen=True)
class LayerNorm:
    """Layer normalisation over the last dimension."""

    width: int
    epsilon: float = 1e-6


@dataclass(frozen=True)
class Activation:
    """An element-wise function."""

    function: Function


@dataclass(frozen=True)
class Pool:
    """The greatest or the mean number of each window of an image.

    Attributes
    ----------
    function : ``"max"``, for images that a ReLU made, as what is padded counts as zero; or ``"mean"``, of all places
        in the window, padded ones too.
    kernel, stride, padding : as of `Conv`.
    ceil : whether a last window may stand over the right and lower edge.
    """

    function: Literal["max", "mean"]
    kernel: int = 3
    stride: int = 2
    padding: int = 0
    ceil: bool = False


@dataclass(frozen=True)
class GlobalPool:
    """The mean over all places of an image, as vectors, or as images of one place (`places`)."""

    places: bool = False


@dataclass(frozen=True)
class Shuffle:
    """Channels of an image taken in turn from each of `groups` equal parts."""

    groups: int


@dataclass(frozen=True)
class Channels:
    """The channels from `start` to before `stop` of an image."""

    start: int
    stop: int


@dataclass(frozen=True)
class Linear:
    """A linear layer with a bias on the last dimension."""

    inputs: int
    outputs: int


@dataclass(frozen=True)
class Dropout:
    """In training, sets this part of the numbers to zero and scales the rest."""

    rate: float


@dataclass(frozen=True)
class Places:
    """An image as a sequence of its places, row by row."""


@dataclass(frozen=True)
class Embedding:
    """A learned vector of `width` numbers for each of `count` integers."""

    count: int
    width: int


@dataclass(frozen=True)
class ClassToken:
    """One more learned vector before the first of a sequence."""

    width: int


@dataclass(frozen=True)
class Positions:
    """A learned vector added to each of the first `length` of a sequence."""

    length: int
    width: int


@dataclass(frozen=True)
class First:
    """The first vector of a sequence."""


@dataclass(frozen=True)
class Attention:
    """Multi-head self-attention: linear layers ``query``, ``key``, ``value`` and ``out`` of `width`.

    A network with an input ``mask`` attends only where it is 1.
    """

    width: int
    heads: int

    @property
    def projections(self) -> tuple[tuple[str, Linear], ...]:
        """Its layers by name."""
        return tuple((name, Linear(self.width, self.width)) for name in ("query", "key", "value", "out"))


@dataclass(frozen=True)
class Serial:
    """Blocks one after the other, by name."""

    parts: tuple[tuple[str, Block], ...]


@dataclass(frozen=True)
class Parallel:
    """Blocks that read the same input, by name, and what their outputs are put together by."""

    function: Literal["sum", "product", "concat"]
    branches: tuple[tuple[str, Block], ...]


Block: TypeAlias = (
    Identity
    | Conv
    | BatchNorm
    | LayerNorm
    | Activation
    | Pool
    | GlobalPool
    | Shuffle
    | Channels
    | Linear
    | Dropout
    | Places
    | Embedding
    | ClassToken
    | Positions
    | First
    | Attention
    | Serial
    | Parallel
)


@dataclass(frozen=True)
class Image:
    """An input of square images, float32.

    Attributes
    ----------
    channels : of each place.
    size : height and width.
    """

    channels: int
    size: int


@dataclass(frozen=True)
class Tokens:
    """Two inputs ``(batch, length)``: integers below `vocabulary`, and a float32 mask that is 0 where they are padding.

    Attributes
    ----------
    length : tokens of a sample, padded ones too.
    vocabulary : how many different ones there are.
    """

    length: int
    vocabulary: int


@dataclass(frozen=True)
class Architecture:
    """A network.

    Attributes
    ----------
    name : what it is called.
    input : what goes in.
    network : what becomes of it; ``(batch, classes)`` logits come out.
    """

    name: str
    input: Image | Tokens
    network: Serial

    def example(self, batch: int = 2, channels_last: bool = False) -> tuple[np.ndarray, ...]:
        """Seeded inputs: images ``(batch, channels, size, size)``, or with channels last; or tokens and a mask of ones.

        Parameters
        ----------
        batch : samples.
        channels_last : whether images are ``(batch, size, size, channels)``.
        """
        random = np.random.default_rng(0)
        if isinstance(self.input, Tokens):
            tokens = random.integers(0, self.input.vocabulary, (batch, self.input.length))
            return tokens, np.ones(tokens.shape, np.float32)
        images = random.random((batch, self.input.channels, self.input.size, self.input.size), dtype=np.float32)
        return (np.ascontiguousarray(images.transpose(0, 2, 3, 1)) if channels_last else images,)


def serial(**parts: Block) -> Serial:
    """Blocks one after the other."""
    return Serial(tuple(parts.items()))


def numbered(parts: Iterable[Block]) -> Serial:
    """Blocks one after the other, called 0, 1, …."""
    return Serial(tuple((str(i), part) for i, part in enumerate(parts)))


def residual(body: Block, shortcut: Block | None = None) -> Parallel:
    """A block and what is added to it, if anything."""
    branches = (("body", body),) if shortcut is None else (("body", body), ("shortcut", shortcut))
    return Parallel("sum", branches)


def concat(**branches: Block) -> Parallel:
    """The outputs of blocks, channel after channel."""
    return Parallel("concat", tuple(branches.items()))


@dataclass(frozen=True)
class ConvNorm:
    """How an architecture normalises and activates: makes a convolution with the layers behind it.

    Attributes
    ----------
    epsilon, momentum : of its batch norms.
    """

    epsilon: float = 1e-5
    momentum: float = 0.1

    def __call__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        function: Function | None = None,
    ) -> Serial:
        """``conv``, ``norm`` and, with a `function`, ``activation``."""
        conv, norm = Conv(inputs, outputs, kernel, stride, groups), BatchNorm(outputs, self.epsilon, self.momentum)
        if function is None:
            return serial(conv=conv, norm=norm)
        return serial(conv=conv, norm=norm, activation=Activation(function))


def squeeze_excite(width: int, squeezed: int) -> Parallel:
    """Channels scaled by what two 1×1 convolutions make of their means (Hu et al., 2018, arXiv:1709.01507)."""
    gate = serial(
        pool=GlobalPool(places=True),
        reduce=Conv(width, squeezed, bias=True),
        activation=Activation("relu"),
        expand=Conv(squeezed, width, bias=True),
        gate=Activation("hard_sigmoid"),
    )
    return Parallel("product", (("input", Identity()), ("gate", gate)))


def inverted_residual(
    conv: ConvNorm,
    inputs: int,
    hidden: int,
    outputs: int,
    kernel: int = 3,
    stride: int = 1,
    function: Function = "relu6",
    squeezed: int = 0,
) -> Parallel:
    """A depthwise convolution between two 1×1 ones, added to its input where sizes agree (Sandler et al., 2018,
    arXiv:1801.04381).

    Parameters
    ----------
    hidden : channels of the depthwise convolution; without an expansion in front where they are those of the input.
    squeezed : channels inside a squeeze-and-excite behind the depthwise convolution; 0 for none.
    """
    parts: dict[str, Block] = {}
    if hidden != inputs:
        parts["expand"] = conv(inputs, hidden, function=function)
    parts["depthwise"] = conv(hidden, hidden, kernel, stride, hidden, function)
    if squeezed:
        parts["squeeze"] = squeeze_excite(hidden, squeezed)
    parts["project"] = conv(hidden, outputs)
    return residual(serial(**parts), Identity() if stride == 1 and inputs == outputs else None)
