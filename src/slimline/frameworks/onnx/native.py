"""The native model, an ONNX graph in canonical form that is never changed once it is made; and copies under change."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import Array
from slimline.frameworks.onnx.operators import is_number, layer, standard
from slimline.frameworks.onnx.run import Session, whole


class Native:
    """An ONNX model as slimline compresses it.

    Parameters
    ----------
    model : in canonical form, see `slimline.frameworks.onnx.canonical`; nobody else changes it.
    example : inputs of it.
    """

    def __init__(self, model: ir.Model, example: tuple[Array, ...]) -> None:
        self.model = model
        self.example = example

    @cached_property
    def session(self) -> Session:
        """It, loaded by ONNX Runtime."""
        return Session(whole(self.model))

    @property
    def free(self) -> Literal["none", "batch", "sizes"]:
        """Which sizes of its inputs may change."""
        if any(None in shape[1:] for shape in self.input_shapes):
            return "sizes"
        return "batch" if any(None in shape for shape in self.input_shapes) else "none"

    @property
    def input_shapes(self) -> list[tuple[int | None, ...]]:
        """Of each input, with None for sizes that may be any."""
        shapes = [value.shape or () for value in self.model.graph.inputs]
        return [tuple(size if isinstance(size, int) else None for size in shape) for shape in shapes]

    @cached_property
    def opset(self) -> int:
        """The version of ONNX' own operators."""
        return int(self.model.opset_imports[""])

    @cached_property
    def names(self) -> frozenset[str]:
        """Of its inputs and of all that it stores or computes."""
        graph = self.model.graph
        computed = (output.name for node in graph for output in node.outputs)
        names = (*(value.name for value in graph.inputs), *graph.initializers, *computed)
        return frozenset(name for name in names if name)

    @cached_property
    def tensors(self) -> dict[str, Array]:
        """Read-only arrays of all that is stored and no mere number of an operator, by name; of bfloat16, which numpy
        does not have, float32."""
        tensors = {}
        for name, value in self.model.graph.initializers.items():
            if value.const_value is None or not _is_data(value):
                continue
            array = value.const_value.numpy()
            array = array.astype(np.float32) if array.dtype.name == "bfloat16" else array.view()
            array.flags.writeable = False
            tensors[name] = array
        return tensors


def _is_data(value: ir.Value) -> bool:
    return value.is_graph_output() or any(not is_number(user, index) for user, index in value.uses())


