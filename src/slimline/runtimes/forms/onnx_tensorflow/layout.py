"""Tensors of an ONNX graph as TensorFlow holds them, with their dimensions in an order of their own.

ONNX has channels before the places of an image, TensorFlow's kernels behind them. A transposition around every
convolution would cost more time than the convolution, so a value keeps the order in which its maker left it, and only
operators that need another one (a reshape, a product of matrices) have it laid out anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from slimline.methods.formats import IntegerGrid

Array = np.ndarray[Any, np.dtype[Any]]
Order = tuple[int, ...]


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
    """

    array: Array
    grid: IntegerGrid

    def laid_out(self, order: Sequence[int], rows: bool = False) -> Any:
        """Transposed, as one row of an image where `rows`, and rounded there: the converter follows few reshapes
        between rounding and use, no new dimension ahead and no transposition."""
        array = np.transpose(self.array, order)
        array = array[None] if rows else array
        low, high = (end.ravel() for end in self.grid.ends)
        kind = {"num_bits": self.grid.bits, "narrow_range": self.grid.narrow}
        if self.grid.axis is None:
            return tf.quantization.fake_quant_with_min_max_args(
                tf.constant(array), float(low[0]), float(high[0]), **kind
            )
        axis = list(order).index(self.grid.axis) + rows
        behind = int(np.prod(array.shape[axis + 1 :], dtype=int))
        flat = tf.constant(array.reshape(*array.shape[:axis], -1))
        ends = [tf.constant(np.repeat(end, behind)) for end in (low, high)]
        rounded = tf.quantization.fake_quant_with_min_max_vars_per_channel(flat, *ends, **kind)
        return rounded if rounded.shape == array.shape else tf.reshape(rounded, array.shape)


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


def sizes_of(tensor: Any) -> list[Any]:
    """The shape of `tensor` as a target of reshapes: static, with -1 for one open size, else computed."""
    static = tensor.shape.as_list()
    if static.count(None) <= 1:
        return [-1 if size is None else size for size in static]
    computed = tf.shape(tensor)
    return [computed[axis] if size is None else size for axis, size in enumerate(static)]
