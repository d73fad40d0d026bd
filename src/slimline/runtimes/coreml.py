"""The Core ML target: PyTorch models as ``.mlpackage`` folders, for Apple devices.

Core ML runs nowhere else, so a package is checked against the program that it was made of: inputs, outputs, weights and
grids, decoded from the file. Floats are float16 inside, as is Core ML's own default, inputs and outputs float32.
Weights of short formats, with zeros or of few values are held as `slimline.runtimes.coreml_weights` says.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from slimline.basics.errors import SlimlineError, first_line, require
from slimline.basics.quiet import silent
from slimline.graph.placement import Policy
from slimline.methods.formats import Format
from slimline.runtimes import coreml_weights
from slimline.runtimes.base import Runtime
from slimline.runtimes.coreml_package import MODEL, WEIGHTS, Package
from slimline.runtimes.coreml_weights import Stored, add_pass, smallest, ways
from slimline.runtimes.forms import EXPORTED_PROGRAM, Form

if TYPE_CHECKING:
    import torch

    from slimline.runtimes.base import Session

Array = np.ndarray[Any, np.dtype[Any]]
Specs = list[tuple[str, tuple[int | None, ...], str]]

_NAMESPACE = uuid.UUID("5f0e4f5a-1f0c-5c49-9d52-6f1d6d8b6f0e")
"""Of the identifiers in the manifest, which Core ML draws at random."""
_FOLDING = (
    "fuse_conv_scale", "fuse_conv_batchnorm", "fuse_elementwise_to_batchnorm",
    "distributive_quantized_binary_op_scale_normalization", "nullify_redundant_quantization_zero_point",
)  # fmt: skip
"""Passes that change weights or grids: the file would no longer hold those that were calibrated."""
_READERS = ("conv", "linear", "embedding", "addmm")
_SYSTEMS = {"ios17": "iOS 17 or macOS 14", "ios18": "iOS 18 or macOS 15"}

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
    system : ``ios17`` or ``ios18``, the oldest that has to load the file; '' for the oldest that its weights allow.
    """

    name = "coreml"
    extra = "coreml"
    suffix = ".mlpackage"
    forms = (EXPORTED_PROGRAM,)
    policy = POLICY
    packages = ("coremltools", "torch")
    precisions = ("float16", "int8", "weights of 1 to 8 bits")
    abilities: frozenset[str] = frozenset()
    elsewhere = "on Apple devices"
    description = (
        "Core ML for iOS 17 and macOS 14 or later, not run here: int8 activations and int8 weights per channel, or "
        "weights alone in blocks, as palettes and without their zeros"
    )
    storage = (
        "weights are decoded when the file is loaded or where they are read, as the device decides; 8-bit integers per "
        "channel, zeros left out and one palette in all are for iOS 17, all else for iOS 18, as the file's description "
        "says; scales and levels are rounded to float16"
    )
    shrinks = frozenset({"zeros", "shared values"})

    def __init__(
        self, precision: Literal["float16", "float32"] = "float16", system: str = "", name: str = name
    ) -> None:
        self.name, self.precision, self._system = name, precision, system
        self._legacy = system == "ios17"
        half = ", float16" if precision == "float16" else ""
        self.stores = f"integers of 2 to 8 bits and up to 256 levels with any scales, float8_e4m3fn, float8_e5m2{half}"
        if self._legacy:
            self.stores = f"integers of 2 to 8 bits per tensor or position of an axis, levels per tensor{half}"

    def can_store(self, each: Format) -> bool:
        """See `slimline.runtimes.coreml_weights`."""
        return coreml_weights.can_store(each, self.precision, self._legacy)

    def container(self, each: Format) -> int:
        """Places in palettes take 1, 2, 3, 4, 6 or 8 bits."""
        return coreml_weights.container(each, self._legacy)

    def settings(self) -> Mapping[str, Mapping[str, str]]:
        """In what floats are computed, and for which system."""
        return {
            "precision": {
                "fp16": "floats are float16 inside; the default",
                "fp32": "floats are float32 inside, which GPUs and CPUs compute",
            },
            "system": {word: f"for {what}, whatever the weights need" for word, what in _SYSTEMS.items()},
        }

    def configured(self, name: str, chosen: Mapping[str, str]) -> CoreML:
        """In another precision, for another system, or both."""
        precision: Literal["float16", "float32"] = "float32" if chosen.get("precision") == "fp32" else "float16"
        return CoreML(precision, chosen.get("system", ""), name)

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
        held = _held(form, self.precision, self._legacy)
        system = self._system or ("ios17" if all(each.legacy for _, each in held.values()) else "ios18")
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            package = Path(folder, path.name)
            _convert(form.content, package, self.precision, system, list(held.values()))
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
            reading = Package(path)
        _same_interface(form.content, reading)
        _same_weights(form, reading, self.precision, _held(form, self.precision, self._legacy))
        _same_grids(form.content, reading, self.precision)
        return None

    def input_specs(self, path: Path) -> Specs:
        """Name, shape (None where any size up to a bound goes) and dtype of each input."""
        with silent():
            return Package(Path(path)).inputs()


