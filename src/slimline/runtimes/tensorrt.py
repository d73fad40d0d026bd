"""The TensorRT target: ONNX in TensorRT's explicit quantization, and the command that builds an engine of it.

TensorRT runs on NVIDIA GPUs only, so a file is checked by TensorRT's rules, by the parser of ``tensorrt-rtx`` where
that is installed (it is proprietary: never a dependency), and by ONNX Runtime, which answers in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.basics.quiet import silent
from slimline.files.atomic import atomic_write
from slimline.graph.placement import Policy
from slimline.runtimes.base import Runtime
from slimline.runtimes.forms import ONNX, Form
from slimline.runtimes.onnx_session import OnnxSession

if TYPE_CHECKING:
    import onnx
    import onnxruntime as ort

Array = np.ndarray[Any, np.dtype[Any]]
Specs = list[tuple[str, tuple[int | None, ...], str]]

OPTIMAL, LARGEST = 32, 1024
"""Batch sizes that the command names: for which the engine is tuned, and the largest that it takes."""
_ROUNDING = ("QuantizeLinear", "DequantizeLinear")
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


class TensorRT(Runtime):
    """The target ``tensorrt``, see `slimline.runtimes.base.Runtime`."""

    name = "tensorrt"
    extra = "torch"
    suffix = ".onnx"
    forms = (ONNX,)
    policy = POLICY
    packages = ("onnx", "onnx-ir", "onnxscript", "tensorrt-rtx")
    abilities: frozenset[str] = frozenset()
    elsewhere = "with TensorRT on NVIDIA GPUs"
    description = "TensorRT 10, not run here: ONNX in explicit quantization, int8 without zero points"

    def available(self) -> str | None:
        """None: what writes and checks ONNX always is."""
        return None

    def lower(self, form: Form, path: Path) -> None:
        """Write the ONNX file, and beside it ``NAME.trtexec.txt`` with the command that builds an engine of it."""
        from slimline.runtimes.forms.onnx import explicit, serialized

        content = serialized(form.content, explicit)
        atomic_write(path, content)
        atomic_write(path.with_suffix(".trtexec.txt"), f"{_command(path, form.integer)}\n".encode())

    def verify(self, form: Form, path: Path) -> OnnxSession:
        """Check the file by TensorRT's rules, and by its parser where that is installed; ONNX Runtime answers for it.

        Raises
        ------
        SlimlineError : a rule is broken, or the parser refuses the file.
        """
        import onnx

        broken = list(violations(onnx.load(str(path))))
        if broken:
            raise SlimlineError(
                f"The ONNX file breaks a rule of TensorRT ({broken[0]}), so it was not written: report this model to "
                "slimline."
            )
        if refused := _parsed(path):
            raise SlimlineError(f"TensorRT's parser refuses the model ({refused}): express that part of it otherwise.")
        return OnnxSession(_session(path))

    def input_specs(self, path: Path) -> Specs:
        """Name, shape (None where any size goes) and dtype of each input."""
        return _specs(path)


runtime = TensorRT()


def violations(model: onnx.ModelProto) -> Iterator[str]:
    """What TensorRT's explicit quantization does not take, or would silently leave in float.

    Types are int8 with zero points of zero; activations have one step in all, weights one for each output channel;
    biases and the outputs of the network are not rounded.
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
    from onnx import TensorProto, numpy_helper

    if any(name not in constants for name in node.input[1:]):
        yield f"the grid of {node.input[0]} is computed"
        return
    scale = numpy_helper.to_array(constants[node.input[1]])
    zero = numpy_helper.to_array(constants[node.input[2]]) if len(node.input) > 2 else None
    weight = node.op_type == "DequantizeLinear" and node.input[0] in constants
    if weight and constants[node.input[0]].data_type != TensorProto.INT8:
        yield f"the weight {node.input[0]} is not int8"
    if zero is None and not weight:
        yield f"the grid of {node.input[0]} is of uint8"
    if zero is not None and (zero.dtype != np.int8 or zero.any()):
        yield f"the grid of {node.input[0]} is of {zero.dtype}, or has a zero point"
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        yield f"the grid of {node.input[0]} has a step that is not positive"
    if scale.size != 1 and not weight:
        yield f"the activation {node.input[0]} has more than one step"


def _rounds(node: onnx.NodeProto | None) -> bool:
    return node is not None and node.op_type in _ROUNDING


def _per_channel(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> int | None:
    """The dimension along which a weight has several steps; None where it has one in all."""
    if not constants[node.input[1]].dims:
        return None
    return next((int(a.i) for a in node.attribute if a.name == "axis"), 1)


def _axis(node: onnx.NodeProto, rank: int) -> int:
    """The dimension of the weight that counts output channels."""
    if node.op_type == "Conv":
        return 0
    turned = any(a.name == "transB" and a.i for a in node.attribute)
    return rank - 2 if turned else 1 if node.op_type == "ConvTranspose" else rank - 1


def _command(path: Path, integer: bool) -> str:
    """What builds an engine; without ``--fp16`` what is not integer stays in float32."""
    words = ["trtexec", f"--onnx={path.name}", f"--saveEngine={path.stem}.engine", "--fp16"]
    if integer:
        words.append("--int8")
    specs = _specs(path)
    if any(None in shape for _, shape, _ in specs):
        for bound, size in (("min", 1), ("opt", OPTIMAL), ("max", LARGEST)):
            shapes = (f"{name}:{'x'.join(str(size if n is None else n) for n in shape)}" for name, shape, _ in specs)
            words.append(f"--{bound}Shapes={','.join(shapes)}")
    return " ".join(words)


def _specs(path: Path) -> Specs:
    import onnx

    specs: Specs = []
    for each in onnx.load(str(path), load_external_data=False).graph.input:
        tensor = each.type.tensor_type
        shape = tuple(int(d.dim_value) if d.HasField("dim_value") else None for d in tensor.shape.dim)
        dtype = str(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)))
        specs.append((each.name, shape, dtype))
    return specs


def _parsed(path: Path) -> str:
    """Why the parser of ``tensorrt-rtx`` refuses a file, or ''; '' too where it is not installed."""
    if find_spec("tensorrt_rtx_libs") is None or find_spec("tensorrt_rtx_bindings") is None:
        return ""
    with silent():
        import tensorrt_rtx_libs  # noqa: F401  (loads what the bindings need)

        import tensorrt_rtx_bindings as trt  # isort: skip

        logger = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        if parser.parse(path.read_bytes()):
            return ""
        return " ".join(str(parser.get_error(0).desc()).split())[:200] if parser.num_errors else "it does not say why"


def _session(path: Path) -> ort.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
