"""The TensorRT target: ONNX in TensorRT's explicit quantization, and the command that builds an engine of it.

TensorRT runs on NVIDIA GPUs only, so a file is checked by TensorRT's rules, by parser and builder of ``tensorrt-rtx``
where that is installed (it is proprietary: never a dependency), and by ONNX Runtime, which answers in its place.
Networks are strongly typed, as TensorRT 11 wants them and TensorRT 10 can have them: what is computed in which
precision is in the file, and no flag of ``trtexec`` says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.basics.quiet import silent
from slimline.files.atomic import atomic_write
from slimline.graph.placement import Policy
from slimline.methods.formats import FloatFormat, Format, IntegerGrid
from slimline.runtimes.base import Runtime
from slimline.runtimes.forms import ONNX, Form
from slimline.runtimes.forms.onnx_formats import coded
from slimline.runtimes.onnx_session import OnnxSession

if TYPE_CHECKING:
    import onnx
    import onnxruntime as ort

Array = np.ndarray[Any, np.dtype[Any]]
Specs = list[tuple[str, tuple[int | None, ...], str]]

OPTIMAL, LARGEST = 32, 1024
"""Batch sizes that the command names: for which the engine is tuned, and the largest that it takes."""
_ROUNDING = ("QuantizeLinear", "DequantizeLinear")
_BLOCKS = (64, 128)
"""Lengths of the blocks in which its INT4 weights have scales."""
_BIASED = ("Conv", "ConvTranspose", "Gemm")

POLICY = Policy(
    activations="int8",
    fused=frozenset({"relu", "relu6", "clip", "hardtanh"}),
    # TensorRT fuses an addition into the convolution before it where only the other input is rounded.
    glue=frozenset(),
    transposed=True,
    float_results=frozenset({"conv", "linear", "einsum"}),
    linear_channels=True,
    constants=frozenset(),
    ranges={},
    transposed_channels=True,
    whole=False,
    one_grid=frozenset(),
    symmetric=True,
    narrowest=16,
)

FLOAT8 = replace(
    POLICY,
    activations="fp8_e4m3",
    transposed=False,  # of convolutions it has those alone
    aligned=16,
    positions=32,
)
"""FP8 is multiplied by tensor cores, in tiles of 16 channels."""
_EIGHT = "float8_e4m3fn"


class TensorRT(Runtime):
    """The target ``tensorrt``, see `slimline.runtimes.base.Runtime`."""

    name = "tensorrt"
    extra = "torch"
    suffix = ".onnx"
    forms = (ONNX,)
    policy = POLICY
    policies = MappingProxyType({FLOAT8.activations: FLOAT8})
    packages = ("onnx", "onnx-ir", "onnxscript", "tensorrt-rtx")
    precisions = ("float32", "float16", "int8", "fp8_e4m3", "weights in int8, int4 and fp8_e4m3")
    abilities: frozenset[str] = frozenset()
    elsewhere = "with TensorRT on NVIDIA GPUs"
    description = "TensorRT 10 and 11, not run here: ONNX in explicit quantization, int8 without zero points, or FP8"
    writes = (
        "int8 grids without zero points and float8_e4m3fn, weights with one scale per tensor or per position of an "
        "axis, activations with one"
    )
    stores = (
        "integers of 2 to 8 bits without zero points per tensor or position of an axis, of up to 4 bits in blocks of "
        "64 or 128 inputs of a linear layer, float8_e4m3fn per tensor or position of an axis, and float16"
    )
    storage = (
        "each weight is one DequantizeLinear; which of them TensorRT multiplies by as they are stored, and which it "
        "turns to float when it builds the engine, depends on the GPU"
    )

    def __init__(self, name: str = name, precision: str = "fp32") -> None:
        self.name, self._half = name, precision == "fp16"

    def settings(self) -> Mapping[str, Mapping[str, str]]:
        """In what real numbers are computed."""
        return {
            "precision": {
                "fp32": "real numbers are float32, for which TensorRT may take TF32; the default",
                "fp16": "real numbers are float16 inside, inputs and outputs float32",
            }
        }

    def configured(self, name: str, chosen: Mapping[str, str]) -> TensorRT:
        """In another precision."""
        return TensorRT(name, chosen["precision"])

    @property
    def rounds_reals(self) -> bool:
        """In float16."""
        return self._half

    def can_write(self, each: Format, stored: bool) -> bool:
        """Of floats float8_e4m3fn."""
        if isinstance(each, FloatFormat):
            return each.dtype == _EIGHT and (each.per_tensor or (stored and each.axis is not None))
        return super().can_write(each, stored)

    def can_store(self, each: Format) -> bool:
        """Without zero points; INT4 has scales in blocks, FP8 has not."""
        each = coded(each)
        if isinstance(each, FloatFormat):
            eight = each.dtype == _EIGHT and (each.per_tensor or each.axis is not None)
            return eight or (each.dtype == "float16" and each.is_plain)
        if not isinstance(each, IntegerGrid) or each.zero_point is not None or not each.signed or each.bits > 8:
            return False
        return each.per_tensor or each.axis is not None or _in_blocks(each)

    def container(self, each: Format) -> int:
        """4 in blocks, else 8: its INT4 has scales in blocks alone."""
        each = coded(each)
        return each.code_bits if isinstance(each, FloatFormat) else 4 if _in_blocks(each) else 8

    def available(self) -> str | None:
        """None: what writes and checks ONNX always is."""
        return None

    def lower(self, form: Form, path: Path) -> None:
        """Write the ONNX file, and beside it ``NAME.trtexec.txt`` with the command that builds an engine of it.

        Raises
        ------
        SlimlineError : inputs that blocks do not divide, or a step that float16 does not hold.
        """
        from slimline.runtimes.forms.onnx import explicit, serialized
        from slimline.runtimes.forms.onnx_half import halved

        weights = {name: _typed(each) for name, each in form.weights.items()}
        content = serialized(form.content, lambda model: explicit(model, weights, self._half))
        atomic_write(path, halved(content) if self._half else content)
        atomic_write(path.with_suffix(".trtexec.txt"), f"{_command(path)}\n".encode())

    def verify(self, form: Form, path: Path) -> OnnxSession:
        """Check the file by TensorRT's rules, and by TensorRT for RTX where that is installed; ONNX Runtime answers.

        Raises
        ------
        SlimlineError : a rule is broken, or TensorRT for RTX refuses the file.
        """
        import onnx

        broken = list(violations(onnx.load(str(path))))
        if broken:
            raise SlimlineError(
                f"The ONNX file breaks a rule of TensorRT ({broken[0]}), so it was not written: report this model to "
                "slimline."
            )
        if refused := _refused(path):
            raise SlimlineError(f"TensorRT refuses the model ({refused}): express that part of it otherwise.")
        return OnnxSession(_session(path))

    def input_specs(self, path: Path) -> Specs:
        """Name, shape (None where any size goes) and dtype of each input."""
        return _specs(path)


runtime = TensorRT()


def _in_blocks(each: Format) -> bool:
    """Whether a grid is one of INT4 with scales in blocks along the inputs of a linear layer."""
    if not isinstance(each, IntegerGrid) or each.bits > 4 or len(each.blocks) != 2:
        return False
    return any(each.blocks == pair for block in _BLOCKS for pair in ((1, block), (block, 1)))


def _typed(each: Format) -> Format:
    """A format with the codes that the file has: of up to 4 bits without blocks int8."""
    each = coded(each)
    if isinstance(each, IntegerGrid) and not _in_blocks(each):
        return replace(each, bits=8, narrow=False)
    return each


def violations(model: onnx.ModelProto) -> Iterator[str]:
    """What TensorRT's explicit quantization does not take, or would silently leave in float.

    Types are int8 and float8_e4m3fn with zero points of zero, and of weights int4 too, in blocks. A layer multiplies
    both of its operands in the same one of the first two. Activations have one step in all, other weights one for each
    output channel; biases and the outputs of the network are not rounded.
    """
    graph = model.graph
    constants: Mapping[str, onnx.TensorProto] = {each.name: each for each in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type in _ROUNDING:
            yield from _rounding(node, constants)
        if node.op_type in _BIASED and len(node.input) > 2 and _rounds(makers.get(node.input[2])):
            yield f"the bias of {node.name} is rounded"
        if node.op_type in (*_BIASED, "MatMul") and len(node.input) > 1:
            kinds = {_kind(makers.get(name), constants) for name in node.input[:2]}
            if len(kinds - {None}) > 1:
                yield f"{node.name} multiplies float8_e4m3fn by integers"
            weight = makers.get(node.input[1])
            if weight is not None and _rounds(weight) and weight.input[0] in constants:
                channels = _per_channel(weight, constants)
                if channels is not None and channels != _axis(node, len(constants[weight.input[0]].dims)):
                    yield f"the weight of {node.name} has its steps along dimension {channels}"
    for output in graph.output:
        if _rounds(makers.get(output.name)):
            yield f"the output {output.name} is rounded"


def _rounding(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> Iterator[str]:
    """What is wrong with one operator that rounds or unrounds."""
    from onnx import numpy_helper

    if any(name not in constants for name in node.input[1:]):
        yield f"the grid of {node.input[0]} is computed"
        return
    scale = numpy_helper.to_array(constants[node.input[1]])
    zero = numpy_helper.to_array(constants[node.input[2]]) if len(node.input) > 2 else None
    weight = node.op_type == "DequantizeLinear" and node.input[0] in constants
    if weight:
        yield from _weight(node, constants[node.input[0]])
    if zero is None and not weight:
        yield f"the grid of {node.input[0]} is of uint8"
    if zero is not None and (zero.dtype.name not in ("int8", _EIGHT) or zero.astype(np.float32).any()):
        yield f"the grid of {node.input[0]} is of {zero.dtype}, or has a zero point"
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        yield f"the grid of {node.input[0]} has a step that is not positive"
    if scale.size != 1 and not weight:
        yield f"the activation {node.input[0]} has more than one step"


def _weight(node: onnx.NodeProto, codes: onnx.TensorProto) -> Iterator[str]:
    """What is wrong with the type of a stored weight, or with its blocks."""
    from onnx import TensorProto

    axis, block = (next((int(a.i) for a in node.attribute if a.name == name), 0) for name in ("axis", "block_size"))
    if codes.data_type not in (TensorProto.INT8, TensorProto.INT4, TensorProto.FLOAT8E4M3FN):
        yield f"the weight {codes.name} is not int8, int4 or float8_e4m3fn"
    if block and codes.data_type != TensorProto.INT4:
        yield f"the weight {codes.name} has blocks, and is not int4"
    if codes.data_type == TensorProto.INT4:
        last = axis % len(codes.dims) >= len(codes.dims) - 2
        if block not in _BLOCKS or not last or codes.dims[axis] % block:
            yield f"the int4 weight {codes.name} is not in whole blocks of 64 or 128 along one of its last dimensions"


def _kind(node: onnx.NodeProto | None, constants: Mapping[str, onnx.TensorProto]) -> bool | None:
    """Whether what an operator unrounds is of floats; None where it unrounds nothing."""
    from onnx import TensorProto

    if not _rounds(node) or node is None:
        return None
    held = [constants[name].data_type for name in (node.input[0], *node.input[2:]) if name in constants]
    return TensorProto.FLOAT8E4M3FN in held


def _rounds(node: onnx.NodeProto | None) -> bool:
    return node is not None and node.op_type in _ROUNDING


def _per_channel(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> int | None:
    """The dimension along which a weight has several steps; None where it has one in all, or blocks."""
    if not constants[node.input[1]].dims or any(a.name == "block_size" and a.i for a in node.attribute):
        return None
    return next((int(a.i) for a in node.attribute if a.name == "axis"), 1)


def _axis(node: onnx.NodeProto, rank: int) -> int:
    """The dimension of the weight that counts output channels."""
    if node.op_type == "Conv":
        return 0
    turned = any(a.name == "transB" and a.i for a in node.attribute)
    return rank - 2 if turned else 1 if node.op_type == "ConvTranspose" else rank - 1


def _command(path: Path) -> str:
    """What builds an engine in the precisions of the file; TensorRT 11 knows no other way, and takes the flag too."""
    words = ["trtexec", f"--onnx={path.name}", f"--saveEngine={path.stem}.engine", "--stronglyTyped"]
    specs = _specs(path)
    if any(None in shape for _, shape, _ in specs):
        for bound, size in (("min", 1), ("opt", OPTIMAL), ("max", LARGEST)):
            shapes = (f"{name}:{'x'.join(map(str, _sized(shape, size)))}" for name, shape, _ in specs)
            words.append(f"--{bound}Shapes={','.join(shapes)}")
    return " ".join(words)


def _sized(shape: tuple[int | None, ...], size: int) -> tuple[int, ...]:
    """A shape with a size in place of those that are free."""
    return tuple(size if n is None else n for n in shape)


def _specs(path: Path) -> Specs:
    import onnx

    specs: Specs = []
    for each in onnx.load(str(path), load_external_data=False).graph.input:
        tensor = each.type.tensor_type
        shape = tuple(int(d.dim_value) if d.HasField("dim_value") else None for d in tensor.shape.dim)
        dtype = str(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)))
        specs.append((each.name, shape, dtype))
    return specs


def _refused(path: Path) -> str:
    """Why the parser or the builder of ``tensorrt-rtx`` refuses a file, or ''; '' too where it is not installed.

    Neither needs a GPU.
    """
    if find_spec("tensorrt_rtx_libs") is None or find_spec("tensorrt_rtx_bindings") is None:
        return ""
    with silent():
        import tensorrt_rtx_libs  # noqa: F401  (loads what the bindings need)

        import tensorrt_rtx_bindings as trt  # isort: skip

        logger = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse(path.read_bytes()):
            reason = parser.get_error(0).desc() if parser.num_errors else "it does not say why"
            return " ".join(str(reason).split())[:200]
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        for name, shape, _ in _specs(path):
            if None in shape:
                profile.set_shape(name, *(_sized(shape, size) for size in (1, OPTIMAL, LARGEST)))
        config.add_optimization_profile(profile)
        return "" if builder.build_serialized_network(network, config) is not None else "no engine can be built of it"


def _session(path: Path) -> ort.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
