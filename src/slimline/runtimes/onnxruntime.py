"""ONNX Runtime on the CPU: ONNX of any framework in, QDQ ONNX files out, run as integer kernels where quantized."""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.files.atomic import atomic_write
from slimline.graph.placement import Policy
from slimline.methods.formats import Format, IntegerGrid, Levels
from slimline.runtimes.base import ABILITIES, Runtime
from slimline.runtimes.chains import chain
from slimline.runtimes.forms import ONNX, Form
from slimline.runtimes.forms import onnx_formats as weights
from slimline.runtimes.onnx_session import OnnxSession
from slimline.runtimes.processor import saturates

if TYPE_CHECKING:
    import onnxruntime as ort

    from slimline.runtimes.base import Layer

Array = np.ndarray[Any, np.dtype[Any]]

_INTEGER = re.compile(r"^(QLinear|QGemm|QAttention|ConvInteger|MatMulInteger|DynamicQuantize(MatMul|LSTM)|MatMulNBits)")
_REAL = re.compile(r"^(MatMulIntegerToFloat|DynamicQuantize(MatMul|LSTM)|MatMulNBits)")
"""Integer operators whose results are real numbers."""
_CASTS = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
_MOVES = {
    "MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze",
    "Slice", "Split", "Identity", "Concat", "Clip",
}  # fmt: skip
_SIZES = {"Shape", "Constant", "ConstantOfShape", "Gather", "Cast", "Range", "ReorderInput", "ReorderOutput"}

_CPU = "CPUExecutionProvider"
_LEVELS = {
    "all": ("ORT_ENABLE_ALL", "as far as it can, layouts of memory included; the default"),
    "extended": ("ORT_ENABLE_EXTENDED", "by fusions of its providers, not in layout"),
    "basic": ("ORT_ENABLE_BASIC", "by what any provider can run"),
    "unoptimized": ("ORT_DISABLE_ALL", "not at all"),
}

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
    tables=True,
)


