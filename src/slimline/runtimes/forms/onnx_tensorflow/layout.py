"""Tensors of an ONNX graph as TensorFlow holds them, with their dimensions in an order of their own.

ONNX has channels before the places of an image, TensorFlow's kernels behind them. A transposition around every
convolution would cost more time than the convolution, so a value keeps the order in which its maker left it, and only
operators that need another one (a reshape, a product of matrices) have it laid out anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import numpy as np
import tensorflow as tf

from slimline.methods.formats import IntegerGrid, along
from slimline.runtimes.forms.tensorflow import sizes_of

Array = np.ndarray[Any, np.dtype[Any]]
Order = tuple[int, ...]
_READERS = 32
"""Of a stored tensor, for which numbers are told apart."""


@dataclass(frozen=True)
class Placed:
    """A computed value.

    Attributes
    ----------
    tensor : of TensorFlow.
    order : for each dimension of `tensor`, which dimension of the ONNX value it is.
    """

    tensor: Any
    order: Order

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.order)

    @property
    def shape(self) -> tuple[int | None, ...]:
        """In ONNX order; None where it is open."""
        sizes = self.tensor.shape.as_list()
        return tuple(sizes[self.order.index(axis)] for axis in range(self.rank))

    def axis(self, axis: int) -> int:
        """Where an ONNX dimension lies in `tensor`."""
        return self.order.index(axis % self.rank)

    def to(self, order: Order) -> Any:
        """The tensor in another order."""
        return arranged(self.tensor, self.order, order)

    @property
    def plain(self) -> Any:
        """The tensor in the order of ONNX."""
        return self.to(straight(self.rank))

    @property
    def channels_last(self) -> Any:
        """The tensor with its second dimension behind all others."""
        return self.to(channels_last(self.rank))


@dataclass(frozen=True)
class Sizes:
    """Integers of which some depend on the sizes of the inputs: what Shape gives, and arithmetic on it.

    Attributes
    ----------
    values : each an int, or a scalar tensor of int32.
    scalar : whether it is a single number rather than a vector.
    """

    values: tuple[Any, ...]
    scalar: bool = False

    @property
    def tensor(self) -> Any:
        """As int64, which ONNX computes sizes in."""
        stacked = [tf.cast(value, tf.int64) for value in self.values]
        return stacked[0] if self.scalar else tf.stack(stacked) if stacked else tf.zeros([0], tf.int64)


@dataclass(frozen=True)
class Rounded:
    """A stored tensor that is rounded to a grid where it is read.

    Attributes
    ----------
    array : before it is rounded.
    grid : in all, or one for each position of an axis.
    readers : counts them.
    """

    array: Array
    grid: IntegerGrid
    readers: Iterator[int] = field(default_factory=count)

    def laid_out(self, order: Sequence[int], rows: bool = False) -> Any:
        """Transposed, as one row of an image where `rows`, and rounded there: the converter follows few reshapes
        between rounding and use, no new dimension ahead and no transposition."""
        array = np.transpose(self._own, order)
        array = array[None] if rows else array
        if self.grid.axis is None:
            low, high = (float(end.ravel()[0]) for end in self.grid.ends)
            return tf.quantization.fake_quant_with_min_max_args(
                tf.constant(array), low, high, num_bits=self.grid.bits, narrow_range=self.grid.narrow
            )
        axis = list(order).index(self.grid.axis) + rows
        behind = int(np.prod(array.shape[axis + 1 :], dtype=int))
        rounded = self._by_position(array.reshape(*array.shape[:axis], -1), behind)
        return rounded if rounded.shape == array.shape else tf.reshape(rounded, array.shape)

    def columns(self, order: Sequence[int]) -> Any:
        """Transposed, as `slimline.runtimes.forms.tensorflow.by_columns` takes a matrix, and rounded there; the grids
        lie along the last dimension, or there is one in all."""
        array = np.transpose(self._own, order)
        return self._by_position(array.reshape(1, 1, -1, array.shape[-1]), array.shape[-1] // self.grid.scale.size)

    @property
    def _own(self) -> Array:
        """Numbers for one reader more, a little beside those of others: where some share what is rounded, the converter
        rounds it anew. The codes are the same, and the file holds them once."""
        part = next(self.readers) % _READERS / (2 * _READERS)
        return self.grid.round(self.array) + np.float32(part) * self.grid.scale if part else self.array

    def _by_position(self, array: Array, repeats: int) -> Any:
        """Rounded to a grid for each few positions of the last dimension."""
        ends = [tf.constant(np.repeat(end.ravel(), repeats)) for end in self.grid.ends]
        return tf.quantization.fake_quant_with_min_max_vars_per_channel(
            tf.constant(array), *ends, num_bits=self.grid.bits, narrow_range=self.grid.narrow
        )

    def turned(self, order: Sequence[int]) -> Rounded:
        """Transposed, and rounded where it is read as before."""
        grid = self.grid
        blocks = () if grid.axis is None else along(list(order).index(grid.axis), len(order))
        scale = grid.scale.reshape([1 if block is None else -1 for block in blocks])
        return replace(self, array=np.transpose(self.array, order), grid=replace(grid, scale=scale, blocks=blocks))


Value = Placed | Sizes | Rounded | Array | None


def straight(rank: int) -> Order:
    """The order of ONNX."""
    return tuple(range(rank))


def channels_last(rank: int) -> Order:
    """The order of TensorFlow's kernels."""
    return (0, *range(2, rank), 1) if rank > 2 else straight(rank)


