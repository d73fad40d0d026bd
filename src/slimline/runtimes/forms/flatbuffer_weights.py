"""Weights of a ``.tflite`` file as codes, which LiteRT's kernels multiply by numbers that they round as they run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from slimline.basics.errors import SlimlineError
from slimline.methods.formats import Array, Format, IntegerGrid

_OPERATORS = schema.BuiltinOperator
_VERSIONS = {_OPERATORS.FULLY_CONNECTED: 12, _OPERATORS.CONV_2D: 5}
"""Operators that round what they read, and since which version they have a scale for each output."""
_EXACT = 1e-6
"""Part of a weight's greatest number by which the converter's multiples of it may differ."""
_Key = tuple[int, bytes]
_Match = tuple[str, Array]


@dataclass(frozen=True)
class _Rounded:
    """A weight as ``(outputs, inputs)``, with its codes and a scale per output."""

    matrix: Array
    codes: Array
    scale: Array
    bits: int


def store(model: Any, graph: Any, weights: Mapping[str, Format], tensors: Mapping[str, Array]) -> None:
    """Put codes in the place of float weights, in place.

    A weight is found by its numbers. The converter may have multiplied those of an output by a number, as of a product
    that follows; the output's scale takes it in.

    Parameters
    ----------
    weights, tensors : as of `slimline.runtimes.forms.Form`.

    Raises
    ------
    SlimlineError : a weight that no operator of the file reads.
    """
    rounded = {name: _rounded(tensors[name], each) for name, each in weights.items()}
    missing = dict.fromkeys(rounded)
    known: dict[_Key, list[str]] = {}
    for name, weight in rounded.items():
        known.setdefault(_key(weight.matrix), []).append(name)
    done: set[int] = set()
    for operator in graph.operators:
        code = model.operatorCodes[operator.opcodeIndex]
        kind = max(code.builtinCode, code.deprecatedBuiltinCode)
        if kind not in _VERSIONS:
            continue
        tensor = graph.tensors[operator.inputs[1]]
        content = model.buffers[tensor.buffer].data
        if content is None or tensor.type != schema.TensorType.FLOAT32:
            continue
        stored = np.asarray(content, np.uint8).view(np.float32).reshape(tensor.shape[0], -1)
        match = _match(stored, known, rounded)
        if match is None:
            continue
        name, factor = match
        missing.pop(name, None)
        code.version = max(code.version, _VERSIONS[kind])
        if kind == _OPERATORS.FULLY_CONNECTED:
            operator.builtinOptions.asymmetricQuantizeInputs = True
        if operator.inputs[1] not in done:
            done.add(operator.inputs[1])
            _put(model, tensor, rounded[name], factor)
    if missing:
        raise SlimlineError(
            f"LiteRT's converter changed the weight {next(iter(missing))}, so that its codes cannot be stored: leave "
            "its layer out by keep."
        )


def _put(model: Any, tensor: Any, weight: _Rounded, factor: Array) -> None:
    codes = weight.codes.astype(np.int8).ravel()
    if weight.bits == 4:
        pairs = np.append(codes, np.int8(0))[: codes.size + codes.size % 2].reshape(-1, 2) & 15
        codes = (pairs[:, 0] | pairs[:, 1] << 4).astype(np.int8)
    buffer = schema.BufferT()
    buffer.data = codes.view(np.uint8)
    model.buffers.append(buffer)
    tensor.buffer = len(model.buffers) - 1
    tensor.type = schema.TensorType.INT4 if weight.bits == 4 else schema.TensorType.INT8
    grid = schema.QuantizationParametersT()
    grid.scale = (weight.scale * factor).astype(np.float32)
    grid.zeroPoint = np.zeros(len(grid.scale), np.int64)
    grid.quantizedDimension = 0
    tensor.quantization = grid


def _rounded(tensor: Array, each: Format) -> _Rounded:
    assert isinstance(each, IntegerGrid) and each.axis is not None
    codes = each.encode(tensor)
    # Kernels lie (outputs, inputs, places) or (places, inputs, outputs), in a file (outputs, places, inputs).
    first = each.axis == 0
    order = (0, *range(2, tensor.ndim), 1) if first and tensor.ndim > 1 else (tensor.ndim - 1, *range(tensor.ndim - 1))
    outputs = tensor.shape[each.axis]
    matrix, codes = (array.transpose(order).reshape(outputs, -1) for array in (tensor, codes))
    return _Rounded(matrix, codes, each.scale.reshape(outputs), 4 if each.bits == 4 else 8)


def _key(matrix: Array) -> _Key:
    """What a matrix has in common with those whose rows are multiplied by positive numbers."""
    return len(matrix), np.sign(matrix).astype(np.int8).tobytes()


def _match(
    stored: Array, known: Mapping[_Key, Iterable[str]], rounded: Mapping[str, _Rounded]
) -> tuple[str, Array] | None:
    """The weight of which the rows of a matrix are multiples, and by how much."""
    for name in known.get(_key(stored), ()):
        matrix = rounded[name].matrix
        tops = np.abs(matrix).max(1)
        factor = np.divide(np.abs(stored).max(1), tops, out=np.ones(len(tops), np.float32), where=tops > 0)
        if np.all(np.abs(stored - matrix * factor[:, None]) <= _EXACT * np.abs(stored).max(1, keepdims=True)):
            return name, factor
    return None
