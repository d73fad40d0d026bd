"""A road from ONNX to TensorFlow functions, and so from every framework that writes ONNX to LiteRT.

`to_function` has TensorFlow trace the graph operator by operator; each ONNX operator has a rule (`call`), and values
keep the order of dimensions in which their maker left them (`layout`). Rounding to integer grids becomes TensorFlow's
own fake quantization, from which LiteRT's converter takes every scale. What a rule cannot say is refused; what it says
wrongly does not pass the gate of `slimline.model.lowering`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from slimline.basics.errors import SlimlineError, first_line
from slimline.basics.quiet import quiet
from slimline.runtimes.forms import onnx as form
from slimline.runtimes.forms.onnx_dynamic import leave_to_runtime
from slimline.runtimes.forms.onnx_graph import DOMAIN, FAKE_QUANTIZE, attribute
from slimline.runtimes.forms.onnx_weights import unmark
from slimline.runtimes.forms.tensorflow import Function, apart, tensorflow

_MOVES = {"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Expand", "MaxPool", "Identity"}
"""Operators whose results lie on the grid of their first operand."""
_FUSED = {"Relu", "Clip"}
"""What LiteRT computes within the operator before."""
_BYTE = 8
_SIGNS = 2
_PRODUCTS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_WEIGHTED = {*_PRODUCTS, "Einsum"}
_SUMS = {"Add", "Sub", "Mul", "Max", "Min"}
_WIDE = {
    *_PRODUCTS, *_SUMS, *_MOVES, "Relu", "LeakyRelu", "AveragePool", "GlobalAveragePool", "ReduceMean", "ReduceSum",
    "Resize", "Pad", "Gather",
}  # fmt: skip
"""Operators that have kernels of 16 bits."""


def to_function(model: ir.Model, marked: Collection[str] = ()) -> Function:
    """The network of an ONNX model, as TensorFlow traces it.

    Parameters
    ----------
    marked : stored tensors that a rounding operator marks, which is left out.

    Raises
    ------
    SlimlineError : an operator, or a use of one, that TensorFlow Lite has not; names the layer.
    """
    tf = tensorflow()
    with quiet():
        from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    form.name_nodes(model.graph)
    leave_to_runtime(model.graph)
    unmark(model.graph, marked)
    translation = _Translation(model)
    specs = [
        tf.TensorSpec([n if isinstance(n, int) else None for n in value.shape or ()], value.dtype.numpy(), f"input_{i}")
        for i, value in enumerate(model.graph.inputs)
        if value.dtype is not None
    ]
    inputs = {f"input_{i}": str(value.name) for i, value in enumerate(model.graph.inputs)}
    with quiet():
        traced = tf.function(translation.run, autograph=False).get_concrete_function(*specs)
        names = tuple(str(value.name) for value in model.graph.outputs)
        return Function(convert_variables_to_constants_v2(traced), inputs, translation.layers(), names)


class _Translation:
    """The walk through a graph."""

    def __init__(self, model: ir.Model) -> None:
        # Rules import TensorFlow, which takes seconds, so they are imported when a model comes.
        from slimline.runtimes.forms.onnx_tensorflow import (  # noqa: F401
            rules_elementwise,
            rules_kernels,
            rules_moves,
            rules_recurrent,
            rules_resize,
        )
        from slimline.runtimes.forms.onnx_tensorflow.call import RULES

        self.graph, self.rules = model.graph, RULES
        self.opset = model.opset_imports.get("", 20)

    def layers(self) -> dict[str, bool]:
        """By layer, whether it has a kernel."""
        layers: dict[str, bool] = {}
        for node in self.graph:
            layer, slash, _ = str(node.name).rpartition("/")
            if slash:
                layers.setdefault(layer, False)
            elif node.op_type in form.WEIGHTED:  # of layers with a weight the name is the whole
                layers[str(node.name)] = True
        return layers

    def run(self, *inputs: Any) -> list[Any]:
        """The outputs of the graph for TensorFlow's `inputs`."""
        from slimline.runtimes.forms.onnx_tensorflow.layout import placed

        values: dict[ir.Value, Any] = {
            value: placed(tensor) for value, tensor in zip(self.graph.inputs, inputs, strict=True)
        }
        for name, value in self.graph.initializers.items():
            if value.const_value is None:
                raise SlimlineError(f"The tensor {name} has no content: write the model again.")
            values[value] = value.const_value.numpy()
        for node in self.graph:
            for output, result in zip(node.outputs, self._results(node, values), strict=False):
                values[output] = result
        return [self._output(value, values) for value in self.graph.outputs]

    def _output(self, value: ir.Value, values: Mapping[ir.Value, Any]) -> Any:
        import tensorflow as tf

        from slimline.runtimes.forms.onnx_tensorflow.layout import Placed, Rounded, Sizes

        result = values[value]
        if isinstance(result, Placed):
            # TensorFlow drops outputs that are inputs as they came.
            return tf.identity(result.plain)
        if isinstance(result, Rounded):
            return result.laid_out(range(result.array.ndim))
        return result.tensor if isinstance(result, Sizes) else tf.constant(result)

    def _results(self, node: ir.Node, values: Mapping[ir.Value, Any]) -> list[Any]:
        """What an operator gives."""
        import tensorflow as tf

        from slimline.runtimes.forms.onnx_tensorflow.call import Call, Untranslatable
        from slimline.runtimes.forms.onnx_tensorflow.layout import Placed

        operands = tuple(None if value is None else values[value] for value in node.inputs)
        alone = node.op_type != FAKE_QUANTIZE and self._is_apart(node, operands)
        if alone:
            operands = tuple(_apart(x) for x in operands)
        if node.op_type == FAKE_QUANTIZE and node.domain == DOMAIN:
            return [self._rounded(node, operands[0])]
        rule = self.rules.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if rule is None:
            raise SlimlineError(
                f"LiteRT has no {node.domain and node.domain + '::'}{node.op_type}, which {node.name} needs: express "
                "that part of the model by common operators."
            )
        grid = self._grid(node.inputs[0]) if node.inputs else None
        call = Call(
            node,
            operands,
            reads_grid=grid is not None and grid.bits <= _BYTE,
            gives_grid=_rounded_next(node.outputs[0]),
            floor=float(grid.ends[0]) if grid is not None and grid.per_tensor else None,
            opset=self.opset,
        )
        stored = node.op_type != "Constant" and all(isinstance(x, np.ndarray | None) for x in operands)
        try:
            if stored and operands:  # of stored tensors alone: computed now
                with tf.init_scope():
                    results = _listed(rule(call))
                    results = [np.asarray(x.plain.numpy()) if isinstance(x, Placed) else x for x in results]
            else:
                with tf.name_scope(_scope(str(node.name))):
                    results = _listed(rule(call))
            if alone and _rounded_wide(node.outputs[0]):
                results = [_apart(each) for each in results]
            for output in node.outputs[len(results) :]:
                if output.uses() or output.is_graph_output():
                    raise Untranslatable(f"result {output.index()} of {node.op_type}")
        except Untranslatable as error:
            raise SlimlineError(f"LiteRT has no {error}, which {node.name} needs: express it otherwise.") from error
        except (ValueError, TypeError, tf.errors.OpError) as error:
            raise SlimlineError(
                f"LiteRT has no such {node.op_type}, which {node.name} needs: express it otherwise "
                f"({first_line(error)})."
            ) from error
        return results

    def _rounded(self, node: ir.Node, x: Any) -> Any:
        """What rounding to a grid gives."""
        import tensorflow as tf

        from slimline.runtimes.forms.onnx_tensorflow.layout import Placed, Rounded

        grid = form.grid_of(node)
        if isinstance(x, np.ndarray):
            return Rounded(x, grid)
        if grid.bits == _SIGNS:  # of the two numbers that a comparison picks; LiteRT has bytes alone
            grid = replace(grid, bits=_BYTE, narrow=False)
        low, high = (float(end) for end in grid.ends)
        y = tf.quantization.fake_quant_with_min_max_args(
            x.tensor, low, high, num_bits=grid.bits, narrow_range=grid.narrow
        )
        return Placed(y, x.order)

    def _is_apart(self, node: ir.Node, operands: Sequence[Any]) -> bool:
        """Whether LiteRT has to compute an operator in float though it reads or gives numbers on grids: a product by
        a float weight, and beside numbers of 16 bits what has no such kernel."""
        grids = [self._grid(value) for value in node.inputs]
        if node.op_type in _WEIGHTED and any(isinstance(x, np.ndarray) for x in operands[:2]):
            return any(grid is not None for grid in grids[:2]) or _rounded_wide(node.outputs[0])
        wide = any(grid is not None and grid.bits > _BYTE for grid in grids) or _rounded_wide(node.outputs[0])
        return wide and not self._is_wide(node, operands)

    def _is_wide(self, node: ir.Node, operands: Sequence[Any]) -> bool:
        """Whether LiteRT computes an operator with 16 bits, where it reads and gives such."""
        from slimline.runtimes.forms.onnx_tensorflow.layout import Placed, Rounded

        maker = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        if node.op_type == "Clip":  # which it has as part of the operator before alone
            return maker is not None and maker.op_type in (_PRODUCTS | _SUMS) - {"Max", "Min"}
        if node.op_type in _PRODUCTS:
            return isinstance(operands[1], Placed | Rounded)
        return node.op_type in _WIDE and (node.op_type not in _SUMS or all(isinstance(x, Placed) for x in operands))

    def _grid(self, value: ir.Value | None) -> Any:
        """The grid that a value lies on, or None."""
        for node in _makers(value):
            if node.op_type == FAKE_QUANTIZE:
                return form.grid_of(node)
        return None


