"""What is in a ``.mlpackage``: its interface, and its constants, decoded as Core ML's operators say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slimline.basics.errors import SlimlineError, first_line
from slimline.runtimes.coreml_weights import unpacked

Array = np.ndarray[Any, np.dtype[Any]]
Specs = list[tuple[str, tuple[int | None, ...], str]]

MODEL, WEIGHTS = "com.apple.CoreML/model.mlmodel", "com.apple.CoreML/weights"
_ARRAYS = {65552: "float16", 65568: "float32", 65600: "float64", 131080: "int8", 131104: "int32"}
"""`ArrayFeatureType.ArrayDataType`, the types of inputs and outputs."""
_TYPES = {
    1: "bool", 10: "float16", 11: "float32", 21: "int8", 22: "int16", 23: "int32", 25: "int4", 31: "uint8",
    32: "uint16", 33: "uint32", 35: "uint4", 36: "uint2", 37: "uint1", 38: "uint6", 39: "uint3",
}  # fmt: skip
"""`MIL.DataType`, the types of values inside."""
_READERS = {"float32": "float", "float16": "fp16"}
_DECODES = "constexpr_"
_SHAPES = ("shape", "axis")
"""Arguments that are no part of a weight."""


class Weight(NamedTuple):
    """A weight that is stored otherwise than it is used.

    Attributes
    ----------
    values : decoded, of the program's precision.
    bits : that its arrays take in the file.
    forms : the operators that decode it, the last one first.
    arrays : what is stored of it, by the names that these operators have for it.
    """

    values: Array
    bits: int
    forms: tuple[str, ...]
    arrays: dict[str, Array]


class Package:
    """The program in a package.

    Raises
    ------
    SlimlineError : a folder that is no package, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        from coremltools.proto import Model_pb2

        file = path / "Data" / MODEL
        if not file.is_file():
            raise SlimlineError(f"{path} is no Core ML package: give a folder that ends in .mlpackage.")
        self.model = Model_pb2.Model()
        try:
            self.model.ParseFromString(file.read_bytes())
        except Exception as error:  # protobuf's own type
            raise SlimlineError(f"{file} cannot be read: export the model again.") from error
        if "main" not in self.model.mlProgram.functions:
            raise SlimlineError(f"{file} holds no program: export the model again.")
        self._weights = path / "Data" / WEIGHTS / "weight.bin"
        function = self.model.mlProgram.functions["main"]
        self.block = function.block_specializations[function.opset]
        self.makers = {out.name: operation for operation in self.block.operations for out in operation.outputs}

    def inputs(self) -> Specs:
        """Name, shape and dtype of each input."""
        specs: Specs = []
        for each in self.model.description.input:
            array = each.type.multiArrayType
            ranges = [(s.lowerBound, s.upperBound) for s in array.shapeRange.sizeRanges]
            shape = tuple(None if a != b else int(a) for a, b in ranges or [(n, n) for n in array.shape])
            specs.append((str(each.name), shape, _ARRAYS[array.dataType]))
        return specs

    def outputs(self) -> Specs:
        """The same of each output."""
        kinds = {each.name: _ARRAYS[each.type.multiArrayType.dataType] for each in self.model.description.output}
        return [(name, self._shape(name), kinds[name]) for name in self.block.outputs]

    def _shape(self, name: str) -> tuple[int | None, ...]:
        (value,) = (out for out in self.makers[name].outputs if out.name == name)
        sizes = value.type.tensorType.dimensions
        return tuple(int(size.constant.size) if size.HasField("constant") else None for size in sizes)

    def constants(self) -> Iterator[Array]:
        """All that is stored as it is used."""
        parts = self._parts()
        for operation in self.block.operations:
            if operation.type == "const" and operation.outputs[0].name not in parts:
                array = self.value(operation.attributes["val"])
                if array is not None:
                    yield array

    def weights(self) -> Iterator[Weight]:
        """All that is stored otherwise."""
        parts = self._parts()
        for operation in self._decoders():
            if not any(out.name in parts for out in operation.outputs):
                yield self._weight(operation)

    def _decoders(self) -> Iterator[Any]:
        return (operation for operation in self.block.operations if operation.type.startswith(_DECODES))

    def _parts(self) -> set[str]:
        """Names of all that something is decoded from."""
        bindings = [binding for operation in self._decoders() for binding in operation.inputs.values()]
        return {argument.name for binding in bindings for argument in binding.arguments}

    def _weight(self, operation: Any) -> Weight:
        """What an operator makes of constants, or of what others made of them."""
        forms: list[str] = []
        stored: dict[str, tuple[Array, int]] = {}

        def decoded(operation: Any) -> tuple[Array, ...]:
            if operation.type not in forms:
                forms.append(operation.type)
            return tuple(_DECODERS[operation.type](**dict(arguments(operation))))

        def arguments(operation: Any) -> Iterator[tuple[str, Array]]:
            for name, value in operation.attributes.items():
                if name != "name":
                    yield name, held(name, value)
            for name, binding in operation.inputs.items():
                argument = binding.arguments[0]
                maker = self.makers.get(argument.name)
                if maker is None:
                    yield name, held(name, argument.value)
                elif maker.type.startswith(_DECODES):
                    place = [out.name for out in maker.outputs].index(argument.name)
                    yield name, decoded(maker)[place]
                else:
                    yield name, held(name, maker.attributes["val"])

        def held(name: str, value: Any) -> Array:
            array = self.value(value)
            assert array is not None
            stored[name] = array, array.size * _width(_TYPES[value.type.tensorType.dataType])
            return array

        values = decoded(operation)[-1]
        bits = sum(size for name, (_, size) in stored.items() if name not in _SHAPES)
        return Weight(values, bits, tuple(forms), {name: array for name, (array, _) in stored.items()})

    def grids(self) -> Iterator[tuple[str, float, int]]:
        """Kind, scale and zero point of every operator that rounds or unrounds a value."""
        for operation in self.block.operations:
            if operation.type in ("quantize", "dequantize"):
                scale, zero = (self._argument(operation, key) for key in ("scale", "zero_point"))
                assert scale is not None
                yield operation.type, float(scale), 0 if zero is None else int(zero)

    def integer_products(self) -> int:
        """Convolutions and linear layers that read integers."""
        return sum(
            operation.type in ("conv", "linear", "matmul") and self._unrounded(operation.inputs["x"])
            for operation in self.block.operations
        )

    def _unrounded(self, argument: Any) -> bool:
        maker = self.makers.get(argument.arguments[0].name)
        return maker is not None and maker.type == "dequantize"

    def _argument(self, operation: Any, key: str) -> Array | None:
        if key not in operation.inputs:
            return None
        binding = operation.inputs[key].arguments[0]
        if not binding.name:
            return self.value(binding.value)
        return self.value(self.makers[binding.name].attributes["val"])

    def value(self, value: Any) -> Array | None:
        """A stored tensor; None where it is text."""
        kind = value.type.tensorType
        dtype = _TYPES.get(kind.dataType)
        if dtype is None:
            return None
        shape = tuple(int(size.constant.size) for size in kind.dimensions)
        if value.WhichOneof("value") == "blobFileValue":
            flat = self._blob(dtype, value.blobFileValue.offset)
        else:
            tensor = value.immediateValue.tensor
            held = getattr(tensor, str(tensor.WhichOneof("value"))).values
            flat = _immediate(held, dtype, math.prod(shape))
        return flat.reshape(shape)

    @cached_property
    def _blobs(self) -> Any:
        from coremltools.libmilstoragepython import _BlobStorageReader

        if not self._weights.is_file():
            raise SlimlineError("The Core ML package has no file of weights: export the model again.")
        return _BlobStorageReader(str(self._weights))

    def _blob(self, kind: str, offset: int) -> Array:
        try:
            flat = np.asarray(getattr(self._blobs, f"read_{_READERS.get(kind, kind)}_data")(offset))
        except (RuntimeError, ValueError, IndexError) as error:
            raise SlimlineError(
                f"{self._weights} cannot be read ({first_line(error)}): export the model again."
            ) from error
        return flat.view(kind) if kind == "float16" and flat.dtype != np.float16 else flat.astype(_held(kind))


