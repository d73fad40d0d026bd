"""One operator of an ONNX graph on its way to TensorFlow, and the table of rules that take it there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import tensorflow as tf

from slimline.runtimes.forms.onnx_tensorflow.layout import Array, Placed, Rounded, Sizes, Value, straight


class Untranslatable(Exception):
    """An operator, or a use of it, that TensorFlow Lite has not; its text says which."""


@dataclass(frozen=True)
class Call:
    """An operator with what it reads.

    Attributes
    ----------
    node : of the ONNX graph.
    inputs : its operands; None where one is left out.
    reads_grid, gives_grid : whether its first operand lies on an integer grid of 8 bits, and its result is rounded to
        one next.
    floor : the lowest number of the grid of its first operand, or None.
    opset : of the standard operators.
    """

    node: ir.Node
    inputs: tuple[Value, ...]
    reads_grid: bool = False
    gives_grid: bool = False
    floor: float | None = None
    opset: int = 20

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute of the operator."""
        value = self.node.attributes.get(name)
        return default if value is None else value.value

    def has(self, index: int) -> bool:
        """Whether an operand is there."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def operand(self, index: int) -> Placed:
        """An operand as a computed value."""
        value = self.inputs[index]
        if isinstance(value, Placed):
            return value
        tensor = value.tensor if isinstance(value, Sizes) else self._stored(index)
        return Placed(tensor, straight(len(tensor.shape)))

    def tensor(self, index: int) -> Any:
        """An operand as a tensor in the order of ONNX."""
        return self.operand(index).plain

    def constant(self, index: int) -> Array:
        """An operand that is stored."""
        value = self.inputs[index]
        if isinstance(value, np.ndarray):
            return value
        if isinstance(value, Sizes) and all(isinstance(v, int) for v in value.values):
            return np.array(value.values[0] if value.scalar else value.values, np.int64)
        raise Untranslatable(f"{self.node.op_type} with a computed operand {index}")

    def numbers(self, index: int, name: str = "") -> list[int] | None:
        """Whole numbers that are an attribute `name` in old opsets and operand `index` in new ones; None for none."""
        if name and self.attribute(name) is not None:
            return [int(n) for n in self.attribute(name)]
        return [int(n) for n in np.atleast_1d(self.constant(index))] if self.has(index) else None

    def _stored(self, index: int) -> Any:
        value = self.inputs[index]
        if isinstance(value, Rounded):
            return value.laid_out(range(value.array.ndim))
        assert value is not None
        return tf.constant(value)


Rule = Callable[[Call], Value | Sequence[Value]]
RULES: dict[str, Rule] = {}


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Register how these ONNX operators are written in TensorFlow."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators, function))
        return function

    return register
