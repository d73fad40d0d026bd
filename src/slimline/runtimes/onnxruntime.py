"""ONNX Runtime on the CPU: PyTorch models in, QDQ ONNX files out, run as integer kernels where quantized."""

from __future__ import annotations

import json
import os
import platform
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from slimline.basics.errors import SlimlineError
from slimline.graph.placement import Policy
from slimline.runtimes.base import Runtime
from slimline.runtimes.forms import ONNX, Form

if TYPE_CHECKING:
    import onnxruntime as ort

    from slimline.runtimes.base import Layer

Array = np.ndarray[Any, np.dtype[Any]]

_INTEGER = re.compile(r"^(QLinear|QGemm|QAttention|ConvInteger|MatMulInteger|DynamicQuantizeMatMul|MatMulNBits)")
_CASTS = {"QuantizeLinear", "DequantizeLinear"}
_MOVES = {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Identity", "Concat"}
_SIZES = {"Shape", "Constant", "ConstantOfShape", "Gather", "Cast", "Range", "ReorderInput", "ReorderOutput"}


POLICY = Policy(
    activations="uint8",
    fused=frozenset({"relu", "relu6", "clip", "hardtanh"}),
    glue=frozenset({"elementwise:add", "elementwise:mul", "concat", "pool:mean", "reduce:mean", "elementwise:sigmoid"}),
    transposed=False,
    float_results=frozenset({"linear", "einsum"}),
    linear_channels=True,
    constants=frozenset(),
    ranges={},
    transposed_channels=True,
    whole=False,
    one_grid=frozenset(),
)


class OrtSession:
    """An ONNX file loaded by ONNX Runtime."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self.session = session
        self.names = [i.name for i in session.get_inputs()]
        self.output = session.get_outputs()[0].name

    def run(self, inputs: tuple[Array, ...]) -> Array:
        """The first output for `inputs`, arrays of the artifact's own dtypes, ``(batch, …)`` each."""
        result: Array = self.session.run([self.output], dict(zip(self.names, inputs, strict=True)))[0]
        return result

    def outputs(self, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        """All outputs for `inputs`."""
        return tuple(self.session.run(None, dict(zip(self.names, inputs, strict=True))))


class OnnxRuntime(Runtime):
    """The target ``onnxruntime``."""

    name = "onnxruntime"
    extra = "torch"
    suffix = ".onnx"
    forms = (ONNX,)
    policy = POLICY
    packages = ("onnxruntime", "onnx", "onnx-ir", "onnxscript")
    description = "ONNX Runtime, CPU: uint8 activations, int8 weights per channel"

    def available(self) -> str | None:
        """None if torch is installed (ONNX Runtime always is), else the sentence with the pip command."""
        if find_spec("torch") is None:
            return "torch is not installed: run pip install 'slimline[torch]'."
        return None

    @property
    def weight_bits(self) -> int:
        """8; on x86 without VNNI 7, since kernels there add two products of uint8 and int8 in an int16, which overflows
        without a word (ONNX Runtime's documentation calls it reduced range)."""
        return 7 if saturates() else 8

    def lower(self, form: Form, path: Path) -> None:
        """Write the ONNX file: rounding as QDQ in the layout that ONNX Runtime fuses into integer kernels."""
        from slimline.runtimes.forms.onnx import rewrite, serialized

        content = serialized(form.content, rewrite)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                temporary.unlink()
                raise
        temporary.chmod(0o644)
        temporary.replace(path)

    def sample(self, layer: Layer, path: Path) -> None:
        """Write an ONNX file of layers such as `layer`, see `slimline.runtimes.base.Runtime`."""
        rng = np.random.default_rng(0)
        nodes, weights = [], []
        for i, (inputs, outputs) in enumerate(layer.chain):
            if layer.kernel:
                shape = (outputs, 1 if layer.depthwise else inputs, *layer.kernel)
                reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel, strict=True)]
                pads = [*(n // 2 for n in reach), *(n - n // 2 for n in reach)]
                group = inputs if layer.depthwise else 1
                names = [f"x{i}", f"w{i}"], [f"x{i + 1}"]
                node = helper.make_node("Conv", *names, pads=pads, dilations=layer.dilation, group=group)
            else:
                shape = (outputs, inputs)
                node = helper.make_node("Gemm", [f"x{i}", f"w{i}"], [f"x{i + 1}"], transB=1)
            nodes.append(node)
            weights.append(numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), f"w{i}"))
        size: list[str | int | None] = ["batch", layer.inputs, *(layer.places if layer.kernel else ())]
        kind = onnx.TensorProto.FLOAT
        ends = [helper.make_tensor_value_info(name, kind, size) for name in ("x0", f"x{len(layer.chain)}")]
        graph = helper.make_graph(nodes, "sample", ends[:1], ends[1:], weights)
        opset = [helper.make_opsetid("", 20)]
        path.write_bytes(helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString())

    def load(self, path: Path, threads: int = 1) -> OrtSession:
        """Load an ONNX file for `threads` threads."""
        return OrtSession(_session(path, _options(threads)))

    def integer_layers(self, path: Path) -> Mapping[str, str]:
        """Every operator of the graph that ONNX Runtime made of the file: ``integer`` or ``float``.

        Named by layer as `lower` names nodes; conversions between float and integer and operators that only
        deal in sizes are left out. Read before the last optimisation level, which only changes memory layouts.
        """
        import onnxruntime

        with tempfile.TemporaryDirectory() as folder:
            options = _options(1)
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
            options.optimized_model_filepath = str(Path(folder, "optimized.onnx"))
            _session(path, options)
            graph = onnx.load(options.optimized_model_filepath).graph
        original = {node.name for node in onnx.load(str(path)).graph.node if node.name}
        bytes_ = (onnx.TensorProto.UINT8, onnx.TensorProto.INT8)
        integers = {tensor.name for tensor in graph.initializer if tensor.data_type in bytes_}
        layers: dict[str, str] = {}
        for node in graph.node:
            moved = node.op_type in _MOVES and node.input[0] in integers
            integer = moved or _INTEGER.match(node.op_type) is not None
            if integer or node.op_type == "QuantizeLinear":
                integers.update(node.output)
            if node.op_type not in _CASTS and node.op_type not in _SIZES:
                name = _origin(node.name, original) or node.op_type
                layers[name] = "integer" if integer else "float"
        return layers

    def input_specs(self, path: Path) -> list[tuple[str, tuple[int | None, ...], str]]:
        """Name, shape (None where any size goes) and numpy dtype of each input."""
        session = _session(path, _options(1))
        return [
            (i.name, tuple(d if isinstance(d, int) else None for d in i.shape), _dtype(i.type))
            for i in session.get_inputs()
        ]

    def profile(self, path: Path, inputs: tuple[Array, ...], threads: int = 1, runs: int = 30) -> dict[str, float]:
        """Median milliseconds of each operator that runs, by ``name (operator)``, over `runs` runs."""
        with tempfile.TemporaryDirectory() as folder:
            options = _options(threads)
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder, "profile"))
            session = _session(path, options)
            loaded = OrtSession(session)
            for _ in range(runs):
                loaded.run(inputs)
            events = json.loads(Path(session.end_profiling()).read_text())
        layers = _blocked_names(path)
        times: dict[str, list[float]] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                name = event["name"].removesuffix("_kernel_time")
                label = f"{layers.get(name, name)} ({event['args']['op_name']})"
                times.setdefault(label, []).append(event["dur"] / 1000)
        return {label: float(np.median(durations)) for label, durations in times.items()}