class OnnxRuntime(Runtime):
    """The target ``onnxruntime``."""

    name = "onnxruntime"
    extra = "torch"
    suffix = ".onnx"
    forms = (ONNX,)
    policy = POLICY
    packages = ("onnxruntime", "onnx", "onnx-ir", "onnxscript")
    abilities = frozenset(ABILITIES)
    description = "ONNX Runtime, CPU: uint8 activations, int8 weights per channel"
    dynamic = frozenset({"linear", "lstm", "embedding"})
    rounds_short = True

    writes = (
        "integer grids of 2 to 8 bits, symmetric for weights, with one scale per tensor or per position of an axis, "
        "and signs of activations"
    )
    short_weights = (
        "weights of 4 bits are stored so and turned to 8 when the file is loaded, for the INT8 kernels: the file is "
        "smaller, memory and time are those of INT8"
    )
    stores = f"{weights.STORES}, and any other levels"
    storage = (
        "linear layers compute from integer codes where groups have 16, 32, 64, 128 or 256 weights or are a channel, "
        "embeddings decode the rows that they look up in int8 tables; all other weights are turned to float32 when the "
        "file is loaded: it is smaller, memory and time are not"
    )

    def __init__(self, name: str = name, provider: str = "cpu", level: str = "all") -> None:
        self.name, self._provider, self._level = name, provider, level

    def can_store(self, each: Format) -> bool:
        """See `slimline.runtimes.forms.onnx_formats`."""
        return weights.can_store(each) or weights.tabled(each)

    def can_write(self, each: Format, stored: bool) -> bool:
        """Of fewer than 8 bits too: in bytes (weights of at most 4 in half of one) whose numbers are limited."""
        if isinstance(each, Levels) and each.is_sign and not stored:
            return True
        if isinstance(each, IntegerGrid) and each.bits < 8:
            each = dataclasses.replace(each, bits=8)
        return super().can_write(each, stored)

    def container(self, each: Format) -> int:
        """4 at least: ONNX Runtime and OpenVINO take nothing shorter from ONNX."""
        return weights.container(each)

    def rounds_inputs(self, each: Format) -> bool:
        """Its kernel for weights of few bits (MatMulNBits) computes on integers, at the accuracy level that it takes
        by itself."""
        return any(weights.is_fused(each, turned) for turned in (False, True))

    def settings(self) -> Mapping[str, Mapping[str, str]]:
        """Execution providers beside the CPU's, and how far graphs are optimised."""
        return {
            "provider": {word: f"computes with {name}" for word, name in _providers().items() if word != "cpu"},
            "graph": {word: f"optimises graphs {how}" for word, (_, how) in _LEVELS.items()},
        }

    def configured(self, name: str, chosen: Mapping[str, str]) -> OnnxRuntime:
        """With another provider, another level, or both."""
        return OnnxRuntime(name, chosen.get("provider", "cpu"), chosen.get("graph", "all"))

    def available(self) -> None:
        """None, as ONNX Runtime is always installed."""

    @property
    def weight_bits(self) -> int:
        """8; on x86 without VNNI 7, since kernels there add two products of uint8 and int8 in an int16, which overflows
        without a word (ONNX Runtime's documentation calls it reduced range)."""
        return 7 if saturates() else 8

    def files(self, path: Path) -> tuple[Path, ...]:
        """The graph, and the weights that others keep apart."""
        return path, path.with_name(f"{path.name}.data")

    def lower(self, form: Form, path: Path) -> None:
        """Write the ONNX file: rounding as QDQ in the layout that ONNX Runtime fuses into integer kernels, but linear
        layers over more than rows, for the CPU, as its own operator."""
        from slimline.runtimes.forms.onnx import rewrite, serialized

        own = self._provider == "cpu"  # where others compute, none of them has it
        atomic_write(path, serialized(form.content, lambda model: rewrite(model, form.weights, own)))

    def sample(self, layer: Layer, path: Path) -> None:
        """Write an ONNX file of layers such as `layer`, see `slimline.runtimes.base.Runtime`."""
        path.write_bytes(chain(layer))

    def load(self, path: Path, threads: int = 1) -> OnnxSession:
        """Load an ONNX file for `threads` threads."""
        return OnnxSession(self._session(path, self._options(threads)))

    def integer_layers(self, path: Path) -> Mapping[str, str]:
        """Every operator of the graph that ONNX Runtime made of the file: ``integer`` or ``float``.

        Named by layer as `lower` names nodes; conversions between float and integer and operators that only
        deal in sizes are left out. Read before the last optimisation level, which only changes memory layouts.
        """
        import onnx
        import onnxruntime

        with tempfile.TemporaryDirectory() as folder:
            options = self._options(1)
            if self._level == "all":
                options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
            options.optimized_model_filepath = str(Path(folder, "optimized.onnx"))
            self._session(path, options)
            graph = onnx.load(options.optimized_model_filepath).graph
        original = {node.name for node in onnx.load(str(path)).graph.node if node.name}
        bytes_ = (onnx.TensorProto.UINT8, onnx.TensorProto.INT8)
        integers = {tensor.name for tensor in graph.initializer if tensor.data_type in bytes_}
        layers: dict[str, str] = {}
        for node in graph.node:
            moved = node.op_type in _MOVES and node.input[0] in integers
            integer = moved or _INTEGER.match(node.op_type) is not None
            rounds = node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear")
            if rounds or (integer and not _REAL.match(node.op_type)):
                integers.update(node.output)
            if node.op_type not in _CASTS and node.op_type not in _SIZES:
                name = _origin(node.name, original) or node.op_type
                layers[name] = "integer" if integer else "float"
        return layers

    def input_specs(self, path: Path) -> list[tuple[str, tuple[int | None, ...], str]]:
        """Name, shape (None where any size goes) and numpy dtype of each input."""
        session = self._session(path, self._options(1))
        return [
            (i.name, tuple(d if isinstance(d, int) else None for d in i.shape), _dtype(i.type))
            for i in session.get_inputs()
        ]

    def profile(self, path: Path, inputs: tuple[Array, ...], threads: int = 1, runs: int = 30) -> dict[str, float]:
        """Median milliseconds of each operator that runs, by ``name (operator)``, over `runs` runs."""
        with tempfile.TemporaryDirectory() as folder:
            options = self._options(threads)
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder, "profile"))
            session = self._session(path, options)
            loaded = OnnxSession(session)
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

    def _options(self, threads: int) -> ort.SessionOptions:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, _LEVELS[self._level][0])
        options.log_severity_level = 3
        # Idle workers would otherwise spin on and take cores from whatever is measured next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        return options

    def _session(self, path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        if not path.is_file():
            raise SlimlineError(f"There is no file {path}: give the path of an ONNX file.")
        errors = (state.InvalidProtobuf, state.InvalidGraph, state.Fail, state.NotImplemented, state.InvalidArgument)
        provider = _providers()[self._provider]
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=list(dict.fromkeys((provider, _CPU))))
        except errors as error:
            reason = str(error).partition("\n")[0].rpartition(" : ")[2][:200]
            raise SlimlineError(f"ONNX Runtime cannot load {path} ({reason}): give a valid ONNX file.") from error
        if provider not in session.get_providers():  # it falls back to the CPU with no more than a warning
            raise SlimlineError(f"ONNX Runtime cannot start {provider}: install what it needs, or leave it out.")
        return session


def _providers() -> dict[str, str]:
    """By the words of `OnnxRuntime.settings`, the execution providers of the installed ONNX Runtime; but Azure's, which
    would send data away."""
    import onnxruntime

    every = {name.removesuffix("ExecutionProvider").lower(): name for name in onnxruntime.get_available_providers()}
    return {word: name for word, name in every.items() if word != "azure"}


def _blocked_names(path: Path) -> dict[str, str]:
    """The layers behind the names ``VALUE_nchwc`` that ONNX Runtime gives convolutions in its blocked layout.

    VALUE is the output of the last operator that was fused into the convolution.
    """
    import onnx

    nodes = onnx.load(str(path), load_external_data=False).graph.node
    makers = {output: node for node in nodes for output in node.output}
    layers = {}
    for value in makers:
        node = makers[value]
        while node.op_type in ("Relu", "Clip", "Add", "Sigmoid", "HardSigmoid") and node.input[0] in makers:
            node = makers[node.input[0]]
        layers[f"{value}_nchwc"] = node.name
    return layers


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