runtime = CoreML()


def _held(form: Form, precision: str, legacy: bool) -> dict[str, tuple[Array, Stored]]:
    """The weights that the package holds otherwise than they are used, by name, and how.

    Raises
    ------
    SlimlineError : a weight that is to be stored in a format, and is not in the program.
    """
    if form.integer:
        return {}
    program = form.content
    weights = {name: weight for name, weight, _ in _weights(program) if weight.ndim > 1}
    for name in form.weights:
        if name not in program.state_dict:
            raise SlimlineError(
                f"The program does not hold the weight {name} to be stored: leave its layer out by keep."
            )
        weights[name] = program.state_dict[name].detach().cpu().float().numpy()
    ways = {name: smallest(weight, form.weights.get(name), precision, legacy) for name, weight in weights.items()}
    return {name: (weights[name], way) for name, way in ways.items() if not way.is_plain}


def _convert(
    program: torch.export.ExportedProgram,
    package: Path,
    precision: str,
    system: str,
    held: Sequence[tuple[Array, Stored]],
) -> None:
    outputs = program.graph.output_node().args[0]
    floats = [node.meta["val"].is_floating_point() for node in outputs]
    names = ["output"] if len(floats) == 1 else [f"output_{i}" for i in range(len(floats))]
    with silent():
        import coremltools as ct

        pipeline = ct.PassPipeline.DEFAULT
        pipeline.remove_passes({f"common::{name}" for name in _FOLDING})
        if held:
            add_pass(pipeline, held)
        try:
            ct.convert(
                program.run_decompositions({}),
                outputs=[
                    ct.TensorType(name=name, **({"dtype": np.float32} if real else {}))
                    for name, real in zip(names, floats, strict=True)
                ],
                convert_to="mlprogram",
                minimum_deployment_target=ct.target.iOS17 if system == "ios17" else ct.target.iOS18,
                compute_precision=ct.precision.FLOAT16 if precision == "float16" else ct.precision.FLOAT32,
                pass_pipeline=pipeline,
                skip_model_load=True,
            ).save(str(package))
        except Exception as error:  # the converter raises many types
            raise SlimlineError(
                f"The model cannot be written for Core ML ({first_line(error)[:200]}): "
                "express that part of it by common operators."
            ) from error
        _settle(package, system)


def _settle(package: Path, system: str) -> None:
    """Make a package the same each time: identifiers, dates, files for debuggers; and let a batch of one in."""
    from coremltools.proto import Model_pb2

    file = package / "Data" / MODEL
    model = Model_pb2.Model()
    model.ParseFromString(file.read_bytes())
    model.description.metadata.userDefined.clear()
    model.description.metadata.shortDescription = f"Needs {_SYSTEMS[system]}."
    for each in model.description.input:
        array = each.type.multiArrayType
        for size in array.shapeRange.sizeRanges[:1]:
            if size.upperBound != size.lowerBound:
                size.lowerBound = 1
    file.write_bytes(model.SerializeToString(deterministic=True))
    entries = {"model.mlmodel": (MODEL, "CoreML Model Specification"), "weights": (WEIGHTS, "CoreML Model Weights")}
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
    root = str(uuid.uuid5(_NAMESPACE, MODEL))
    manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": items, "rootModelIdentifier": root}
    (package / "Manifest.json").write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n", "utf-8")
    for entry in package.iterdir():
        if entry.name not in ("Manifest.json", "Data"):
            entry.unlink()
    for entry in package.rglob("*"):
        entry.chmod(0o755 if entry.is_dir() else 0o644)