@cache
def saturates() -> bool:
    """Whether this processor multiplies uint8 by int8 in pairs that overflow: x86 that does not say it has VNNI."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i686", "x86"):
        return False
    with suppress(OSError):
        flags = set(Path("/proc/cpuinfo").read_text("ascii", "replace").split())
        return not flags & {"avx512_vnni", "avx_vnni"}
    return True


def _blocked_names(path: Path) -> dict[str, str]:
    """The layers behind the names ``VALUE_nchwc`` that ONNX Runtime gives convolutions in its blocked layout.

    VALUE is the output of the last operator that was fused into the convolution.
    """
    nodes = onnx.load(str(path), load_external_data=False).graph.node
    makers = {output: node for node in nodes for output in node.output}
    found = {}
    for value in makers:
        node = makers[value]
        while node.op_type in ("Relu", "Clip", "Add", "Sigmoid", "HardSigmoid") and node.input[0] in makers:
            node = makers[node.input[0]]
        found[f"{value}_nchwc"] = node.name
    return found


def _options(threads: int) -> ort.SessionOptions:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    # Idle workers would otherwise spin on and take cores from whatever is measured next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _session(path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    if not path.is_file():
        raise SlimlineError(f"There is no file {path}: give the path of an ONNX file.")
    errors = (state.InvalidProtobuf, state.InvalidGraph, state.Fail, state.NotImplemented, state.InvalidArgument)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except errors as error:
        reason = str(error).partition("\n")[0].rpartition(" : ")[2][:200]
        raise SlimlineError(f"ONNX Runtime cannot load {path} ({reason}): give a valid ONNX file.") from error


def _origin(name: str, original: set[str]) -> str | None:
    """The node of the file that a node of the optimized graph, ``NAME`` or ``NAME_token_7``, was made of."""
    if name in original:
        return name
    candidates = [o for o in original if name.startswith((f"{o}_", f"{o}/"))]
    return max(candidates, key=len, default=None)


def _dtype(kind: str) -> str:
    """``tensor(float)`` to ``float32``, and so on."""
    name = kind.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(name, name)


runtime = OnnxRuntime()
