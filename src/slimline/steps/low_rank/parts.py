"""What a layer can be split into: the sizes of the parts, their cost, and the operators that they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from string import ascii_letters
from typing import Any

import numpy as np

from slimline.graph.equation import Window
from slimline.graph.operators import Convolution, Einsum, Linear, Operator, Table
from slimline.methods.factorization import Canonical, Factorization, Tucker, signal_rank
from slimline.steps.layer_fit import Layer
from slimline.steps.low_rank.step import Method

Array = np.ndarray[Any, np.dtype[Any]]


def ranges(layer: Layer, method: Method) -> tuple[tuple[int, int], ...]:
    """Of each part, which dimensions of the kernel it has: from, up to."""
    whole = len(layer.kernel)
    if method == "svd":
        return (0, whole), (whole, whole)
    if method == "input":
        return (0, 0), (0, whole)
    if method == "spatial":
        return (0, 1), (1, whole)
    if method == "cp":
        return (0, 0), *sides(layer), (whole, whole)
    return (0, 0), (0, whole), (whole, whole)


def sides(layer: Layer) -> tuple[tuple[int, int], ...]:
    """Dimensions of the kernel, from and up to, of which one has several positions each."""
    several = [d for d, size in enumerate(layer.kernel) if size > 1]
    return tuple(pairwise([0, *several[1:], len(layer.kernel)]))


def methods(layer: Layer, wished: Sequence[Method]) -> tuple[Method, ...]:
    """Those that mean something for the layer."""
    return tuple(wished) if math.prod(layer.kernel) > 1 else ("svd",)


@dataclass(frozen=True)
class Split:
    """A layer, split by one method.

    Attributes
    ----------
    weight : `W`, ``(groups, outputs, inputs)``.
    second : the Gram matrix of its inputs, or their covariance, of a table its diagonal; None for the error of the
        weights.
    """

    layer: Layer
    method: Method
    weight: Array
    second: Array | None
    damping: float

    @cached_property
    def _factors(self) -> Factorization:
        return Factorization(self.weight, self.second, self._rest, self.damping)

    @cached_property
    def _tucker(self) -> Tucker:
        return Tucker(self.weight, self.second, self._rest, self.damping)

    @cached_property
    def _canonical(self) -> Canonical:
        kernel = [math.prod(self.layer.kernel[start:stop]) for start, stop in sides(self.layer)]
        return Canonical(self.weight, self.second, kernel, self.damping)

    @property
    def most(self) -> int:
        """The highest rank there is."""
        if self.method == "cp":
            return int(self.layer.shape[2])
        _, outputs, inputs = self.layer.shape
        lead = min(outputs * self._rest, inputs // self._rest)
        return min(outputs, lead * self._rest) if self.method == "tucker" else lead

    @property
    def _rest(self) -> int:
        """Positions of the kernel that the first part leaves to the others."""
        (_, taken), *_ = ranges(self.layer, self.method)
        return math.prod(self.layer.kernel[taken:])

    @property
    def closed(self) -> bool:
        """Whether the errors of all ranks are known at once."""
        return self.method == "svd"

    def ranks(self, rank: int) -> tuple[int, ...]:
        """Channels between the parts, in their order; of Tucker-2 those of the inputs are in proportion."""
        if self.method != "tucker":
            return (rank,)
        outputs, channels = self.layer.shape[1], self.layer.channels
        narrow = max(round(rank * channels / outputs), -(-rank // self._rest))
        return min(narrow, channels, outputs * self._rest), rank

    @property
    def signal_rank(self) -> int:
        """The rank up to which the weight stands out from noise; of groups the highest."""
        rest = 1 if self.method in ("tucker", "cp") else self._rest
        _, outputs, inputs = self.weight.shape
        values = Factorization(self.weight, None, rest).values
        return max(signal_rank(each, (outputs * rest, inputs // rest)) for each in values)

    def cost(self, rank: int) -> tuple[int, int]:
        """Numbers in the weights, and multiply-accumulates of the whole batch."""
        layer = self.layer
        groups, outputs, _ = layer.shape
        parts = ranges(layer, self.method)
        depthwise = range(1, len(parts) - 1) if self.method == "cp" else ()
        widths = (layer.channels, *(self.ranks(rank) * (len(depthwise) + 1)), outputs)
        parameters = macs = 0
        for i, (start, stop) in enumerate(parts):
            width = widths[i + 1] if i in depthwise else widths[i] * widths[i + 1]
            size = groups * width * math.prod(layer.kernel[start:stop])
            parameters += size
            if i or not layer.table:
                macs += size * layer.times * math.prod((*layer.after[:stop], *layer.before[stop:]))
        return parameters, macs

    def error(self, rank: int) -> float:
        """Relative to the energy of the outputs (or of the weights)."""
        if self.method == "tucker":
            narrow, _ = self.ranks(rank)
            return self._tucker.error(rank, narrow)
        if self.method == "cp":
            return self._canonical.error(rank)
        return self._factors.error(rank)

    def factors(self, rank: int) -> tuple[tuple[Array, ...], Array]:
        """The weights of the parts, ``(groups, outputs, inputs)`` each, and their product."""
        if self.method == "tucker":
            narrow, _ = self.ranks(rank)
            three = self._tucker.factors(rank, narrow)
            return three, self._tucker.product(three)
        if self.method == "cp":
            every = self._canonical.factors(rank)
            first, *inner, last = every
            filters = (each.reshape(-1, 1, each.shape[-1]) for each in inner)  # a group for every channel
            return (first, *filters, last), self._canonical.product(every)
        two = self._factors.factors(rank)
        return two, self._factors.product(two)


def operators(layer: Layer, method: Method, factors: Sequence[Array], bias: Array | None) -> tuple[Operator, ...]:
    """What runs in the place of a layer; in front of a recurrent one, which reads it by the other factor.

    Parameters
    ----------
    factors : ``(groups, outputs, inputs)``, the kernel varying fastest.
    bias : ``(outputs,)`` of the last.
    """
    last = len(factors) - 1
    if layer.table:
        table, linear = (factor[0] for factor in factors)
        return Table(np.ascontiguousarray(table.T)), Linear(linear)
    if layer.einsum:
        return _einsums(layer, factors, bias)
    if layer.recurrent:
        return (Linear(factors[0][0]),)
    if not layer.kernel:
        return tuple(Linear(factor[0], bias if i == last else None) for i, factor in enumerate(factors))
    parts: list[Operator] = []
    for i, (factor, (start, stop)) in enumerate(zip(factors, ranges(layer, method), strict=True)):
        kernel = tuple(k if start <= d < stop else 1 for d, k in enumerate(layer.kernel))
        groups, outputs, _ = factor.shape
        weight = factor.reshape(groups * outputs, -1, *kernel)
        window = _part(layer.window, start, stop)
        parts.append(Convolution(weight, bias if i == last else None, window, groups))
    return tuple(parts)


def _einsums(layer: Layer, factors: Sequence[Array], bias: Array | None) -> tuple[Operator, ...]:
    """Two products over a new last axis; each a linear layer where it only changes the last dimension."""
    matrix = layer.matrix
    read, stored, made, biased = matrix.letters
    rank = next(letter for letter in ascii_letters if letter not in {*read, *stored, *made})
    groups, outputs, inputs = ("".join(name for name, _ in t) for t in (matrix.groups, matrix.outputs, matrix.inputs))
    sizes = dict((*matrix.groups, *matrix.outputs, *matrix.inputs))
    between = "".join(letter for letter in read if letter not in inputs) + rank
    first, second = factors
    narrow = first.reshape(*(sizes[name] for name in groups), -1, *(sizes[name] for name in inputs))
    wide = second.reshape(*(sizes[name] for name in (*groups, *outputs)), -1)
    bias = None if bias is None else bias.reshape([sizes[name] for name in biased])
    parts: list[Operator] = [
        Einsum(f"{read},{groups}{rank}{inputs}->{between}", narrow),
        Einsum(f"{between},{groups}{outputs}{rank}->{made}", wide, bias, biased),
    ]
    if not groups and read.endswith(inputs) and len(inputs) == 1:
        parts[0] = Linear(narrow)
    if not groups and made == between[:-1] + outputs and len(outputs) == 1:
        parts[1] = Linear(wide, bias)
    return tuple(parts)


def _part(window: Window | None, start: int, stop: int) -> Window | None:
    """Where a part looks that has some of the dimensions of a kernel."""
    if window is None or start == stop:
        return None

    def own(numbers: Sequence[Any], neutral: Any) -> tuple[Any, ...]:
        return tuple(n if start <= d < stop else neutral for d, n in enumerate(numbers))

    padding = window.padding if isinstance(window.padding, str) else own(window.padding, (0, 0))
    return Window(own(window.stride, 1), own(window.dilation, 1), padding)
