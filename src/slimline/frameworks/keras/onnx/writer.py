"""An ONNX graph in the making: what rules ask of a Keras model, and what they add.

Keras has channels behind the places of an image, ONNX' convolutions and pools have them in front. A value keeps the
order of dimensions in which its maker left it (`Placed`) and is transposed only for a reader that needs another order,
once for all such readers; a transposition of Keras' own merely renames dimensions. So no transposition is left between
convolutions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import keras
import numpy as np
import onnx_ir as ir

from slimline.frameworks.keras.canonical import ACTIVATION
from slimline.frameworks.keras.functional import Call, input_name, is_array
from slimline.frameworks.keras.reader import NoRule, Reader
from slimline.methods.formats import Format, IntegerGrid, Scaled, spread
from slimline.runtimes.forms.onnx_graph import DOMAIN, FAKE_QUANTIZE, LAYER, MARK, rounding_ends

Array = np.ndarray[Any, np.dtype[Any]]
Order = tuple[int, ...]
Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class Placed:
    """A computed tensor.

    Attributes
    ----------
    value : of the ONNX graph.
    order : for each dimension of `value`, which dimension of the Keras tensor it is.
    shape : of the Keras tensor; None where a size is open.
    dtype : of both.
    """

    value: ir.Value
    order: Order
    shape: Shape
    dtype: str

    def at(self, axis: int) -> int:
        """Where a dimension of the Keras tensor lies in `value`."""
        return self.order.index(axis % len(self.order))


@dataclass(frozen=True)
class Stored:
    """A tensor whose numbers are known, dimensions as Keras has them; `name` is that of a parameter, or empty."""

    array: Array
    name: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return tuple(self.array.shape)

    @property
    def dtype(self) -> str:
        """Of the array."""
        return str(self.array.dtype)


Operand = Placed | Stored
Rule = Callable[["Writer", Call], "Operand | Sequence[Operand]"]


def straight(rank: int) -> Order:
    """The order in which Keras has the dimensions."""
    return tuple(range(rank))


def channels_first(rank: int, axis: int = -1) -> Order:
    """The order with the dimension `axis` behind the batch."""
    axis %= rank
    return (0, axis, *(d for d in range(1, rank) if d != axis))


def dtype_of(call: Call) -> str:
    """Of the first result of a call."""
    return str(keras.backend.standardize_dtype(call.outputs[0].dtype))


def numbers(*values: int) -> Array:
    """Sizes, axes or indices as ONNX takes them."""
    return np.array(values, np.int64)


class Writer:
    """The graph in the making."""

    def __init__(self, native: keras.Model, example: tuple[Array, ...], weights: Collection[str] = ()) -> None:
        self.native = native
        self.marked, self.unmarked = frozenset(weights), set(weights)
        self._marks: dict[str, ir.Value] = {}
        self.reader = Reader(native, example)
        self._larger = self._enlarged(example)
        self._layers = {call.operation.name for call in self.reader.calls}
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self._weights: dict[tuple[str, str], ir.Value] = {}
        self.layer = ""
        self._operands: dict[int, Operand] = {}
        self._constants: dict[tuple[str, bytes], ir.Value] = {}
        self._stored: dict[tuple[str, str, bytes], ir.Value] = {}
        self._arranged: dict[tuple[ir.Value, Order], ir.Value] = {}
        self.turned: dict[ir.Node, Array] = {}
        self.inputs = [self._input(tensor) for tensor in native.inputs]

    def _enlarged(self, example: tuple[Array, ...]) -> Reader:
        """The same for inputs twice as large where their size is open, which shows what sizes depend on it."""

        def reader(batch_only: bool) -> Reader:
            shapes = [
                [n * 2 if open_ is None and (d == 0 or not batch_only) else n for d, (n, open_) in enumerate(pairs)]
                for pairs in (
                    list(zip(x.shape, t.shape, strict=True)) for x, t in zip(example, self.native.inputs, strict=True)
                )
            ]
            arrays = (np.broadcast_to(np.zeros((), x.dtype), s) for x, s in zip(example, shapes, strict=True))
            return Reader(self.native, tuple(arrays))

        try:
            return reader(False)
        except Exception:  # layers raise many types: the network does not take inputs of twice the size
            return reader(True)

    def _input(self, tensor: Any) -> ir.Value:
        shape = self.shape(tensor)
        name = input_name(tensor)
        dtype = keras.backend.standardize_dtype(tensor.dtype)
        sizes = [n if n is not None else "batch" if d == 0 else f"{name}_{d}" for d, n in enumerate(shape)]
        value = ir.Value(name=name, shape=ir.Shape(sizes), type=_type(dtype))
        self._operands[id(tensor)] = Placed(value, straight(len(shape)), shape, dtype)
        return value

    # -- what rules ask for ------------------------------------------------------------

    def shape(self, tensor: Any) -> Shape:
        """Sizes of a `KerasTensor`, None where they depend on open sizes of the inputs."""
        both = zip(self.reader.shape(tensor), self._larger.shape(tensor), strict=True)
        return tuple(a if a == b else None for a, b in both)

    def example_shape(self, tensor: Any) -> tuple[int, ...]:
        """Sizes of a `KerasTensor` for the example inputs."""
        return self.reader.shape(tensor)

    def operand(self, argument: Any, dtype: str | None = None) -> Operand:
        """A tensor, array or number among the arguments of a call, as `dtype`."""
        if isinstance(argument, keras.KerasTensor):
            operand = self._operands[id(argument)]
        elif is_array(argument) or hasattr(argument, "dtype"):
            operand = Stored(np.asarray(keras.ops.convert_to_numpy(argument)))
        else:
            operand = Stored(np.asarray(argument))
        return operand if dtype is None else self.cast(operand, dtype)

    def argument(self, call: Call, name: str) -> Any:
        """An argument of a call by its name; None where it is not given."""
        return self.arguments(call).get(name)

    def arguments(self, call: Call) -> dict[str, Any]:
        """The arguments of a call by their names in the operation's `call`."""
        return dict(inspect.signature(call.operation.call).bind(*call.args, **call.kwargs).arguments)

    def source(self, call: Call) -> Operand:
        """The tensor, or stored array, that a call is about: its first argument."""
        return self.operand(next(iter(self.arguments(call).values())))

    def parameter(self, variable: Any) -> Stored:
        """A layer's variable."""
        return Stored(keras.ops.convert_to_numpy(variable), str(self.reader.parameter(variable)))

    # -- what rules do -----------------------------------------------------------------

    def begin(self, call: Call) -> None:
        """From now on, operators are of this call."""
        owner = call.operation.name.removesuffix(ACTIVATION)
        self.layer = owner if owner in self._layers else call.operation.name

    def give(self, call: Call, results: Operand | Sequence[Operand]) -> None:
        """What a call gives, in the dtypes that Keras says."""
        each = [results] if isinstance(results, Placed | Stored) else list(results)
        for tensor, result in zip(call.outputs, each, strict=True):
            result = self.cast(result, keras.backend.standardize_dtype(tensor.dtype))
            if isinstance(result, Placed):
                shape = self.shape(tensor)
                assert len(shape) == len(result.order), call.name
                result = replace(result, shape=shape)
            self._operands[id(tensor)] = result

    def op(self, kind: str, *inputs: ir.Value | Array | None, domain: str = "", **attributes: Any) -> ir.Value:
        """The result of a new operator; arrays among its inputs become initializers."""
        return self.ops(kind, *inputs, outputs=1, domain=domain, **attributes)[0]

    def ops(
        self, kind: str, *inputs: ir.Value | Array | None, outputs: int, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """The results of a new operator."""
        values = [self.constant(x) if isinstance(x, np.ndarray) else x for x in inputs]
        while values and values[-1] is None:
            values.pop()
        node = ir.node(kind, values, attributes, domain=domain, num_outputs=outputs, metadata_props={LAYER: self.layer})
        self.nodes.append(node)
        return node.outputs

    def place(self, value: ir.Value, order: Order, shape: Shape, dtype: str) -> Placed:
        """A result as a tensor of Keras."""
        value.shape = ir.Shape([shape[d] for d in order])
        value.type = _type(dtype)
        return Placed(value, order, shape, dtype)

    def constant(self, array: Array) -> ir.Value:
        """An initializer without a name of its own, shared by all that need the same."""
        key = (f"{array.dtype}{array.shape}", array.tobytes())
        if key not in self._constants:
            self._constants[key] = self._initializer(array, f"constant{len(self._constants)}")
        return self._constants[key]

    def weight(
        self, stored: Stored, what: str, arrange: Callable[[Array], Array], each: Format | None = None
    ) -> ir.Value:
        """A parameter of the layer that is written, as ONNX has it, rounded where it has a format; the same one for
        every call of a layer.

        Parameters
        ----------
        what : part of the initializer's name.
        arrange : brings the array from Keras' order into that of ONNX.
        each : of the array in Keras' order.
        """
        array = np.array(arrange(stored.array), order="C")
        key = (stored.name, what)
        value = self._weights.get(key)
        if stored.name in self.marked:
            return self._marked(stored, what, arrange)
        if not stored.name or value is None or not _holds(value, array):
            value = self._weights[key] = self._initializer(array, self._free(what))
        return value if each is None else self._rounded_weight(value, stored.array.shape, arrange, each)

    def _free(self, what: str) -> str:
        """A name of an initializer of the layer that is written."""
        name, count = f"{self.layer}.{what}", 1
        while name in self.initializers:
            name, count = f"{self.layer}.{what}_{count + 1}", count + 1
        return name

    def _marked(self, stored: Stored, what: str, arrange: Callable[[Array], Array]) -> ir.Value:
        """A parameter in Keras' order behind the operator that marks it, brought into that of ONNX by operators."""
        if stored.name in self.unmarked:
            self.unmarked.discard(stored.name)
            value = self._initializer(np.array(stored.array, order="C"), self._free(what))
            value.metadata_props[MARK] = stored.name
            real = self.op(FAKE_QUANTIZE, value, domain=DOMAIN, scale=1.0, zero_point=0, low=-128, high=127)
            real.shape, real.type = value.shape, value.type
            self._marks[stored.name] = real
        real = self._marks[stored.name]
        places = np.arange(stored.array.size).reshape(stored.shape)
        arranged = arrange(places)
        orders = permutations(range(places.ndim))
        order = next((o for o in orders if np.array_equal(np.transpose(places, o).ravel(), arranged.ravel())), None)
        if order is None:
            raise NoRule("its weight is arranged anew")
        if order != straight(places.ndim):
            real = self.op("Transpose", real, perm=order)
        if np.transpose(places, order).shape != arranged.shape:
            real = self.op("Reshape", real, numbers(*arranged.shape))
        return real

    def _rounded_weight(
        self, value: ir.Value, shape: tuple[int, ...], arrange: Callable[[Array], Array], each: Format
    ) -> ir.Value:
        ends = rounding_ends(each)
        if ends is None or not isinstance(each, Scaled) or (isinstance(each, IntegerGrid) and each.zero.any()):
            raise NoRule(f"its weight is in a format ({each.describe()}) that ONNX has no operator for")
        limits = {"low": ends[0], "high": ends[1]}
        if each.scale.size == 1:
            single = float(each.scale.ravel()[0])
            return self.op(FAKE_QUANTIZE, value, domain=DOMAIN, scale=single, zero_point=0, **limits)
        scales = arrange(np.broadcast_to(spread(each.scale, each.blocks, shape), shape))
        axes = [axis for axis in range(scales.ndim) if (scales != scales.take([0], axis)).any()]
        if len(axes) > 1:
            raise NoRule("its weight has scales along several dimensions of ONNX' weight")
        axis = axes[0] if axes else 0
        line = scales[tuple(slice(None) if d == axis else 0 for d in range(scales.ndim))]
        scale = np.array(line, np.float32)
        return self.op(FAKE_QUANTIZE, value, scale, domain=DOMAIN, axis=axis, **limits)

    def _initializer(self, array: Array, name: str) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.initializers[name] = value
        return value

    # -- tensors in other orders and dtypes --------------------------------------------

    def placed(self, operand: Operand) -> Placed:
        """A tensor that is computed, or that is stored as if it were."""
        if isinstance(operand, Placed):
            return operand
        rank = operand.array.ndim
        return Placed(self.ordered(operand, straight(rank)), straight(rank), operand.shape, operand.dtype)

    def cast(self, operand: Operand, dtype: str) -> Operand:
        """The same numbers of another dtype."""
        if operand.dtype == dtype:
            return operand
        if isinstance(operand, Stored):
            return Stored(operand.array.astype(dtype), operand.name)
        kind = int(ir.DataType.from_numpy(np.dtype(dtype)))
        return self.place(self.op("Cast", operand.value, to=kind), operand.order, operand.shape, dtype)

    def plain(self, operand: Operand) -> ir.Value:
        """In the order of Keras."""
        return self.ordered(operand, straight(len(operand.shape)))

    def ordered(self, operand: Operand, order: Order) -> ir.Value:
        """In another order: transposed, or reshaped where that is enough."""
        if isinstance(operand, Stored):
            array = np.array(np.transpose(operand.array, order), order="C")
            if not operand.name:
                return self.constant(array)
            key = (operand.name, f"{array.dtype}{array.shape}", array.tobytes())
            if key not in self._stored:
                self._stored[key] = self.weight(Stored(array), operand.name.rpartition("/")[2], lambda a: a)
            return self._stored[key]
        if operand.order == order:
            return operand.value
        moves = tuple(operand.order.index(d) for d in order)
        if (operand.value, moves) not in self._arranged:
            self._arranged[operand.value, moves] = self._arrange(operand, order)
        return self._arranged[operand.value, moves]

    def _arrange(self, operand: Placed, order: Order) -> ir.Value:
        wide = [d for d in operand.order if operand.shape[d] != 1]
        sizes = [operand.shape[d] for d in order]
        if wide == [d for d in order if operand.shape[d] != 1] and sizes.count(None) <= 1:
            result = self.op("Reshape", operand.value, numbers(*(-1 if n is None else n for n in sizes)))
        else:
            result = self.op("Transpose", operand.value, perm=[operand.order.index(d) for d in order])
        return self.place(result, order, operand.shape, operand.dtype).value

    def each(self, kind: str, *operands: Operand | float, dtype: str | None = None, **attributes: Any) -> Placed:
        """The result of an operator that works element by element and broadcasts as numpy does.

        Numbers among `operands` take the dtype of the first that is none; the result has it too, or `dtype`.
        """
        first = next(x for x in operands if isinstance(x, Placed | Stored))
        tensors = [x if isinstance(x, Placed | Stored) else Stored(np.asarray(x, first.dtype)) for x in operands]
        values, order, shape = self._aligned(tensors)
        return self.place(self.op(kind, *values, **attributes), order, shape, dtype or first.dtype)

    def _aligned(self, operands: Sequence[Operand]) -> tuple[list[ir.Value], Order, Shape]:
        """Operands in one order, that of the first of full rank that is not straight; and the shape of the result."""
        rank = max(len(x.shape) for x in operands)
        full = [x for x in operands if isinstance(x, Placed) and len(x.order) == rank]
        order = next((x.order for x in full if x.order != straight(rank)), straight(rank))
        values = [self._broadcastable(x, rank, order, bool(full)) for x in operands]
        return values, order, _broadcast([x.shape for x in operands])

    def _broadcastable(self, operand: Operand, rank: int, order: Order, beside: bool) -> ir.Value:
        """An operand as it broadcasts against others of `rank` dimensions in `order`; `beside` some that has them."""
        missing = rank - len(operand.shape)
        if isinstance(operand, Stored):
            wide = Stored(operand.array.reshape((1,) * missing + operand.array.shape), operand.name)
            if not beside:
                return self.ordered(wide, order)
            array = np.transpose(wide.array, order)
            while array.ndim and array.shape[0] == 1:
                array = array[0]
            return self.ordered(Stored(np.array(array, order="C"), operand.name), straight(array.ndim))
        if not missing:
            return self.ordered(operand, order)
        if order == straight(rank) or not operand.shape:
            return self.plain(operand)
        return self.ordered(self.widened(operand, range(missing)), order)

    def widened(self, operand: Operand, axes: Sequence[int]) -> Placed:
        """With new dimensions of size 1, which are then the `axes`."""
        shape = list(operand.shape)
        for axis in sorted(axes):
            shape.insert(axis, 1)
        value = self.op("Unsqueeze", self.plain(operand), numbers(*sorted(axes)))
        return self.place(value, straight(len(shape)), tuple(shape), operand.dtype)

    def reduce(self, kind: str, x: Operand, axes: Sequence[int], keepdims: bool = False) -> Placed:
        """The result of a reduction over some dimensions."""
        placed = self.placed(x)
        axes = sorted({a % len(placed.order) for a in axes})
        places = sorted(placed.at(a) for a in axes)
        value = self.op(kind, placed.value, numbers(*places), keepdims=int(keepdims))
        if keepdims:
            shape = tuple(1 if d in axes else n for d, n in enumerate(placed.shape))
            return self.place(value, placed.order, shape, placed.dtype)
        return self.without(value, placed, axes)

    def without(self, value: ir.Value, x: Placed, axes: Sequence[int]) -> Placed:
        """What is left of `x`, as `value`, when dimensions are gone."""
        left = [d for d in range(len(x.order)) if d not in axes]
        order = tuple(left.index(d) for d in x.order if d in left)
        return self.place(value, order, tuple(x.shape[d] for d in left), x.dtype)

    def reshape(self, x: Operand, after: Any) -> Operand:
        """In the shape of the `KerasTensor` `after`."""
        return self.reshaped(x, self.shape(after))

    def reshaped(self, x: Operand, shape: Shape) -> Operand:
        """In a shape with at most one open size, but for those that `x` begins with as well.

        Raises
        ------
        NoRule : more.
        """
        if isinstance(x, Stored):
            return Stored(x.array.reshape([-1 if n is None else n for n in shape]), x.name)
        target: list[int] = [-1 if n is None else n for n in shape]
        if target.count(-1) > 1:
            for d, (old, new) in enumerate(zip(x.shape, shape, strict=False)):
                if old != new:
                    break
                target[d] = 0 if new is None else new
        if target.count(-1) > 1:
            raise NoRule("it gives several sizes that depend on the input's: load the model with fixed sizes")
        value = self.op("Reshape", self.plain(x), numbers(*target))
        return self.place(value, straight(len(shape)), shape, x.dtype)

    def transposed(self, x: Operand, axes: Sequence[int]) -> Operand:
        """With dimensions renamed: the i-th is what was the ``axes[i]``-th."""
        axes = [a % len(x.shape) for a in axes]
        if isinstance(x, Stored):
            return Stored(np.transpose(x.array, axes), x.name)
        return Placed(x.value, tuple(axes.index(d) for d in x.order), tuple(x.shape[a] for a in axes), x.dtype)

    def size(self, x: Operand, axis: int) -> int:
        """A size that has to be known.

        Raises
        ------
        NoRule : it is open.
        """
        size = x.shape[axis]
        if size is None:
            raise NoRule("it needs sizes that are open: load the model with fixed sizes")
        return size


def _broadcast(shapes: Sequence[Shape]) -> Shape:
    rank = max(map(len, shapes))
    wide = [(1,) * (rank - len(s)) + tuple(s) for s in shapes]
    return tuple(
        next((n for n in sizes if n not in (1, None)), max(sizes, key=lambda n: n is None))
        for sizes in zip(*wide, strict=True)
    )


def _holds(value: ir.Value, array: Array) -> bool:
    """Whether an initializer is this array."""
    assert value.const_value is not None
    content = value.const_value.numpy()
    return content.dtype == array.dtype and np.array_equal(content, array)


def _type(dtype: str) -> ir.TensorType:
    return ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype)))