def _apart(operand: Any) -> Any:
    """`slimline.runtimes.forms.tensorflow.apart` of what an operator reads."""
    from slimline.runtimes.forms.onnx_tensorflow.layout import Placed

    return replace(operand, tensor=apart(operand.tensor)) if isinstance(operand, Placed) else operand


def _listed(results: Any) -> list[Any]:
    """What a rule gives, as a list."""
    return list(results) if isinstance(results, list | tuple) else [results]


def _rounded_next(value: ir.Value) -> bool:
    """Whether all that is made of a value is rounded to a grid, after what fuses with its maker."""
    users = [user for user, _ in value.uses()]
    if len(users) != 1 or value.is_graph_output():
        return False
    return users[0].op_type == FAKE_QUANTIZE or (users[0].op_type in _FUSED and _rounded_next(users[0].outputs[0]))


def _rounded_wide(value: ir.Value) -> bool:
    """Whether something is made of a value by rounding to more than 8 bits, after what fuses with its maker."""
    return any(
        form.grid_of(user).bits > _BYTE
        if user.op_type == FAKE_QUANTIZE and attribute(user, "dynamic", None) is None
        else user.op_type in _FUSED and _rounded_wide(user.outputs[0])
        for user, _ in value.uses()
    )


def _makers(value: ir.Value | None) -> Iterator[ir.Node]:
    """What made a value, back through operators that only move numbers."""
    node = None if value is None else value.producer()
    while node is not None:
        yield node
        if node.op_type not in _MOVES or node.inputs[0] is None:
            return
        node = node.inputs[0].producer()


def _scope(name: str) -> str:
    """A name as TensorFlow takes one; `slimline.runtimes.forms.flatbuffer` finds the layer in it."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-/") else "_" for c in name).lstrip("_-/") or "layer"
