"""One ONNX operator on its way into a torch graph, the graph as it grows, and the table of rules."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx

from slimline.basics.errors import first_line
from slimline.frameworks.base import Array
from slimline.frameworks.onnx.native import Native
from slimline.frameworks.onnx.operators import affine, attribute, counts, label, standard, stored
from slimline.frameworks.onnx.read import is_statistic, is_trained
from slimline.frameworks.onnx.run import outline
from slimline.frameworks.onnx.sizes import BATCH, symbols_of
from slimline.graph.ir import Value

aten = torch.ops.aten


class Untrainable(Exception):
    """What keeps a network from being trained; its text goes on behind "but"."""


class Growth:
    """A torch graph as it grows.

    Attributes
    ----------
    tensors : parameters and buffers, by the names that they have in the torch module.
    names : of those that training changes, by their names in the ONNX model.
    constants : names of buffers that it does not change.
    values : what was made of the values of the ONNX graph so far.
    """

    def __init__(self, native: Native) -> None:
        self.graph = fx.Graph()
        self.opset = native.opset
        self.tensors: dict[str, Tensor] = {}
        self.names: dict[str, str] = {}
        self.constants: list[str] = []
        self.values: dict[ir.Value, fx.Node] = {}
        self._outline = outline(native.model, native.example)
        self._batch: fx.Node | None = None
        for number, (value, symbols) in enumerate(
            zip(native.model.graph.inputs, symbols_of(native.model.graph), strict=True)
        ):
            self.values[value] = self.graph.placeholder(f"input_{number}")
            if self._batch is None and symbols[:1] == (BATCH,):
                self._batch = self.values[value]
        self._inputs = {
            str(value.name): array for value, array in zip(native.model.graph.inputs, native.example, strict=True)
        }

    def shape(self, value: ir.Value) -> tuple[int, ...]:
        """Of a value, for the example."""
        content = stored(value)
        if content is not None:
            return content.shape
        name = str(value.name)
        return self._inputs[name].shape if name in self._inputs else self._known(name).shape

    def dtype(self, value: ir.Value) -> str:
        """Numpy's name of a value's type."""
        content = stored(value)
        if content is not None:
            return content.dtype.name
        name = str(value.name)
        return self._inputs[name].dtype.name if name in self._inputs else self._known(name).dtype

    def _known(self, name: str) -> Value:
        if name not in self._outline:
            raise Untrainable(f"slimline cannot train with {name}, which is no tensor")
        return self._outline[name]

    def value(self, value: ir.Value) -> fx.Node:
        """A value of the ONNX graph; what is stored becomes a parameter, a statistic or a constant."""
        if value not in self.values:
            content, node = stored(value), value.producer()
            if content is not None:
                self.values[value] = self._stored(value, content)
            elif node is not None:
                self.compute(node)
        if value not in self.values:
            raise Untrainable(f"slimline cannot train with {value.name}, which is no tensor")
        return self.values[value]

    def compute(self, node: ir.Node) -> None:
        """Add what an operator of the ONNX graph computes."""
        rule = RULES.get(node.op_type) if standard(node) else None
        if rule is None:
            raise Untrainable(f"slimline has no rule to train {label(node)} ({node.name})")
        try:
            results = rule(Call(node, self))
        except (KeyError, ValueError, IndexError, TypeError, RuntimeError) as reason:
            raise Untrainable(
                f"slimline has no rule to train {label(node)} as it is used here ({node.name}: {first_line(reason)})"
            ) from reason
        for output, result in zip(node.outputs, [results] if isinstance(results, fx.Node) else results, strict=False):
            self.values[output] = result
        if any(output not in self.values and (output.uses() or output.is_graph_output()) for output in node.outputs):
            raise Untrainable(f"slimline has no rule to train {label(node)} with all its outputs ({node.name})")

    def _stored(self, value: ir.Value, content: Array) -> fx.Node:
        trained, statistic = is_trained(value, content), is_statistic(value)
        if not trained and not statistic:
            return self.constant(content)
        if content.dtype.name not in ("float32", "float64"):
            raise Untrainable(f"{value.name} is stored in {content.dtype.name}, and weights train in float32")
        tensor = torch.from_numpy(np.array(content))
        name = f"tensor_{len(self.tensors)}"
        self.tensors[name] = torch.nn.Parameter(tensor) if trained else tensor
        self.names[str(value.name)] = name
        return self.graph.get_attr(name)

    def constant(self, content: Array) -> fx.Node:
        """A buffer that training does not change."""
        if content.dtype.name == "bfloat16":
            tensor = torch.from_numpy(content.astype(np.float32)).bfloat16()
        else:
            tensor = torch.from_numpy(np.array(content))
        name = f"tensor_{len(self.tensors)}"
        self.tensors[name] = tensor
        self.constants.append(name)
        return self.graph.get_attr(name)

    def batch(self) -> fx.Node:
        """The batch size, as a number."""
        assert self._batch is not None
        return self.graph.call_function(aten.sym_size.int, (self._batch, 0))


class Call:
    """An operator with what it reads.

    Attributes
    ----------
    node : of the ONNX graph.
    growth : the torch graph; `emit` adds to it.
    """

    def __init__(self, node: ir.Node, growth: Growth) -> None:
        self.node, self.growth = node, growth

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute by its name; lists as lists."""
        value = attribute(self.node, name, default)
        return list(value) if isinstance(value, tuple) else value

    def has(self, index: int) -> bool:
        """Whether an operand is there."""
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def tensor(self, index: int) -> fx.Node:
        """An operand."""
        return self.growth.value(self._input(index))

    def optional(self, index: int) -> fx.Node | None:
        """An operand, or None."""
        return self.tensor(index) if self.has(index) else None

    def tensors(self) -> list[fx.Node]:
        """All operands."""
        return [self.growth.value(value) for value in self.node.inputs if value is not None]

    def constant(self, index: int) -> Array:
        """An operand that is stored."""
        content = stored(self._input(index))
        if content is None:
            raise self.refusal(f"with a computed operand {index}")
        return content

    def number(self, index: int, default: Any = None) -> Any:
        """A single stored number; `default` where the operand is absent."""
        return self.constant(index).ravel()[0].item() if self.has(index) else default

    def numbers(self, name: str, index: int) -> list[int] | None:
        """Whole numbers of an attribute or of a stored operand, whichever the version of the operator has."""
        numbers = self.attribute(name)
        if numbers is None:
            return [int(n) for n in self.constant(index).ravel()] if self.has(index) else None
        return [int(n) for n in (numbers if isinstance(numbers, list) else [numbers])]

    def sizes(self, index: int) -> list[int | fx.Node]:
        """The numbers of an operand, in multiples of the batch, or of other sizes, where they follow such."""
        line = affine(self._input(index))
        if line is None:
            raise self.refusal("by computed numbers")
        sizes: list[int | fx.Node] = []
        for k, (slope, start, divisor) in enumerate(zip(*(np.ravel(part) for part in line[:3]), strict=True)):
            if not slope:
                sizes.append(int(start))
                continue
            size = self._size(line.factor, k)
            size = size if slope == 1 else self.emit(operator.mul, size, int(slope))
            size = size if divisor == 1 else self.emit(operator.floordiv, size, int(divisor))
            sizes.append(self.emit(operator.add, size, int(start)) if start else size)
        return sizes

    def _size(self, factor: ir.Value | None, index: int) -> fx.Node:
        """One of the sizes that numbers follow."""
        if factor is None:
            raise self.refusal("by computed numbers")
        return self.growth.batch() if counts(factor) else self.emit(number, self.growth.value(factor), index)

    def shape(self, index: int = 0) -> tuple[int, ...]:
        """Shape of an operand for the example."""
        return self.growth.shape(self._input(index))

    def dtype(self, index: int = 0) -> str:
        """Numpy's name of an operand's type."""
        return self.growth.dtype(self._input(index))

    @property
    def output(self) -> tuple[int, ...]:
        """Shape of the first output for the example."""
        return self.growth.shape(self.node.outputs[0])

    @property
    def rank(self) -> int:
        """Dimensions of the first operand."""
        return len(self.shape())

    def axis(self, default: int = 0) -> int:
        """The attribute ``axis``, counted from the front."""
        return int(self.attribute("axis", default)) % max(self.rank, 1)

    def emit(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        """A call of `target` in the torch graph."""
        return self.growth.graph.call_function(target, args)

    def several(self, results: fx.Node, count: int) -> list[fx.Node]:
        """The members of a tuple."""
        return [self.emit(operator.getitem, results, k) for k in range(count)]

    def refusal(self, how: str) -> Untrainable:
        """That there is no rule for this use of the operator."""
        return Untrainable(f"slimline has no rule to train {self.node.op_type} {how} ({self.node.name})")

    def _input(self, index: int) -> ir.Value:
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        if value is None:
            raise self.refusal(f"without operand {index}")
        return value


def number(array: Tensor, index: int) -> int:
    """One of the numbers of a tensor, or the only one."""
    return int(array.reshape(-1)[min(index, array.numel() - 1)])


Rule = Callable[[Call], fx.Node | Sequence[fx.Node]]
RULES: dict[str, Rule] = {}


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Register how these ONNX operators are written in torch."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators, function))
        return function

    return register


def plain(function: Callable[..., Any], **defaults: Any) -> Rule:
    """A function of all operands, and of these attributes behind them."""

    def apply(call: Call) -> fx.Node:
        return call.emit(function, *call.tensors(), *(call.attribute(*each) for each in defaults.items()))

    return apply