def _same_interface(program: torch.export.ExportedProgram, package: Package) -> None:
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


def _same_weights(form: Form, package: Package, precision: str, held: Mapping[str, tuple[Array, Stored]]) -> None:
    """Every weight that a layer reads is in the package, rounded to its precision at most, in no more bits than it is
    to be held in, and with the codes of its format."""
    plain: dict[int, list[Array]] = {}
    for array in package.constants():
        plain.setdefault(array.size, []).append(array)
    decoded = list(package.weights())

    def present(name: str, weight: Array, grid: tuple[Array, int] | None) -> bool:
        if grid is not None:
            scale, axis = grid
            return any(
                np.array_equal(weight, each.arrays["quantized_data"])
                and np.array_equal(np.ravel(scale.astype(precision)), np.ravel(each.arrays["scale"]))
                and axis == int(each.arrays["axis"])
                for each in decoded
                if "quantized_data" in each.arrays
            )
        if name in held:
            limit, coded = held[name][1].bits, form.weights.get(name)
            return any(
                each.bits <= limit and any(_close(weight, laid, coded) for laid, _ in ways(each.values, weight.shape))
                for each in decoded
            )
        rounded = weight.astype(precision if weight.dtype.kind == "f" else weight.dtype)
        return any(_equal(rounded, array) for array in plain.get(weight.size, ()))

    weights = {name: (weight, grid) for name, weight, grid in _weights(form.content)}
    weights |= {name: (weight, None) for name, (weight, _) in held.items()}
    for name, (weight, grid) in weights.items():
        if weight.dtype.kind == "f" and not (np.abs(weight) <= np.finfo(precision).max).all():
            raise SlimlineError(f"{name} has numbers that {precision} does not: scale it, or export for coreml:fp32.")
        if not present(name, weight, grid):
            raise SlimlineError(
                f"The Core ML package does not hold {name} as the model has it, so it was not written: report this "
                "model to slimline."
            )


def _close(weight: Array, decoded: Array, coded: Format | None) -> bool:
    """Whether scales, levels and their product are off by no more than their rounding, and the codes are the same."""
    kind = np.finfo(decoded.dtype)
    real = decoded.astype(np.float32)
    if not (np.abs(real - weight) <= 2 * kind.eps * np.abs(weight) + kind.smallest_subnormal).all():
        return False
    return coded is None or np.array_equal(coded.encode(real), coded.encode(weight))


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
        if not _operator(node).startswith(_READERS):
            continue
        for read in node.args[:3]:
            if getattr(read, "name", None) in stored and stored[read.name] in tensors:
                yield stored[read.name], content(read), None
            elif "dequantize_per_channel" in str(getattr(read, "target", "")):
                integers, scales, _, axis = read.args[:4]
                name = stored[integers.name]
                yield name.removesuffix("_integers"), tensors[name].numpy(), (content(scales), axis)


def _operator(node: Any) -> str:
    """What a node calls, without what stands before and behind the name; '' where it is no operator of torch."""
    words = str(node.target).split(".") if node.op == "call_function" else []
    return words[1] if len(words) > 1 else ""


def _same_grids(program: torch.export.ExportedProgram, package: Package, precision: str) -> None:
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
                f"{precision} does not hold the step {scale:.3g} of an integer grid: export for coreml:fp32."
            )
    products = [
        node
        for node in program.graph.nodes
        if _operator(node).startswith(("conv", "linear", "addmm"))
        and "dequantize_per_tensor" in str(getattr(node.args[0], "target", ""))
    ]
    foreign = [grid for grid in package.grids() if grid[1:] not in grids]
    if foreign or package.integer_products() < len(products):
        what = f"rounds to a grid {foreign[0][1:]} that is none" if foreign else "loses grids"
        raise SlimlineError(
            f"The Core ML package {what} of the model's, so it was not written: report this model to slimline."
        )
