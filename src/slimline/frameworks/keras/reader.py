"""The neutral graph of a Keras model in the making: what rules ask for, and what they add."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras.src import backend  # compute_output_spec has no public name

from slimline.frameworks.keras.canonical import ACTIVATION
from slimline.frameworks.keras.functional import (
    Call,
    calls,
    dense,
    frozen,
    input_name,
    is_array,
    is_constant,
    stored,
    weights,
)
from slimline.graph import ops
from slimline.graph.ir import Graph, Node, Value

Array = np.ndarray


class NoRule(Exception):
    """Raised by a rule, before it has added anything, for a call that it does not cover."""


class Reader:
    """The graph in the making; rules ask it for names and shapes and add nodes."""

    def __init__(self, native: keras.Model, example: tuple[Array, ...]) -> None:
        self.native = native
        self.calls = calls(native)
        self.batch = example[0].shape[0]
        self.nodes: list[Node] = []
        self.values: dict[str, Value] = {}
        self._names: dict[int, str] = {}
        self._shapes: dict[int, tuple[int, ...]] = {}
        self._parameters = {id(v): name for name, v in stored(native).items()}
        self._layers = {call.operation.name for call in self.calls}
        self._stored = {*self._parameters.values(), *(name for call in self.calls for name in call.constants)}
        for name, variable in stored(native).items():
            self.values[name] = Value(name, tuple(variable.shape), keras.backend.standardize_dtype(variable.dtype))
        self._trace(example)

    def _trace(self, example: tuple[Array, ...]) -> None:
        """Shapes of all activations for inputs of the example's sizes."""
        concrete: dict[int, Any] = {}
        for tensor, array in zip(self.native.inputs, example, strict=True):
            concrete[id(tensor)] = keras.KerasTensor(array.shape, tensor.dtype)
            self._add(tensor, input_name(tensor), concrete[id(tensor)])
        for call in self.calls:
            if call.is_input:
                continue
            args, kwargs = keras.tree.map_structure(lambda a: concrete.get(id(a), a), (call.args, dict(call.kwargs)))
            specs = keras.tree.flatten(call.operation.compute_output_spec(*args, **kwargs))
            if any(None in s.shape for s in specs):  # a layer that states less than it could: trace it
                specs = keras.tree.flatten(backend.compute_output_spec(call.operation.call, *args, **kwargs))
            for tensor, name, spec in zip(call.outputs, call.names, specs, strict=True):
                concrete[id(tensor)] = dense(spec)
                self._add(tensor, name, spec)
            for name, array in call.constants.items():
                self.values[name] = Value(name, array.shape, str(array.dtype))

    def _add(self, tensor: Any, name: str, spec: Any) -> None:
        self._names[id(tensor)] = name
        self._shapes[id(tensor)] = tuple(int(n) for n in spec.shape)
        self.values[name] = Value(name, self._shapes[id(tensor)], spec.dtype)

    def graph(self) -> Graph:
        """All that was added."""
        constants = [name for call in self.calls for name in call.constants]
        return Graph(
            nodes=tuple(self.nodes),
            values=self.values,
            parameters=(*self._parameters.values(), *constants),
            trainable=frozenset(weights(self.native)),
            frozen=frozenset(frozen(self.native)),
            inputs=tuple(self._names[id(t)] for t in self.native.inputs),
            outputs=tuple(self._names[id(t)] for t in self.native.outputs),
            batch=self.batch,
        )

    # -- what rules ask for ------------------------------------------------------------

    def shape(self, tensor: Any) -> tuple[int, ...]:
        """Sizes of a `KerasTensor`, batch included."""
        return self._shapes[id(tensor)]

    def name(self, tensor: Any) -> str:
        """Name of the value that a `KerasTensor` is."""
        return self._names[id(tensor)]

    def parameter(self, variable: Any) -> str | None:
        """Name of a layer's variable; None for None."""
        return None if variable is None else self._parameters[id(variable)]

    def single(self, call: Call) -> tuple[str, tuple[int, ...]]:
        """Name and shape of the only input of a call."""
        if len(call.inputs) != 1:
            raise NoRule(f"slimline has no rule for it with {len(call.inputs)} inputs")
        return self.name(call.inputs[0]), self.shape(call.inputs[0])

    def stored(self, name: str) -> bool:
        """Whether a value is a parameter or a constant and not computed."""
        return name in self._stored

    def value(self, name: str) -> tuple[int, ...]:
        """Sizes of a value by its name."""
        return self.values[name].shape

    def argument(self, call: Call, name: str) -> Any:
        """An argument of a call by its name in the operation's `call`; None where it is not given."""
        return inspect.signature(call.operation.call).bind(*call.args, **call.kwargs).arguments.get(name)

    def operand(self, call: Call, argument: Any) -> tuple[str, tuple[int, ...]]:
        """Name and shape of a tensor, or a constant, that is an argument of a call."""
        if isinstance(argument, keras.KerasTensor):
            return self.name(argument), self.shape(argument)
        arrays = [a for a in keras.tree.flatten((call.args, dict(call.kwargs))) if is_constant(a)]
        indices = [i for i, array in enumerate(arrays) if array is argument]
        if not indices:
            raise NoRule("slimline has no rule for it with an array of integers")
        return call.constant_name(indices[0]), tuple(argument.shape)

    def operands(self, call: Call) -> tuple[list[str], list[tuple[int, ...]]]:
        """Names and shapes of all tensors among a call's arguments, stored constants included."""
        names, shapes = [], []
        for argument in keras.tree.flatten((call.args, dict(call.kwargs))):
            if isinstance(argument, keras.KerasTensor) or is_array(argument):
                name, shape = self.operand(call, argument)
                names.append(name)
                shapes.append(shape)
        return names, shapes

    # -- what rules do -----------------------------------------------------------------

    def node(self, call: Call, kind: str, inputs: Sequence[str | None], attributes: ops.Attributes) -> None:
        """Add the one node of a call."""
        self.part(call, call.name, kind, inputs, call.names, attributes)

    def chain(self, call: Call, source: str, steps: Sequence[tuple[str, ops.Attributes, tuple[int, ...]]]) -> None:
        """Add nodes that work one after the other on `source`; each step is kind, attributes, output shape.

        The last makes the call's output; those before it make ``name/0``, ``name/1`` ….
        """
        for i, (kind, attributes, shape) in enumerate(steps):
            last = i == len(steps) - 1
            name = call.name if last else f"{call.name}/{i}"
            output = call.names[0] if last else self.intermediate(name, shape, source)
            self.part(call, name, kind, [source], [output], attributes)
            source = output

    def intermediate(self, name: str, shape: tuple[int, ...], like: str) -> str:
        """Declare a value that no Keras tensor stands for."""
        self.values[name] = Value(name, shape, self.values[like].dtype)
        return name

    def unknown(self, call: Call, reason: str) -> None:
        """Add a node that freezes all that the call reads, stores and makes."""
        variables = call.operation.variables if call.is_layer else []
        owned = [self._parameters[id(v)] for v in variables if id(v) in self._parameters]
        inputs = [*(self.name(t) for t in call.inputs), *owned, *call.constants]
        self.node(call, "unknown", inputs, ops.unknown(reason))

    def part(
        self,
        call: Call,
        name: str,
        kind: str,
        inputs: Sequence[str | None],
        outputs: Sequence[str],
        attributes: ops.Attributes,
    ) -> None:
        """Add one of several nodes of a call, under a name of its own."""
        owner = call.operation.name.removesuffix(ACTIVATION)
        layer = owner if owner in self._layers else call.operation.name
        target = type(call.operation).__name__
        self.nodes.append(Node(name, kind, tuple(inputs), tuple(outputs), attributes, layer, target))
