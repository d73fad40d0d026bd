"""Activations that are rounded when the model runs: how an ONNX file says it so that ONNX Runtime computes in integers.

`expand` writes each such rounding as DynamicQuantizeLinear and DequantizeLinear. A product that reads one and has its
weight stored as codes becomes MatMulInteger by `integer_product`, in the pattern that ONNX Runtime fuses. An LSTM whose
weights are marked becomes ``com.microsoft::DynamicQuantizeLSTM``, the runtime's own, by `pack_recurrent`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from slimline.basics.errors import SlimlineError
from slimline.methods.formats import Array, Format, IntegerGrid
from slimline.runtimes.forms.onnx_graph import FAKE_QUANTIZE, MARK, replace

RUNTIME_DOMAIN = "com.microsoft"
_LSTM_INPUTS = 8
Store = Callable[[Array, str], ir.Value]
"""Keeps an array as an initializer, named after a word."""


def expand(graph: ir.Graph) -> None:
    """Write rounding to grids that are made at run time by standard operators, in place."""
    for node in list(graph):
        if node.op_type == FAKE_QUANTIZE and "dynamic" in node.attributes:
            rounded = ir.node("DynamicQuantizeLinear", [node.inputs[0]], num_outputs=3, name=f"{node.name}_rounded")
            real = ir.node("DequantizeLinear", rounded.outputs, name="")
            replace(graph, node, [rounded, real])


def leave_to_runtime(graph: ir.Graph) -> None:
    """Take out rounding to grids that are made at run time, in place: for runtimes that round by themselves."""
    for node in list(graph):
        if node.op_type == FAKE_QUANTIZE and "dynamic" in node.attributes:
            replace(graph, node, [], node.inputs[0])


def dynamic_source(value: ir.Value | None) -> ir.Node | None:
    """The DynamicQuantizeLinear behind a value that `expand` made."""
    real = None if value is None else value.producer()
    codes = real.inputs[0] if real is not None and real.op_type == "DequantizeLinear" else None
    source = None if codes is None else codes.producer()
    return source if source is not None and source.op_type == "DynamicQuantizeLinear" else None


def integer_product(
    reader: ir.Node, rounded: ir.Node, codes: ir.Value, scale: ir.Value, bias: ir.Value | None
) -> list[ir.Node]:
    """The operators that take the place of a product of `rounded` and the matrix ``(inputs, outputs)`` of `codes`."""
    x, x_scale, x_zero = rounded.outputs
    product = ir.node("MatMulInteger", [x, codes, x_zero], name=str(reader.name))
    real = ir.node("Cast", product.outputs, {"to": ir.DataType.FLOAT}, name="")
    both = ir.node("Mul", [x_scale, scale], name="")
    nodes = [product, real, both, ir.node("Mul", [real.outputs[0], both.outputs[0]], name="")]
    if bias is not None:
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], bias], name=""))
    return nodes


def pack_recurrent(model: ir.Model, weights: Mapping[str, Format]) -> None:
    """Store the codes of marked weights of LSTMs and let the runtime's own operator read them, in place.

    Raises
    ------
    SlimlineError : weights of one LSTM of which only some are marked, or are changed on the way to it.
    """
    graph = model.graph
    for node in list(graph):
        if node.op_type != "LSTM" or not all(_marks(value, weights) for value in node.inputs[1:3]):
            continue
        inputs = [*node.inputs, *[None] * (_LSTM_INPUTS - len(node.inputs))]
        for index, what in ((1, "input"), (2, "state")):
            codes, scale = _read(model, node.inputs[index], weights)
            stem = f"{node.name}_{what}"
            inputs[index] = _stored(graph, codes, f"{stem}_codes")
            inputs += [
                _stored(graph, scale, f"{stem}_scale"), _stored(graph, np.zeros(scale.shape, np.int8), f"{stem}_zero")
            ]  # fmt: skip
        own = ir.Node(
            RUNTIME_DOMAIN,
            "DynamicQuantizeLSTM",
            inputs,
            [attribute for name, attribute in node.attributes.items() if name != "layout"],
            num_outputs=len(node.outputs),
            name=str(node.name),
        )
        model.opset_imports[RUNTIME_DOMAIN] = 1
        graph.insert_before(node, own)
        for old, new in zip(node.outputs, own.outputs, strict=True):
            new.name, new.shape, new.type, old.name = old.name, old.shape, old.type, None
            for user, index in list(old.uses()):
                user.replace_input_with(index, new)
            for index, output in enumerate(graph.outputs):
                if output is old:
                    graph.outputs[index] = new
        graph.remove(node, safe=True)


def _stored(graph: ir.Graph, array: Array, name: str) -> ir.Value:
    while name in graph.initializers:
        name += "_"
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _marks(value: ir.Value | None, weights: Mapping[str, Format]) -> list[tuple[ir.Node, str]]:
    """The marked weights that a value is computed of, and their names."""
    marked = []
    for node in _makers(value):
        source = node.inputs[0] if node.op_type == FAKE_QUANTIZE else None
        if source is not None and (name := str(source.metadata_props.get(MARK, source.name))) in weights:
            marked.append((node, name))
    return marked


def _makers(value: ir.Value | None) -> list[ir.Node]:
    """What a value is computed by, in the order in which it runs; nothing behind marks."""
    seen: dict[ir.Node, None] = {}

    def visit(each: ir.Value | None) -> None:
        node = None if each is None else each.producer()
        if node is None or node in seen:
            return
        for source in () if node.op_type == FAKE_QUANTIZE else node.inputs:
            visit(source)
        seen[node] = None

    visit(value)
    return list(seen)


def _read(model: ir.Model, value: ir.Value | None, weights: Mapping[str, Format]) -> tuple[Array, Array]:
    """Codes int8 ``(directions, inputs, rows)`` and scales float32 ``(directions, rows)`` of what an LSTM reads, which
    lies ``(directions, rows, inputs)``: moved as the weights that it is made of are."""
    assert value is not None
    marks = _marks(value, weights)
    codes, scales = {}, {}
    for node, name in marks:
        each, source = weights[name], node.inputs[0]
        assert source is not None and source.const_value is not None and isinstance(each, IntegerGrid)
        weight = source.const_value.numpy()
        codes[node] = each.encode(weight).astype(np.float32)
        scales[node] = np.broadcast_to(each.scale, weight.shape).astype(np.float32)
    moved, spread = (_evaluated(model, value, arrays) for arrays in (codes, scales))
    if moved.ndim != 3 or (spread != spread[..., :1]).any() or (moved != np.rint(moved)).any():
        raise SlimlineError(
            f"The weights of an LSTM ({', '.join(name for _, name in marks)}) are changed before they are read, so "
            "that their codes cannot be stored: leave it out by keep."
        )
    return np.ascontiguousarray(moved.transpose(0, 2, 1).astype(np.int8)), np.ascontiguousarray(spread[..., 0])


def _evaluated(model: ir.Model, value: ir.Value, arrays: Mapping[ir.Node, Array]) -> Array:
    """`value`, where the results of some operators are these arrays."""
    feeds = {str(node.outputs[0].name): array for node, array in arrays.items()}
    own = value.producer()
    if own is not None and own in arrays:
        return arrays[own]
    nodes = [node for node in _makers(value) if node not in arrays]
    for node in nodes:
        for source in node.inputs:
            if source is not None and source.producer() is None:
                if source.const_value is None:
                    raise SlimlineError("The weights of an LSTM depend on the model's inputs: leave it out by keep.")
                feeds[str(source.name)] = source.const_value.numpy()
    ends = [onnx.helper.make_empty_tensor_value_info(name) for name in feeds]
    end = onnx.helper.make_empty_tensor_value_info(str(value.name))
    graph = onnx.helper.make_graph([ir.serde.serialize_node(node) for node in nodes], "weights", ends, [end])
    opsets = [onnx.helper.make_opsetid("", model.opset_imports[""])]
    (result,) = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=opsets)).run([str(value.name)], feeds)
    return np.asarray(result)
