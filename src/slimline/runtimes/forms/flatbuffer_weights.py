"""Weights of a ``.tflite`` file as codes: multiplied as they are by numbers that the kernels round as they run, or
turned to float32 when the file is loaded.

A weight is found by its numbers. The converter may have multiplied those of an output by a number, as of a product that
follows; the output's scale takes it in.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from slimline.basics.errors import SlimlineError
from slimline.methods.formats import Array, Format, IntegerGrid

_OPERATORS = schema.BuiltinOperator
_VERSIONS = {_OPERATORS.FULLY_CONNECTED: 12, _OPERATORS.CONV_2D: 5}
"""Operators that round what they read, and since which version they have a scale for each output."""
_DEQUANTIZE_VERSION = 5  # since which there is a scale for each position of an axis
_DEPTHWISE = 3
"""Where the weight of a depthwise convolution, (1, y, x, outputs), has its outputs."""
_EXACT = 1e-6
"""Part of a weight's greatest number by which the converter's multiples of it may differ."""
_Key = tuple[int, bytes]


@dataclass(frozen=True)
class _Rounded:
    """A weight as ``(outputs, inputs)``, with its codes and a scale per output."""

    matrix: Array
    codes: Array
    scale: Array
    bits: int


def multiply_by_codes(model: Any, graph: Any, weights: Mapping[str, Format], tensors: Mapping[str, Array]) -> None:
    """Let the operators that can read codes of weights, in place; whatever else reads a weight reads floats.

    Parameters
    ----------
    weights, tensors : as of `slimline.runtimes.forms.Form`.

    Raises
    ------
    SlimlineError : a weight that no operator of the file reads.
    """
    search = _Search(weights, tensors)
    held: dict[int, int] = {}
    for operator in graph.operators:
        code = model.operatorCodes[operator.opcodeIndex]
        kind = max(code.builtinCode, code.deprecatedBuiltinCode)
        if kind not in _VERSIONS:
            continue
        index = int(operator.inputs[1])
        tensor = graph.tensors[index]
        stored = None if index in held else _numbers(model, tensor)
        match = None if stored is None else search.match(stored.reshape(tensor.shape[0], -1))
        if match is not None:
            held[index] = len(graph.tensors)
            graph.tensors.append(_holding(model, tensor, *match))
        if index in held:
            operator.inputs = np.array([operator.inputs[0], held[index], *operator.inputs[2:]], np.int32)
            code.version = max(code.version, _VERSIONS[kind])
            if kind == _OPERATORS.FULLY_CONNECTED:
                operator.builtinOptions.asymmetricQuantizeInputs = True
    search.refuse_missing(weights)


def store_codes(
    model: Any, graph: Any, weights: Mapping[str, Format], tensors: Mapping[str, Array], needed: Collection[str]
) -> None:
    """Let float weights be dequantized from integers, or from float16 where that says the same, in place: LiteRT does
    so once, when it loads the file.

    Parameters
    ----------
    needed : weights that the file must hold, where they are integers.

    Raises
    ------
    SlimlineError : it does not.
    """
    if not weights:
        return
    integers = {name: each for name, each in weights.items() if isinstance(each, IntegerGrid)}
    search = _Search(integers, tensors)
    halves = {tensors[name].size for name in weights.keys() - integers.keys()}
    inside = {int(i) for operator in graph.operators for i in operator.outputs} | set(map(int, graph.inputs))
    before = []
    for index, tensor in enumerate(list(graph.tensors)):
        stored = None if index in inside else _numbers(model, tensor)
        held = None if stored is None else _stored(model, tensor, stored, search, halves)
        if held is None:
            continue
        graph.tensors.append(held)
        tensor.buffer = 0
        operator = schema.OperatorT()
        operator.inputs, operator.outputs = (np.array([i], np.int32) for i in (len(graph.tensors) - 1, index))
        operator.opcodeIndex = len(model.operatorCodes)
        before.append(operator)
    search.refuse_missing(needed)
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = _OPERATORS.DEQUANTIZE
    code.version = _DEQUANTIZE_VERSION
    model.operatorCodes.append(code)
    graph.operators = [*before, *graph.operators]


def _stored(model: Any, tensor: Any, numbers: Array, search: _Search, halves: Collection[int]) -> Any:
    """The tensor that one may be dequantized from; None where there is none."""
    last = len(tensor.shape) - 1
    match = search.match(numbers.reshape(tensor.shape[0], -1)) if last > 0 else None
    if match is not None:
        return _holding(model, tensor, *match)
    match = search.match(numbers.reshape(-1, tensor.shape[last]).T) if last == _DEPTHWISE else None
    if match is not None:
        weight, factor = match
        return _holding(model, tensor, replace(weight, codes=weight.codes.T), factor, last)
    if numbers.size not in halves or not np.array_equal(numbers.astype(np.float16), numbers):
        return None
    held = schema.TensorT()
    held.shape, held.name, held.type = tensor.shape, "", schema.TensorType.FLOAT16
    held.buffer = _buffer(model, numbers.astype(np.float16))
    return held


def _numbers(model: Any, tensor: Any) -> Array | None:
    """The content of a stored float tensor."""
    content = model.buffers[tensor.buffer].data
    if content is None or tensor.type != schema.TensorType.FLOAT32 or not len(tensor.shape):
        return None
    return np.asarray(content, np.uint8).view(np.float32)


def _buffer(model: Any, array: Array) -> int:
    buffer = schema.BufferT()
    buffer.data = np.ascontiguousarray(array).ravel().view(np.uint8)
    model.buffers.append(buffer)
    return len(model.buffers) - 1


def _holding(model: Any, like: Any, weight: _Rounded, factor: Array, axis: int = 0) -> Any:
    """A tensor like another of the codes of a weight, whose scales lie along an axis."""
    codes = np.ascontiguousarray(weight.codes, np.int8).ravel()
    if weight.bits == 4:
        pairs = np.append(codes, np.int8(0))[: codes.size + codes.size % 2].reshape(-1, 2) & 15
        codes = (pairs[:, 0] | pairs[:, 1] << 4).astype(np.int8)
    tensor = schema.TensorT()
    tensor.shape, tensor.name = like.shape, like.name
    tensor.buffer = _buffer(model, codes)
    tensor.type = schema.TensorType.INT4 if weight.bits == 4 else schema.TensorType.INT8
    grid = schema.QuantizationParametersT()
    grid.scale = (weight.scale * factor).astype(np.float32)
    grid.zeroPoint = np.zeros(len(grid.scale), np.int64)
    grid.quantizedDimension = axis
    tensor.quantization = grid
    return tensor


def _rounded(tensor: Array, each: Format) -> _Rounded:
    assert isinstance(each, IntegerGrid)
    outputs = [d for d, block in enumerate(each.blocks) if block == 1]
    inputs = [d for d, block in enumerate(each.blocks) if block != 1]
    # Kernels lie (outputs, inputs, places) or (places, inputs, outputs), in a file (outputs, places, inputs).
    inputs = [*inputs[1:], *inputs[:1]] if outputs == [0] else inputs
    count = math.prod(tensor.shape[d] for d in outputs)
    matrix, codes = (array.transpose(*outputs, *inputs).reshape(count, -1) for array in (tensor, each.encode(tensor)))
    return _Rounded(matrix, codes, each.scale.reshape(count), 4 if each.bits == 4 else 8)


class _Search:
    """Looks weights up by their numbers."""

    def __init__(self, weights: Mapping[str, Format], tensors: Mapping[str, Array]) -> None:
        self._rounded = {name: _rounded(tensors[name], each) for name, each in weights.items()}
        self._missing = dict.fromkeys(weights)
        self._known: dict[_Key, list[str]] = {}
        for name, weight in self._rounded.items():
            self._known.setdefault(_key(weight.matrix), []).append(name)

    def match(self, stored: Array) -> tuple[_Rounded, Array] | None:
        """The weight of which the rows of a matrix are multiples, and by how much."""
        for name in self._known.get(_key(stored), ()):
            weight = self._rounded[name]
            tops = np.abs(weight.matrix).max(1)
            factor = np.divide(np.abs(stored).max(1), tops, out=np.ones(len(tops), np.float32), where=tops > 0)
            limit = _EXACT * np.abs(stored).max(1, keepdims=True)
            if np.all(np.abs(stored - weight.matrix * factor[:, None]) <= limit):
                self._missing.pop(name, None)
                return weight, factor
        return None

    def refuse_missing(self, needed: Collection[str]) -> None:
        """Refuse such of these weights as were not found."""
        missing = [name for name in self._missing if name in needed]
        if missing:
            raise SlimlineError(
                f"LiteRT's converter changed the weight {missing[0]}, so that its codes cannot be stored: leave its "
                "layer out by keep."
            )


def _key(matrix: Array) -> _Key:
    """What a matrix has in common with those whose rows are multiplied by positive numbers."""
    return len(matrix), np.sign(matrix).astype(np.int8).tobytes()
