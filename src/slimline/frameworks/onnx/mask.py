"""The masked model of a plan: shapes stay, what would go is zero and left out of every statistic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import Array
from slimline.frameworks.onnx.native import Editor, Native, reduce_node
from slimline.frameworks.onnx.operators import attribute, float_array, named, standard, stored
from slimline.frameworks.onnx.rewrite import Surgery, place_of
from slimline.graph.ir import Node
from slimline.graph.removal import Removal

_DIVISORS = {"Div": 1, "Mod": 1, "Reciprocal": 0, "Pow": 0, "Log": 0}
"""Operators that make no number of a zero, and the argument of which they do not."""
_FILLS = {"ReduceMax": -math.inf, "ReduceLogSumExp": -math.inf, "ReduceMin": math.inf, "ReduceProd": 1.0}

Statistics = list[tuple[int, int, Array]]
"""Input index, dimension and keep mask, as `Removal.statistics` gives them."""


def mask(native: Native, plan: Removal) -> Native:
    """A copy of the same shapes that computes what `apply` would.

    Positions that go are zero in every stored tensor of real numbers. Operators that average, normalise, contract or
    take a maximum over positions that go are made to see only those that stay.
    """
    editor = Editor(native)
    surgery = Surgery(editor, plan)
    for name, array in native.tensors.items():
        retained = plan.retained(name)
        if float_array(array) and any(index is not None for index in retained):
            surgery.unshare(name)
            zeroed = array.copy()
            for dim, index in enumerate(retained):
                if index is not None:
                    gone = np.setdiff1d(np.arange(array.shape[dim]), index)
                    zeroed[(slice(None),) * dim + (gone,)] = 0
            editor.put(name, zeroed)
    neutral = {node.name: node for node in plan.graph.nodes}
    for node in list(editor.graph):
        step = neutral.get(named(node))
        if step is None:
            continue
        if statistics := plan.statistics(step.name):
            _Masker(editor, plan, step, node, statistics).run()
        elif standard(node) and node.op_type in _DIVISORS:
            _Masker(editor, plan, step, node, []).fill_divisor(_DIVISORS[node.op_type])
    return editor.done()


class _Masker:
    """Makes one operator see only what stays."""

    def __init__(self, editor: Editor, plan: Removal, neutral: Node, node: ir.Node, statistics: Statistics) -> None:
        self.editor, self.plan, self.neutral, self.node, self.statistics = editor, plan, neutral, node, statistics

    def run(self) -> None:
        """Change the operator, or refuse."""
        handlers: dict[str, Callable[[], None]] = {
            "layer_norm": self._norm,
            "group_norm": self._norm,
            "reduce": self._reduce,
            "softmax": self._softmax,
            "matmul": lambda: self._fill(0.0),
            "einsum": lambda: self._fill(0.0),
        }
        if self.neutral.kind not in handlers:
            raise SlimlineError(f"slimline cannot mask {self.neutral.label}: apply the plan, or keep that layer.")
        handlers[self.neutral.kind]()

    def _place(self, index: int) -> int:
        """Which input of the operator an input of the neutral one is."""
        name = self.neutral.inputs[index]
        return next(k for k, v in enumerate(self.node.inputs) if v is not None and v.name == name)

    def _constant(self, array: Array) -> ir.Value:
        return self.editor.constant(array, f"{self.node.outputs[0].name}_mask")

    def _kind(self) -> np.dtype[np.generic]:
        """Of the numbers that the operator reads."""
        return np.dtype(self.plan.graph.values[self.neutral.inputs[0] or ""].dtype)

    def _shape(self, index: int) -> tuple[int, ...]:
        return self.plan.graph.values[self.neutral.inputs[index] or ""].shape

    def _gone(self, index: int, dim: int, keep: Array) -> ir.Value:
        """Where the positions that go are, shaped to broadcast against the input."""
        shape = [1] * len(self._shape(index))
        shape[dim] = -1
        return self._constant(~keep.reshape(shape))

    def _filled(self, place: int, gone: ir.Value, value: float) -> None:
        number = self._constant(np.array(value, self._kind()))
        result = self.editor.insert(self.node, "Where", [gone, number, self.node.inputs[place]])
        self.node.replace_input_with(place, result)

    def _fill(self, value: float) -> None:
        """Overwrite what goes in the operands, so that the operator is not moved by it."""
        places = {index: self._place(index) for index, _, _ in self.statistics}
        for index, dim, keep in self.statistics:
            self._filled(places[index], self._gone(index, dim, keep), value)

    def fill_divisor(self, position: int) -> None:
        """Put ones for what goes into an argument that must not be zero."""
        held = self.node.inputs[position]
        names = [name for name in self.neutral.inputs if held is not None and name == held.name]
        if not names:
            return
        index = self.neutral.inputs.index(names[0])
        for dim, retained in enumerate(self.plan.retained(names[0] or "")):
            if retained is not None:
                keep = np.isin(np.arange(self._shape(index)[dim]), retained)
                self._filled(position, self._gone(index, dim, keep), 1.0)

    def _reduce(self) -> None:
        self._fill(_FILLS.get(self.node.op_type, 0.0))
        if self.node.op_type == "ReduceMean":
            factor = math.prod(len(keep) / int(keep.sum()) for _, _, keep in self.statistics)
            number = self._constant(np.array(factor, self._kind()))
            output = self.node.outputs[0]
            name, ends = str(output.name), output.is_graph_output()
            readers = {user for user, _ in output.uses()}
            result = self.editor.append(self.node, "Mul", [output, number])
            scale = result.producer()
            assert scale is not None
            if readers or ends:
                self.editor.redirect(output, result, keep=[scale])
            self.editor.values.setdefault(name, output)

    def _softmax(self) -> None:
        self._fill(-math.inf)
        if self.node.op_type == "LogSoftmax":  # no number of what goes may be infinite behind it
            gone = [self._gone(index, dim, keep) for index, dim, keep in self.statistics]
            zero = self._constant(np.array(0, self._kind()))
            output = self.node.outputs[0]
            for where in gone:
                last = output.producer()
                assert last is not None
                result = self.editor.append(last, "Where", [where, zero, output])
                own = result.producer()
                assert own is not None
                self.editor.redirect(output, result, keep=[own])
                output = result

    def _norm(self) -> None:
        """The same norm with its mean and variance over what stays."""
        editor, node = self.editor, self.node
        shape = self._shape(0)
        groups = 0
        keep = np.ones(shape[1:], self._kind())
        for _, dim, retained in self.statistics:
            sides = [1] * len(keep.shape)
            sides[dim - 1] = -1
            keep = keep * retained.reshape(sides)
        x = node.inputs[0]
        assert x is not None
        if self.neutral.kind == "group_norm":
            groups = int(attribute(node, "num_groups", shape[1]))
            keep = keep.reshape(groups, -1)
            x = editor.insert(node, "Reshape", [x, self._constant(np.array([0, groups, -1], np.int64))])
            axes: Sequence[int] = [2]
        else:
            first = int(attribute(node, "axis", -1)) % len(shape)
            keep = keep[(0,) * (first - 1)]
            axes = list(range(first, len(shape)))
        total = math.prod(keep.shape[-1:] if groups else keep.shape)
        stays = keep.sum(tuple(range(-len(axes), 0)), keepdims=True)
        ratio = self._constant((total / np.maximum(stays, 1)).astype(keep.dtype))
        held = self._constant(keep)

        def mean(value: ir.Value) -> ir.Value:
            result = reduce_node(editor, node, "ReduceMean", value, axes)
            return editor.insert(node, "Mul", [result, ratio])

        centre = editor.insert(node, "Mul", [x, held])
        if node.op_type != "RMSNormalization":
            moved = editor.insert(node, "Sub", [x, mean(centre)])
            centre = editor.insert(node, "Mul", [moved, held])
        variance = mean(editor.insert(node, "Mul", [centre, centre]))
        eps = self._constant(np.array(attribute(node, "epsilon", 1e-5), keep.dtype))
        spread = editor.insert(node, "Sqrt", [editor.insert(node, "Add", [variance, eps])])
        value = editor.insert(node, "Div", [centre, spread])
        if groups:
            sizes = editor.insert(node, "Shape", [node.inputs[0]])
            value = editor.insert(node, "Reshape", [value, sizes])
        for operator, vector in zip(("Mul", "Add"), node.inputs[1:3], strict=False):
            if vector is not None:
                value = editor.insert(node, operator, [value, self._spread(vector, len(shape), groups)])
        place_of(editor, node, value)

    def _spread(self, vector: ir.Value, rank: int, groups: int) -> ir.Value:
        """A scale or shift, shaped to broadcast against what is normalised."""
        if not groups:
            return vector
        content = stored(vector)
        assert content is not None
        return self._constant(content.reshape(-1, *[1] * (rank - 2)))
