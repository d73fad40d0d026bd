"""The Core ML target: PyTorch models as ``.mlpackage`` folders, for Apple devices.

Core ML runs nowhere else, so a package is checked against the program that it was made of: inputs, outputs, weights and
grids, decoded from the file. Floats are float16 inside, as is Core ML's own default, inputs and outputs float32.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from slimline.basics.errors import SlimlineError, first_line, require
from slimline.basics.quiet import silent
from slimline.graph.placement import Policy
from slimline.runtimes.base import Runtime
from slimline.runtimes.forms import EXPORTED_PROGRAM, Form

if TYPE_CHECKING:
    import torch

    from slimline.runtimes.base import Session

Array = np.ndarray[Any, np.dtype[Any]]
Specs = list[tuple[str, tuple[int | None, ...], str]]

_MODEL, _WEIGHTS = "com.apple.CoreML/model.mlmodel", "com.apple.CoreML/weights"
_NAMESPACE = uuid.UUID("5f0e4f5a-1f0c-5c49-9d52-6f1d6d8b6f0e")
"""Of the identifiers in the manifest, which Core ML draws at random."""
_FOLDING = (
    "fuse_conv_scale", "fuse_conv_batchnorm", "fuse_elementwise_to_batchnorm",
    "distributive_quantized_binary_op_scale_normalization", "nullify_redundant_quantization_zero_point",
)  # fmt: skip
"""Passes that change weights or grids: the file would no longer hold those that were calibrated."""
_READERS = ("conv", "linear", "embedding", "addmm")
_ARRAYS = {65552: "float16", 65568: "float32", 65600: "float64", 131080: "int8", 131104: "int32"}
"""`ArrayFeatureType.ArrayDataType`, the types of inputs and outputs."""
_TYPES = {1: "bool", 10: "float16", 11: "float32", 21: "int8", 23: "int32", 31: "uint8"}
"""`MIL.DataType`, the types of values inside."""

POLICY = Policy(
    activations="int8",
    fused=frozenset({"relu", "relu6", "clip", "hardtanh"}),
    glue=frozenset({"elementwise:add", "concat", "pool:mean", "reduce:mean"}),
    transposed=False,
    float_results=frozenset(),
    linear_channels=True,
    constants=frozenset(),
    ranges={},
    transposed_channels=False,
    whole=False,
    one_grid=frozenset(),
)


class CoreML(Runtime):
    """The target ``coreml``, see `slimline.runtimes.base.Runtime`.

    Parameters
    ----------
    precision : of float weights and arithmetic inside.
    """

    name = "coreml"
    extra = "coreml"
    suffix = ".mlpackage"
    forms = (EXPORTED_PROGRAM,)
    policy = POLICY
    packages = ("coremltools", "torch")
    precisions = ("float16", "int8")
    abilities: frozenset[str] = frozenset()
    elsewhere = "on Apple devices"
    description = "Core ML for iOS 17 and macOS 14, not run here: int8 activations and int8 weights per channel"

    def __init__(self, precision: Literal["float16", "float32"] = "float16") -> None:
        self.precision = precision

    def available(self) -> str | None:
        """None, or the sentence with the pip command."""
        return None if find_spec("coremltools") else "coremltools is not installed: run pip install 'slimline[coreml]'."

    def lower(self, form: Form, path: Path) -> None:
        """Write the package to `path`; the same bytes each time.

        Raises
        ------
        SlimlineError : an operator that Core ML has not.
        """
        with silent():
            require("coremltools", self.extra)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            package = Path(folder, path.name)
            _convert(form.content, package, self.precision)
            if path.exists():
                shutil.rmtree(path)
            package.replace(path)

    def verify(self, form: Form, path: Path) -> Session | None:
        """Check inputs, outputs, weights and grids of the package; None, since nothing here answers in its place.

        Raises
        ------
        SlimlineError : one is not as in the program.
        """
        with silent():
            reading = _Package(path)
        _same_interface(form.content, reading)
        _same_weights(form.content, reading, self.precision)
        _same_grids(form.content, reading, self.precision)
        return None

    def input_specs(self, path: Path) -> Specs:
        """Name, shape (None where any size up to a bound goes) and dtype of each input."""
        with silent():
            return _Package(Path(path)).inputs()


runtime = CoreML()


def _convert(program: torch.export.ExportedProgram, package: Path, precision: str) -> None:
    outputs = program.graph.output_node().args[0]
    floats = [node.meta["val"].is_floating_point() for node in outputs]
    names = ["output"] if len(floats) == 1 else [f"output_{i}" for i in range(len(floats))]
    with silent():
        import coremltools as ct

        pipeline = ct.PassPipeline.DEFAULT
        pipeline.remove_passes({f"common::{name}" for name in _FOLDING})
        try:
            ct.convert(
                program.run_decompositions({}),
                outputs=[
                    ct.TensorType(name=name, **({"dtype": np.float32} if real else {}))
                    for name, real in zip(names, floats, strict=True)
                ],
                convert_to="mlprogram",
                minimum_deployment_target=ct.target.iOS17,
                compute_precision=ct.precision.FLOAT16 if precision == "float16" else ct.precision.FLOAT32,
                pass_pipeline=pipeline,
                skip_model_load=True,
            ).save(str(package))
        except Exception as error:  # the converter raises many types
            raise SlimlineError(
                f"The model cannot be written for Core ML ({first_line(error)[:200]}): "
                "express that part of it by common operators."
            ) from error
        _settle(package)


def _settle(package: Path) -> None:
    """Make a package the same each time: identifiers, dates, files for debuggers; and let a batch of one in."""
    from coremltools.proto import Model_pb2

    file = package / "Data" / _MODEL
    model = Model_pb2.Model()
    model.ParseFromString(file.read_bytes())
    model.description.metadata.userDefined.clear()
    for each in model.description.input:
        array = each.type.multiArrayType
        for size in array.shapeRange.sizeRanges[:1]:
            if size.upperBound != size.lowerBound:
                size.lowerBound = 1
    file.write_bytes(model.SerializeToString(deterministic=True))
    entries = {"model.mlmodel": (_MODEL, "CoreML Model Specification"), "weights": (_WEIGHTS, "CoreML Model Weights")}
    items = {
        str(uuid.uuid5(_NAMESPACE, path)): {
            "author": "com.apple.CoreML",
            "description": description,
            "name": name,
            "path": path,
        }
        for name, (path, description) in entries.items()
        if (package / "Data" / path).exists()
    }
    root = str(uuid.uuid5(_NAMESPACE, _MODEL))
    manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": items, "rootModelIdentifier": root}
    (package / "Manifest.json").write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n", "utf-8")
    for entry in package.iterdir():
        if entry.name not in ("Manifest.json", "Data"):
            entry.unlink()
    for entry in package.rglob("*"):
        entry.chmod(0o755 if entry.is_dir() else 0o644)


class _Package:
    """The program in a package, its constants decoded."""

    def __init__(self, path: Path) -> None:
        from coremltools.libmilstoragepython import _BlobStorageReader
        from coremltools.proto import Model_pb2

        file = path / "Data" / _MODEL
        if not file.is_file():
            raise SlimlineError(f"{path} is no Core ML package: give a folder that ends in .mlpackage.")
        self.model = Model_pb2.Model()
        try:
            self.model.ParseFromString(file.read_bytes())
        except Exception as error:  # protobuf's own type
            raise SlimlineError(f"{file} cannot be read: export the model again.") from error
        weights = path / "Data" / _WEIGHTS / "weight.bin"
        self._blobs = _BlobStorageReader(str(weights)) if weights.is_file() else None
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
        for operation in self.block.operations:
            if operation.type == "const":
                array = self.value(operation.attributes["val"])
                if array is not None:
                    yield array

    def packed(self) -> Iterator[tuple[Array, Array, int]]:
        """Integers, scales and axis of every weight that is stored as integers."""
        for operation in self.block.operations:
            if operation.type == "constexpr_affine_dequantize":
                integers, scale = (self.value(operation.attributes[key]) for key in ("quantized_data", "scale"))
                axis = self.value(operation.attributes["axis"])
                assert integers is not None and scale is not None and axis is not None
                yield integers, scale, int(axis)

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
            flat = np.frombuffer(held, dtype) if isinstance(held, bytes) else np.asarray(list(held), dtype)
        return flat.reshape(shape)

    def _blob(self, dtype: str, offset: int) -> Array:
        if self._blobs is None:
            raise SlimlineError("The Core ML package has no file of weights: export the model again.")
        name = {"float32": "float", "float16": "fp16"}.get(dtype, dtype)
        flat = np.asarray(getattr(self._blobs, f"read_{name}_data")(offset))
        return flat.view(dtype) if dtype == "float16" and flat.dtype != np.float16 else flat.astype(dtype)


def _same_interface(program: torch.export.ExportedProgram, package: _Package) -> None:
    nodes = {node.name: node for node in program.graph.nodes}
    inputs = [nodes[name].meta["val"] for name in program.graph_signature.user_inputs if isinstance(name, str)]
    answers = [node.meta["val"] for node in program.graph.output_node().args[0]]
    for what, values, specs in (("inputs", inputs, package.inputs()), ("outputs", answers, package.outputs())):
        expected = [(_sizes(x.shape), _dtype(x)) for x in values]
        written = [(shape, dtype) for _, shape, dtype in specs]
        if len(expected) != len(written) or not all(map(_alike, expected, written)):
            raise SlimlineError(
                f"The Core ML package has {what} {written} where the model has {expected}, so it was not written: "
                "report this model to slimline."
            )


def _alike(expected: tuple[Any, str], written: tuple[Any, str]) -> bool:
    """Whether types are equal, and sizes where the converter knows them."""
    (sizes, dtype), (others, other) = expected, written
    if dtype != other or len(sizes) != len(others):
        return False
    return all(None in (a, b) or a == b for a, b in zip(sizes, others, strict=True))


def _sizes(shape: Any) -> tuple[int | None, ...]:
    return tuple(n if isinstance(n, int) else None for n in shape)


def _dtype(tensor: torch.Tensor) -> str:
    """As Core ML has it: floats are float32 outside, integers int32."""
    return "float32" if tensor.is_floating_point() else "int32"


def _same_weights(program: torch.export.ExportedProgram, package: _Package, precision: str) -> None:
    """Every weight that a layer reads is in the package, rounded to its precision at most."""
    plain: dict[int, list[Array]] = {}
    for array in package.constants():
        plain.setdefault(array.size, []).append(array)
    packed = list(package.packed())
    for name, weight, grid in _weights(program):
        if grid is None:
            rounded = weight.astype(precision if weight.dtype.kind == "f" else weight.dtype)
            if not np.isfinite(rounded).all():
                raise SlimlineError(f"{name} has numbers that {precision} does not: scale it, or export in float32.")
            present = any(_equal(rounded, array) for array in plain.get(weight.size, ()))
        else:
            scale, axis = grid
            scale = scale.astype(precision)
            present = any(
                np.array_equal(weight, integers) and np.array_equal(np.ravel(scale), np.ravel(scales)) and axis == other
                for integers, scales, other in packed
            )
        if not present:
            raise SlimlineError(
                f"The Core ML package does not hold {name} as the model has it, so it was not written: report this "
                "model to slimline."
            )


def _equal(weight: Array, array: Array) -> bool:
    """Whether a stored tensor is the weight, in the other order where it is a matrix."""
    ways = [weight.ravel(), *([weight.T.ravel()] if weight.ndim == 2 else [])]
    return any(np.array_equal(way, array.ravel()) for way in ways)


def _weights(program: torch.export.ExportedProgram) -> Iterator[tuple[str, Array, tuple[Array, int] | None]]:
    """Name and content of what layers read; of integers also the scales and their axis."""
    stored = {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}
    tensors: Mapping[str, Any] = program.state_dict

    def content(node: Any) -> Array:
        array: Array = tensors[stored[node.name]].detach().cpu().float().numpy()
        return array

    for node in program.graph.nodes:
        if node.op != "call_function" or not str(node.target).split(".")[1].startswith(_READERS):
            continue
        for read in node.args[:3]:
            if getattr(read, "name", None) in stored and stored[read.name] in tensors:
                yield stored[read.name], content(read), None
            elif "dequantize_per_channel" in str(getattr(read, "target", "")):
                integers, scales, _, axis = read.args[:4]
                name = stored[integers.name]
                yield name.removesuffix("_integers"), tensors[name].numpy(), (content(scales), axis)


def _same_grids(program: torch.export.ExportedProgram, package: _Package, precision: str) -> None:
    """The package rounds to the model's grids and no others, and as many layers read integers."""
    kind = np.dtype(precision).type
    grids = {
        (float(kind(node.args[1])), int(node.args[2])): float(node.args[1])
        for node in program.graph.nodes
        if str(node.target).startswith("quantized_decomposed.quantize_per_tensor")
    }
    for (rounded, _), scale in grids.items():
        if abs(rounded - scale) > 0.01 * scale:
            raise SlimlineError(
                f"{precision} does not hold the step {scale:.3g} of an integer grid: export in float32."
            )
    products = [
        node
        for node in program.graph.nodes
        if node.op == "call_function"
        and str(node.target).split(".")[1].startswith(("conv", "linear", "addmm"))
        and "dequantize_per_tensor" in str(getattr(node.args[0], "target", ""))
    ]
    foreign = [grid for grid in package.grids() if grid[1:] not in grids]
    if foreign or package.integer_products() < len(products):
        what = f"rounds to a grid {foreign[0][1:]} that is none" if foreign else "loses grids"
        raise SlimlineError(
            f"The Core ML package {what} of the model's, so it was not written: report this model to slimline."
        )