def _immediate(content: Any, kind: str, count: int) -> Array:
    """Numbers that stand in the program itself."""
    if not isinstance(content, bytes):
        return np.asarray(list(content), _held(kind))
    if (width := _width(kind)) >= 8:
        return np.frombuffer(content, kind)
    codes = unpacked(np.frombuffer(content, np.uint8), width, count)
    return codes if kind.startswith("u") else ((codes ^ 8).astype(np.int8) - 8)


def _held(kind: str) -> str:
    """The numpy type that holds numbers of a kind."""
    return kind if kind == "bool" or _width(kind) >= 8 else "uint8" if kind.startswith("u") else "int8"


def _width(kind: str) -> int:
    return int("".join(letter for letter in kind if letter.isdigit()) or 8)


def _spread(array: Array, shape: Sequence[int]) -> Array:
    """Values of blocks, repeated to `shape`, or as far as that has dimensions."""
    for axis, size in enumerate(shape):
        array = np.repeat(array, size // array.shape[axis], axis)
    return array


def _affine_dequantize(quantized_data: Array, scale: Array, zero_point: Array, axis: Array) -> tuple[Array]:
    shape = [-1 if d == int(axis) else 1 for d in range(quantized_data.ndim)]
    ends = [end.reshape(shape) if end.ndim else end for end in (zero_point.astype(scale.dtype), scale)]
    return ((quantized_data.astype(scale.dtype) - ends[0]) * ends[1],)


def _shift_scale(data: Array, scale: Array, offset: Array | None = None) -> tuple[Array]:
    real = data.astype(scale.dtype)
    if offset is not None:
        real = real - _spread(offset, data.shape).astype(scale.dtype)
    return (real * _spread(scale, data.shape),)


def _lut_to_dense(indices: Array, lut: Array, shape: Array | None = None) -> tuple[Array]:
    if shape is not None:
        count, width = int(shape.prod()), int(lut.size).bit_length() - 1
        return (lut[unpacked(indices, width, count)].reshape(shape),)
    palettes = _spread(lut[..., 0], indices.shape)
    return (np.take_along_axis(palettes, indices[..., None].astype(np.int64), -1)[..., 0],)


def _sparse_to_dense(nonzero_data: Array, mask: Array, shape: Array | None = None) -> tuple[Array]:
    if shape is not None:
        mask = unpacked(mask, 1, int(shape.prod())).reshape(shape)
    return (_placed(nonzero_data, mask),)


def _placed(nonzero: Array, mask: Array) -> Array:
    dense = np.zeros(mask.shape, nonzero.dtype)
    dense[mask != 0] = nonzero
    return dense


def _lut_to_sparse(indices_mask: Array, indices_nonzero_data: Array, lut: Array) -> tuple[Array, Array]:
    (dense,) = _lut_to_dense(_placed(indices_nonzero_data, indices_mask), lut)
    return indices_mask, dense[indices_mask != 0]


def _sparse_shift_scale(
    data_mask: Array, nonzero_data: Array, scale: Array, offset: Array | None = None
) -> tuple[Array, Array]:
    (dense,) = _shift_scale(_placed(nonzero_data, data_mask), scale, offset)
    return data_mask, dense[data_mask != 0]


_DECODERS: Mapping[str, Callable[..., tuple[Array, ...]]] = {
    "constexpr_affine_dequantize": _affine_dequantize,
    "constexpr_blockwise_shift_scale": _shift_scale,
    "constexpr_lut_to_dense": _lut_to_dense,
    "constexpr_sparse_to_dense": _sparse_to_dense,
    "constexpr_lut_to_sparse": _lut_to_sparse,
    "constexpr_sparse_blockwise_shift_scale": _sparse_shift_scale,
}