def placed_last(tensor: Any) -> Placed:
    """What a kernel of TensorFlow gave."""
    return Placed(tensor, channels_last(len(tensor.shape)))


def placed(tensor: Any) -> Placed:
    """A tensor in the order of ONNX."""
    return Placed(tensor, straight(len(tensor.shape)))


def arranged(tensor: Any, old: Order, new: Order) -> Any:
    """`tensor`, whose dimensions are in the order `old`, in the order `new`; reshaped where that is enough."""
    if old == new:
        return tensor
    sizes = tensor.shape.as_list()
    wide = [axis for axis, size in zip(old, sizes, strict=True) if size != 1]
    if wide == [axis for axis in new if sizes[old.index(axis)] != 1]:
        target = sizes_of(tensor)
        return tf.reshape(tensor, [target[old.index(axis)] for axis in new])
    return tf.transpose(tensor, [old.index(axis) for axis in new])


def aligned(values: Sequence[Value]) -> tuple[list[Any], Order]:
    """Operands that broadcast as numpy says, in one order: that of the first of full rank that is not straight."""
    ranks = [np.ndim(v) if isinstance(v, np.ndarray) else v.rank if isinstance(v, Placed) else 0 for v in values]
    rank = max(ranks)
    orders = [v.order for v in values if isinstance(v, Placed) and v.rank == rank]
    order = next((o for o in orders if o != straight(rank)), straight(rank))
    return [_broadcastable(value, rank, order, bool(orders)) for value in values], order


def _broadcastable(value: Value, rank: int, order: Order, beside: bool) -> Any:
    """An operand as it broadcasts against others of `rank` dimensions in `order`; `beside` some that has them all."""
    if isinstance(value, Placed):
        if value.rank == rank:
            return value.to(order)
        if order == straight(rank) or not value.rank:
            return value.plain
        widened = tf.reshape(value.plain, [1] * (rank - value.rank) + sizes_of(value.plain))
        return arranged(widened, straight(rank), order)
    if isinstance(value, Sizes):
        return value.tensor
    array = value.array if isinstance(value, Rounded) else value
    assert array is not None
    full = np.transpose(array.reshape((1,) * (rank - array.ndim) + array.shape), order)
    while beside and full.ndim and full.shape[0] == 1:
        full = full[0]
    return tf.constant(np.array(full, order="C"))
