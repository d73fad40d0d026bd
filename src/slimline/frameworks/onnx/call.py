"""One ONNX operator on its way into the neutral graph: what a rule sees, and how it answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from slimline.frameworks.base import Array
from slimline.frameworks.onnx.operators import attribute, label, layer, stored
from slimline.graph.ir import Node, Value
from slimline.graph.ops import Attributes

Shape = tuple[int, ...]


class Call:
    """An operator with the shapes of one run.

    Parameters
    ----------
    values : all values of the graph; a rule of several steps adds those in between.
    opset : version of ONNX' operators.
    """

    def __init__(self, node: ir.Node, values: dict[str, Value], opset: int) -> None:
        self.node, self.opset = node, opset
        self.outputs = tuple(str(o.name) for o in node.outputs if o.name)
        self.emitted: list[Node] = []
        self._values = values

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute by its name; lists as lists."""
        value = attribute(self.node, name, default)
        return list(value) if isinstance(value, tuple) else value

    def value(self, index: int) -> str | None:
        """Name of an input; None where it is absent."""
        held = self.node.inputs[index] if index < len(self.node.inputs) else None
        return None if held is None else str(held.name)

    def tensors(self, *indices: int) -> list[str | None]:
        """Names of the inputs of these indices, absent ones None; without indices of all that are there."""
        if indices:
            return [self.value(index) for index in indices]
        return [str(v.name) for v in self.node.inputs if v is not None]

    def constant(self, index: int) -> Array | None:
        """The numbers of an input that is stored."""
        return stored(self.node.inputs[index]) if index < len(self.node.inputs) else None

    def is_stored(self, index: int) -> bool:
        """Whether an input is stored with the model."""
        return self.constant(index) is not None

    def numbers(self, name: str, index: int) -> list[int] | None:
        """Whole numbers of an attribute or of a stored input, whichever the version of the operator has; None where
        there are none."""
        numbers = self.attribute(name)
        if numbers is None:
            held = self.constant(index)
            return None if held is None else [int(n) for n in np.ravel(held)]
        return [int(n) for n in (numbers if isinstance(numbers, list) else [numbers])]

    def knows(self, value: str | None) -> bool:
        """Whether a name is a value of the neutral graph; arithmetic on sizes is none."""
        return value in self._values

    def shape(self, value: str | None) -> Shape:
        """Shape of a value."""
        return self._values[value].shape if value is not None else ()

    def dtype(self, value: str | None) -> str:
        """Numpy's name of a value's type."""
        return self._values[value].dtype if value is not None else ""

    @property
    def input(self) -> Shape:
        """Shape of the first tensor."""
        return self.shape(self.value(0))

    @property
    def rank(self) -> int:
        """Dimensions of the first tensor."""
        return len(self.input)

    @property
    def output(self) -> Shape:
        """Shape of the first output."""
        return self.shape(self.outputs[0])

    def axis(self, default: int = 0, rank: int | None = None) -> int:
        """The attribute ``axis``, counted from the front."""
        return int(self.attribute("axis", default)) % max(self.rank if rank is None else rank, 1)

    def emit(
        self,
        kind: str,
        inputs: Sequence[str | None],
        attributes: Attributes,
        outputs: tuple[str, ...] | None = None,
    ) -> None:
        """Answer with a neutral operator that makes `outputs` (all by default), called like the first of them."""
        outputs = self.outputs if outputs is None else outputs
        self.emitted.append(
            Node(outputs[0], kind, tuple(inputs), outputs, attributes, layer(self.node), label(self.node))
        )

    def between(self, kind: str, inputs: Sequence[str | None], attributes: Attributes, shape: Sequence[int]) -> str:
        """Emit a step before the last; the name of the value it makes, of `shape`."""
        name = f"{self.outputs[0]}/{len(self.emitted)}"
        self._values[name] = Value(name, tuple(shape), self._values[self.outputs[0]].dtype)
        self.emit(kind, inputs, attributes, (name,))
        return name
