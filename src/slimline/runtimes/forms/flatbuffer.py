"""Makes a ``.tflite`` file small, reproducible and fast to load, and changes nothing that it computes.

The converter names tensors after its own passes and counters, stores one zero per channel for every
symmetric scale, and computes at run time the target shapes of reshapes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import flatbuffers  # type: ignore[import-untyped]
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from slimline.methods.formats import Array, Format
from slimline.runtimes.forms.flatbuffer_weights import multiply_by_codes, store_codes

NOTHING: Mapping[str, Any] = MappingProxyType({})
_IDENTIFIER = b"TFL3"
_OPERATORS = schema.BuiltinOperator
_COMPUTE = (
    _OPERATORS.CONV_2D,
    _OPERATORS.DEPTHWISE_CONV_2D,
    _OPERATORS.TRANSPOSE_CONV,
    _OPERATORS.CONV_3D,
    _OPERATORS.FULLY_CONNECTED,
    _OPERATORS.BATCH_MATMUL,
)


def compact(
    data: bytes,
    inputs: Mapping[str, str],
    layers: Mapping[str, bool],
    outputs: Sequence[str] = (),
    weights: Mapping[str, Format] = NOTHING,
    tensors: Mapping[str, Array] = NOTHING,
    dynamic: Collection[str] = (),
) -> bytes:
    """The same network in as few bytes as LiteRT reads.

    Parameters
    ----------
    data : a ``.tflite`` file of one subgraph.
    inputs : the name that each input was traced under, to the user's; in the order the user gives them.
    layers : the user's layers, and whether each computes with a kernel.
    outputs : the user's names of the outputs, which the file keeps in the signature ``serving_default``.
    weights, tensors, dynamic : what is stored as codes, see `slimline.runtimes.forms.Form`.

    Returns
    -------
    A file whose inputs have the user's names and order, whose operators' results are named after the layer
    that made them (what other tensors were called is forgotten), without metadata and other signatures, whose equal
    arrays are stored once, and in which reshapes have constant targets.
    """
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    graph = model.subgraphs[0]
    _constant_reshapes(model, graph)
    _widen(model, graph)
    _join(model, graph)
    multiply_by_codes(model, graph, {name: weights[name] for name in dynamic}, tensors)
    store_codes(model, graph, weights, tensors, weights.keys() - set(dynamic))
    order = {traced: position for position, traced in enumerate(inputs)}
    graph.inputs = sorted(graph.inputs, key=lambda i: order[_text(graph.tensors[i].name)])
    _rename(model, graph, list(inputs.values()), layers)
    _sweep(model, graph)
    model.description = model.metadata = model.metadataBuffer = None
    named = len(outputs) == len(graph.outputs)
    model.signatureDefs = [_signature(graph, list(inputs.values()), outputs)] if named else None
    for tensor in graph.tensors:
        if tensor.quantization is not None:
            tensor.quantization.min = tensor.quantization.max = None
    builder = _SharingBuilder(len(data))
    builder.Finish(model.Pack(builder), _IDENTIFIER)
    return bytes(builder.Output())


def _signature(graph: Any, inputs: Sequence[str], outputs: Sequence[str]) -> Any:
    """The names of inputs and outputs."""
    signature = schema.SignatureDefT()
    signature.signatureKey, signature.subgraphIndex = "serving_default", 0
    signature.inputs = [_called(name, index) for name, index in zip(inputs, graph.inputs, strict=True)]
    signature.outputs = [_called(name, index) for name, index in zip(outputs, graph.outputs, strict=True)]
    return signature


def _called(name: str, index: int) -> Any:
    entry = schema.TensorMapT()
    entry.name, entry.tensorIndex = name, int(index)
    return entry


class _SharingBuilder(flatbuffers.Builder):  # type: ignore[misc]
    """Stores equal arrays once, and lets all that hold them point there."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.stored: dict[tuple[str, bytes], Any] = {}

    def CreateNumpyVector(self, x: Any) -> Any:
        """The offset of an array."""
        key = (x.dtype.str, x.tobytes())
        if key not in self.stored:
            self.stored[key] = super().CreateNumpyVector(x)
        return self.stored[key]


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else name or ""


def _code(model: Any, operator: Any) -> int:
    code = model.operatorCodes[operator.opcodeIndex]
    return int(max(code.builtinCode, code.deprecatedBuiltinCode))


def _constant_reshapes(model: Any, graph: Any) -> None:
    """Give reshapes whose target is packed from constants and one computed size the constant target with -1.

    A target computed from the batch size would split the graph between delegate and interpreter; with a
    single unknown size the number of elements says what it is.
    """
    makers = {output: operator for operator in graph.operators for output in operator.outputs}

    def constant(index: int) -> int | None:
        data = model.buffers[graph.tensors[index].buffer].data
        if index in makers or data is None or len(data) != 4:
            return None
        return int(np.frombuffer(np.asarray(data, np.uint8).tobytes(), np.int32)[0])

    for operator in graph.operators:
        if _code(model, operator) != _OPERATORS.RESHAPE or len(operator.inputs) < 2:
            continue
        packed = makers.get(operator.inputs[1])
        if packed is None or _code(model, packed) != _OPERATORS.PACK:
            continue
        sizes = [constant(i) for i in packed.inputs]
        if sizes.count(None) != 1 or -1 in sizes:
            continue
        target = np.array([-1 if size is None else size for size in sizes], np.int32)
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(target.tobytes(), np.uint8)
        model.buffers.append(buffer)
        tensor = schema.TensorT()
        tensor.shape, tensor.type = np.array([len(target)], np.int32), schema.TensorType.INT32
        tensor.buffer = len(model.buffers) - 1
        graph.tensors.append(tensor)
        operator.inputs = np.array([operator.inputs[0], len(graph.tensors) - 1], np.int32)


