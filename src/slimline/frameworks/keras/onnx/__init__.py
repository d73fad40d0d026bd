"""The exchange form ONNX of a Keras model, written operator by operator.

Every layer and function of `keras.ops` that is covered has a rule (`rules_*`), by its exact class as in
`slimline.frameworks.keras.read`; what has none is refused by name. Nothing of TensorFlow is asked, so that weights keep
the names of their layers, integer grids are the model's own, and recurrent layers stay whole.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import keras
import numpy as np
import onnx_ir as ir

from slimline.basics.errors import SlimlineError
from slimline.frameworks.keras.fakequant import fold
from slimline.frameworks.keras.functional import Call, variables
from slimline.frameworks.keras.gridded import GRIDDED
from slimline.frameworks.keras.onnx.rules_elementwise import ELEMENTWISE
from slimline.frameworks.keras.onnx.rules_kernels import KERNELS
from slimline.frameworks.keras.onnx.rules_layers import LAYERS
from slimline.frameworks.keras.onnx.rules_moves import MOVES
from slimline.frameworks.keras.onnx.rules_recurrent import RECURRENT
from slimline.frameworks.keras.onnx.writer import Rule, Stored, Writer, straight
from slimline.frameworks.keras.reader import NoRule
from slimline.frameworks.keras.unfold import rests
from slimline.runtimes.forms.onnx_graph import DOMAIN

Array = np.ndarray[Any, np.dtype[Any]]

OPSET, IR_VERSION = 20, 10
RULES: dict[type, Rule] = {**ELEMENTWISE, **KERNELS, **LAYERS, **MOVES, **RECURRENT}
_PLAIN = {gridded: plain for plain, gridded in GRIDDED.items()}
_HALF = ("float16", "bfloat16")


def to_onnx(native: keras.Model, example: tuple[Array, ...], integer: bool, weights: Collection[str] = ()) -> ir.Model:
    """The ONNX model, see `slimline.runtimes.forms.onnx`; batch norms are folded unless it is `integer`.

    Sizes stay free where the Keras inputs' are. Inputs and outputs have Keras' names, order and layout. The same model
    gives the same bytes.

    Parameters
    ----------
    weights : stored tensors that a rounding operator marks, in Keras' order; what it rounds to means nothing.

    Raises
    ------
    SlimlineError : a layer that cannot be written as ONNX; names it.
    """
    names = list(native.output_names)
    if not integer and not weights:
        native = fold(native, example)
    half = [name for name, v in variables(native).items() if keras.backend.standardize_dtype(v.dtype) in _HALF]
    if half or any(keras.backend.standardize_dtype(t.dtype) in _HALF for t in (*native.inputs, *native.outputs)):
        raise SlimlineError(
            f"The model {native.name!r} computes in 16-bit floats, which slimline does not write as ONNX: build it "
            "with dtype float32 and give it the weights."
        )
    writer = Writer(native, example, weights)
    for call in writer.reader.calls:
        if not call.is_input:
            writer.begin(call)
            _write(writer, call)
    if writer.unmarked:
        raise SlimlineError(
            f"{min(writer.unmarked)} cannot be written as codes for this target, as its layer reads it otherwise than "
            "as its kernel: leave that layer out by keep."
        )
    outputs = _outputs(writer, names)
    graph = ir.Graph(
        writer.inputs, outputs, nodes=writer.nodes, initializers=list(writer.initializers.values()),
        opset_imports={"": OPSET, DOMAIN: 1}, name=native.name,
    )  # fmt: skip
    return ir.Model(graph, ir_version=IR_VERSION)


def _write(writer: Writer, call: Call) -> None:
    operation = call.operation
    if call.is_weight:
        writer.give(call, Stored(keras.ops.convert_to_numpy(operation.value), f"{operation.name}/value"))
        return
    held = [writer.operand(tensor) for tensor in call.inputs]
    if not call.is_layer and held and all(isinstance(x, Stored) for x in held):
        writer.give(call, _computed(call, [x.array for x in held if isinstance(x, Stored)]))
        return
    kind = type(operation)
    rule = RULES.get(_PLAIN.get(kind, kind))
    if rule is None and call.is_layer and len(call.inputs) == 1 and rests(operation, call.inputs[0]):
        rule = RULES[keras.layers.Identity]
    try:
        if rule is None:
            raise NoRule("slimline has no rule for it")
        if any(keras.backend.standardize_dtype(t.dtype) in _HALF for t in call.outputs):
            raise NoRule("it computes in 16-bit floats")
        writer.give(call, rule(writer, call))
    except NoRule as reason:
        raise SlimlineError(
            f"{call.name} ({kind.__name__}) cannot be written as ONNX, since {reason}: express it by other layers, or "
            "choose the target litert."
        ) from reason


def _computed(call: Call, held: list[Array]) -> list[Stored]:
    """What a function gives for tensors that are all stored."""
    known = {id(tensor): array for tensor, array in zip(call.inputs, held, strict=True)}
    args, kwargs = keras.tree.map_structure(lambda a: known.get(id(a), a), (call.args, dict(call.kwargs)))
    results = keras.tree.flatten(call.operation.call(*args, **kwargs))
    return [Stored(np.asarray(keras.ops.convert_to_numpy(result))) for result in results]


def _outputs(writer: Writer, names: Sequence[str]) -> list[ir.Value]:
    """The values that the model gives, each of its own, under Keras' names."""
    native, taken = writer.native, {str(value.name) for value in writer.inputs}
    outputs: list[ir.Value] = []
    for name, tensor in zip(names, native.outputs, strict=True):
        operand = writer.operand(tensor)
        value = writer.plain(operand)
        writer.layer = str(name)
        if value.producer() is None or value in outputs:
            value = writer.op("Identity", value)
        shape, sizes = writer.shape(tensor), writer.example_shape(tensor)
        batch = writer.reader.batch
        value = writer.place(value, straight(len(shape)), shape, operand.dtype).value
        value.shape = ir.Shape(
            [
                n if n is not None else "batch" if d == 0 and sizes[0] == batch else f"{name}_{d}"
                for d, n in enumerate(shape)
            ]
        )
        while name in taken:
            name = f"{name}.output"
        taken.add(name)
        value.name = str(name)
        outputs.append(value)
    return outputs