class Editor:
    """A copy of a native model under change."""

    def __init__(self, native: Native) -> None:
        self.model = native.model.clone()
        self.graph = self.model.graph
        self.opset = native.opset
        self._example = native.example
        self.values: dict[str, ir.Value] = {str(v.name): v for v in self.graph.inputs}
        self.values |= dict(self.graph.initializers.items())
        self.values |= {str(o.name): o for node in self.graph for o in node.outputs if o.name}
        self._names = {str(node.name) for node in self.graph}

    def named(self, names: Iterable[str]) -> dict[str, ir.Value]:
        """The values of these names, if all are there."""
        values = {}
        for name in names:
            if name not in self.values:
                raise SlimlineError(f"The model computes no value called {name!r}: read its graph again.")
            values[name] = self.values[name]
        return values

    def constant(self, array: Array, name: str) -> ir.Value:
        """A new initializer, called `name` or much like it."""
        array = np.ascontiguousarray(array) if np.ndim(array) else np.asarray(array)
        name = self.unique(name)
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        self.values[name] = value
        return value

    def put(self, name: str, array: Array) -> None:
        """Another content of an initializer, in its own dtype."""
        value = self.values[name]
        assert value.const_value is not None
        content = np.ascontiguousarray(array).astype(value.const_value.dtype.numpy(), copy=False)
        value.const_value = ir.tensor(content, name=name, dtype=value.const_value.dtype)
        value.shape = ir.Shape(content.shape)

    def insert(
        self,
        before: ir.Node,
        operator: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Any] | None = None,
        name: str | None = None,
    ) -> ir.Value:
        """A new operator in front of another, as part of its layer; the value it makes."""
        return self._place(before, operator, inputs, attributes, name, self.graph.insert_before)

    def append(
        self,
        after: ir.Node,
        operator: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Any] | None = None,
        name: str | None = None,
    ) -> ir.Value:
        """A new operator behind another, as part of its layer; the value it makes."""
        return self._place(after, operator, inputs, attributes, name, self.graph.insert_after)

    def _place(
        self,
        at: ir.Node,
        operator: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Any] | None,
        name: str | None,
        place: Any,
    ) -> ir.Value:
        own = _unique(f"{layer(at)}/{operator}", self._names)
        self._names.add(own)
        output = self.unique(name or f"{at.outputs[0].name}_{operator}")
        node = ir.node(operator, inputs, attributes, name=own, metadata_props=dict(at.metadata_props))
        node.outputs[0].name = output
        place(at, node)
        self.values[output] = node.outputs[0]
        return node.outputs[0]

    def first(self) -> ir.Node:
        """The operator that runs first."""
        return next(iter(self.graph))

    def redirect(self, old: ir.Value, new: ir.Value, keep: Iterable[ir.Node] = ()) -> None:
        """Let all readers of a value, but those to `keep`, read another; an output of the model is it, too."""
        spared = set(keep)
        for user, index in list(old.uses()):
            if user not in spared:
                user.replace_input_with(index, new)
        for index, output in enumerate(self.graph.outputs):
            if output is old:
                self.output(index, new)

    def output(self, index: int, value: ir.Value) -> None:
        """Make `value` an output of the model, in the name that the output has."""
        old = self.graph.outputs[index]
        if value.is_graph_output() or value.is_graph_input() or value.is_initializer():
            last = list(self.graph)[-1]
            value = self.append(last, "Identity", [value])
        self.graph.outputs[index] = value
        name, other = str(old.name), str(value.name)
        value.shape, value.type = old.shape, old.type
        old.name = self.unique(f"{name}_before")
        value.name = name
        del self.values[other]
        self.values |= {str(old.name): old, name: value}

    def numbers(self, node: ir.Node, index: int, array: Array) -> None:
        """Other numbers for an input that holds such."""
        old = node.inputs[index] if index < len(node.inputs) else None
        dtype = np.int64 if old is None or old.const_value is None else old.const_value.dtype.numpy()
        value = self.constant(np.asarray(array).astype(dtype), f"{node.outputs[0].name}_{index}")
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        node.replace_input_with(index, value)

    def done(self) -> Native:
        """The changed model, without what no output needs."""
        RemoveUnusedNodesPass()(self.model)
        return Native(self.model, self._example)

    def rename(self, name: str, new: str) -> None:
        """Call an initializer `new`, or much like it; its tensor, which other copies share, is left as it is called."""
        value = self.values.pop(name)
        new = self.unique(new)
        if value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy(), name=new, dtype=value.const_value.dtype)
        value.name = new
        self.values[new] = value

    def unique(self, name: str) -> str:
        """The name, or one like it that no value has."""
        return _unique(name, self.values)


def _unique(name: str, taken: Container[str]) -> str:
    unique, count = name, 1
    while unique in taken:
        count += 1
        unique = f"{name}_{count}"
    return unique


def reduce_node(editor: Editor, before: ir.Node, operator: str, x: ir.Value, axes: Sequence[int]) -> ir.Value:
    """A reduction over `axes`, which stay with one position, as the model's version of ONNX writes it."""
    if operator == "ReduceSum" or editor.opset >= 18:
        numbers = editor.constant(np.array(list(axes), np.int64), f"{before.outputs[0].name}_axes")
        return editor.insert(before, operator, [x, numbers], {"keepdims": 1})
    return editor.insert(before, operator, [x], {"axes": list(axes), "keepdims": 1})


def is_standard(node: ir.Node, *names: str) -> bool:
    """Whether an operator is one of these of ONNX' own."""
    return standard(node) and node.op_type in names