def _widen(model: Any, graph: Any) -> None:
    """Give layers of 16 bits what their kernels read: biases of 64 bits, and sums on steps that are no powers of two.

    The converter writes biases of 32 bits and says nothing of them, which the kernels take for 64.
    """
    for operator in graph.operators:
        kind = _code(model, operator)
        if graph.tensors[operator.outputs[0]].type != schema.TensorType.INT16:
            continue
        if kind in (_OPERATORS.ADD, _OPERATORS.SUB):
            operator.builtinOptions.potScaleInt16 = False
        if kind not in _COMPUTE or len(operator.inputs) <= (place := 3 if kind == _OPERATORS.TRANSPOSE_CONV else 2):
            continue
        bias = graph.tensors[operator.inputs[place]] if operator.inputs[place] >= 0 else None
        if bias is not None and bias.type == schema.TensorType.INT32:
            narrow = np.asarray(model.buffers[bias.buffer].data, np.uint8).tobytes()
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(np.frombuffer(narrow, np.int32).astype(np.int64).tobytes(), np.uint8)
            model.buffers.append(buffer)
            bias.buffer, bias.type = len(model.buffers) - 1, schema.TensorType.INT64


def _join(model: Any, graph: Any) -> None:
    """Let what reads a number of 32 bits after it was cast to 64 and back read it as it was."""
    makers = {output: operator for operator in graph.operators for output in operator.outputs}
    real, wide = schema.TensorType.FLOAT32, schema.TensorType.FLOAT64
    same: dict[int, int] = {}
    for operator in graph.operators:
        outer = makers.get(operator.inputs[0]) if _code(model, operator) == _OPERATORS.CAST else None
        if outer is None or _code(model, outer) != _OPERATORS.CAST:
            continue
        types = [graph.tensors[i].type for i in (outer.inputs[0], outer.outputs[0], operator.outputs[0])]
        if types == [real, wide, real] and operator.outputs[0] not in graph.outputs:
            same[int(operator.outputs[0])] = same.get(int(outer.inputs[0]), int(outer.inputs[0]))
    for operator in graph.operators:
        operator.inputs = np.array([same.get(int(i), int(i)) for i in operator.inputs], np.int32)


def _rename(model: Any, graph: Any, inputs: Sequence[str], layers: Mapping[str, bool]) -> None:
    """Name inputs as the user does, results after their layers, and nothing else."""
    before = [_text(tensor.name) for tensor in graph.tensors]
    after = [""] * len(before)
    for operator in graph.operators:
        compute = _code(model, operator) in _COMPUTE
        named = [before[i] for i in (*operator.outputs, *(operator.inputs[1:2] if compute else ()))]
        owners = [layer for name in named for layer in _layers_in(name, layers)]
        owners.sort(key=lambda layer: layers[layer] != compute)  # stable: of equals, the first named
        if owners:
            for output in operator.outputs:
                after[output] = owners[0]
    for index, name in zip(graph.inputs, inputs, strict=True):
        after[index] = name
    for tensor, name in zip(graph.tensors, after, strict=True):
        tensor.name = name


def _layers_in(name: str, layers: Mapping[str, bool]) -> list[str]:
    """Layers that a tensor's name of the converter tells: ``model_1/conv_1/Conv2D;model_1/bn_1/add``."""
    owners = []
    for part in re.split(r"[;/]", name):
        scope = re.sub(r"_\d+$", "", part)  # TensorFlow makes scopes unique by a number
        owners += [candidate for candidate in (scope, part) if candidate in layers][:1]
    return owners


def _sweep(model: Any, graph: Any) -> None:
    """Drop operators whose results nobody reads, and the tensors, buffers and operator codes that go with them."""
    needed = set(map(int, graph.outputs))
    needed_operators = []
    for operator in reversed(graph.operators):
        if needed & set(map(int, operator.outputs)):
            needed_operators.append(operator)
            needed.update(int(i) for i in operator.inputs if i >= 0)
    graph.operators = needed_operators[::-1]
    needed.update(map(int, graph.inputs))
    needed.update(int(i) for operator in graph.operators for i in operator.outputs)
    tensors = {old: new for new, old in enumerate(sorted(needed))}
    graph.tensors = [graph.tensors[old] for old in tensors]

    def moved(indices: Any) -> Any:
        return np.array([tensors.get(int(i), -1) for i in indices], np.int32)

    graph.inputs, graph.outputs = moved(graph.inputs), moved(graph.outputs)
    for operator in graph.operators:
        operator.inputs, operator.outputs = moved(operator.inputs), moved(operator.outputs)

    # Buffer 0 is empty by convention: tensors that are computed point to it.
    buffers: dict[bytes, int] = {b"": 0}
    stored = [model.buffers[0]]
    for tensor in graph.tensors:
        data = model.buffers[tensor.buffer].data
        key = b"" if data is None else np.asarray(data, np.uint8).tobytes()
        if key not in buffers:
            buffers[key] = len(stored)
            stored.append(model.buffers[tensor.buffer])
        tensor.buffer = buffers[key]
    model.buffers = stored

    codes = {old: new for new, old in enumerate(sorted({o.opcodeIndex for o in graph.operators}))}
    model.operatorCodes = [model.operatorCodes[old] for old in codes]
    for operator in graph.operators:
        operator.opcodeIndex = codes[operator.opcodeIndex]
