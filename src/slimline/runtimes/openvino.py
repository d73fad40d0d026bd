"""OpenVINO on the CPU: ONNX in, intermediate representation (``.xml`` and ``.bin``) out, integer where quantized.

Rounding of activations becomes OpenVINO's own FakeQuantize, weights are stored as int8. The CPU plugin then decides
what runs in integers; `OpenVino.integer_layers` asks it. The rest is computed in float32: by itself OpenVINO takes
bfloat16 on processors that have it.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from slimline.basics.errors import SlimlineError, require
from slimline.basics.quiet import quiet
from slimline.files.atomic import atomic_write
from slimline.graph.placement import Policy
from slimline.methods.formats import BlockFloat, FloatFormat, Format, IntegerGrid
from slimline.runtimes.base import ABILITIES, Runtime, conform
from slimline.runtimes.chains import chain
from slimline.runtimes.forms import ONNX, Form
from slimline.runtimes.forms import onnx_formats as weights
from slimline.runtimes.processor import saturates

if TYPE_CHECKING:
    import onnx_ir as ir

    from slimline.runtimes.base import Layer

Array = np.ndarray[Any, np.dtype[Any]]

_BIASED = "/WithoutBiases"
"""What OpenVINO puts behind the name of a layer for the part of it that adds no bias yet."""
_PRECISIONS = {"u8": "integer", "i8": "integer", "f32": "float", "f16": "float", "bf16": "float"}
_STORED = ("u8", "i8", "u4", "i4", "f8e4m3", "f8e5m2")
_PRODUCTS = {
    "Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData", "MatMul",
}  # fmt: skip
_BOUNDARY = {"Input", "Output", "Const", "Reorder", "Convert", "FakeQuantize"}
_MOVES = {"Reshape", "ShapeOf", "Broadcast", "Transpose", "Split", "StridedSlice", "Concatenation", "Gather"}

# Computed in float within the integer kernel: rounding before them as well costs time and accuracy.
_FUSED = frozenset(
    {
        "relu", "relu6", "clip", "hardtanh", "leaky_relu", "elu", "silu", "hardswish", "hard_silu", "gelu", "mish",
        "sigmoid", "hardsigmoid", "hard_sigmoid", "tanh",
    }
)  # fmt: skip

POLICY = Policy(
    activations="uint8",
    fused=_FUSED,
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
    attention=frozenset({0, 1}),
)


class Session:
    """An intermediate representation that OpenVINO compiled, for one caller at a time.

    Parameters
    ----------
    name : of the file.
    compiled : network.
    streams : parts into which rows are split and that are computed side by side, where any number of rows goes.
    """

    def __init__(self, name: str, compiled: Any, streams: int = 1) -> None:
        self.name, self.specs = name, _specs(compiled)
        self.count = len(compiled.outputs)
        names = [min(output.get_names(), default="") for output in compiled.outputs]
        self.output_names = names if all(names) else []
        ends = [value.get_partial_shape() for value in (*compiled.inputs, *compiled.outputs)]
        free = all(len(shape) and shape[0].is_dynamic for shape in ends)
        self.requests = [compiled.create_infer_request() for _ in range(streams if free else 1)]

    def run(self, inputs: tuple[Array, ...]) -> Array:
        """The first output ``(batch, …)`` for inputs ``(batch, …)`` of any batch size."""
        return self.outputs(inputs)[0]

    def outputs(self, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        """All outputs for `inputs`."""
        # OpenVINO itself takes arrays of wrong shapes without a word where any size of theirs is free.
        arrays = conform(self.name, self.specs, inputs)
        if len(self.requests) > 1 and len({len(x) for x in arrays}) == 1 and len(arrays[0]) >= len(self.requests):
            return self._side_by_side(arrays)
        answer = self.requests[0].infer(arrays, share_inputs=True)
        return tuple(answer[i] for i in range(self.count))

    def _side_by_side(self, arrays: list[Array]) -> tuple[Array, ...]:
        parts = list(zip(*(np.array_split(x, len(self.requests)) for x in arrays), strict=True))
        for request, part in zip(self.requests, parts, strict=True):
            request.start_async(list(part), share_inputs=True)
        for request in self.requests:
            request.wait()
        return tuple(
            np.concatenate([request.get_output_tensor(i).data for request in self.requests]) for i in range(self.count)
        )


class OpenVino(Runtime):
    """The target ``openvino``."""

    name = "openvino"
    extra = "openvino"
    suffix = ".xml"
    forms = (ONNX,)
    policy = POLICY
    abilities = frozenset(ABILITIES)
    packages = ("openvino", "onnx", "onnx-ir", "onnxscript")
    description = "OpenVINO, CPU: uint8 activations, int8 weights per channel"

    def __init__(self, name: str = name, device: str = "cpu", hint: str = "latency") -> None:
        self.name, self._device, self._hint = name, device, hint

    stores = weights.STORES
    storage = "layers compute in float from weights that are kept as codes, or turned to float32 when it loads the file"

    # Its plugin takes no grids of run time from a file, and multiplies ONNX's DynamicQuantizeLinear in float.
    dynamic_instead = (
        "it finds them by itself for weights that are stored in int8 or int4: use WeightQuantization for it"
    )

    def can_store(self, each: Format) -> bool:
        """See `slimline.runtimes.forms.onnx_formats`."""
        return weights.can_store(each)

    def container(self, each: Format) -> int:
        """4 at least: ONNX Runtime and OpenVINO take nothing shorter from ONNX."""
        return weights.container(each)

    def rounds_inputs(self, each: Format) -> bool:
        """It may round rows on the way into a layer with integer weights (its dynamic quantization)."""
        return isinstance(each, IntegerGrid)

    def settings(self) -> Mapping[str, Mapping[str, str]]:
        """Devices beside the CPU, and what is to be fast."""
        devices = _core().available_devices if self.available() is None else []
        return {
            "device": {each.lower(): f"computes on {each}" for each in devices if each != "CPU"},
            "hint": {
                "latency": "all threads work on one batch; the default",
                "throughput": "a batch is split among threads that work side by side",
            },
        }

    def configured(self, name: str, chosen: Mapping[str, str]) -> OpenVino:
        """On another device, with another hint, or both."""
        return OpenVino(name, chosen.get("device", "cpu"), chosen.get("hint", "latency"))

    def available(self) -> str | None:
        """None if OpenVINO is installed, else the sentence with the pip command."""
        return None if find_spec("openvino") else "openvino is not installed: run pip install 'slimline[openvino]'."

    @property
    def weight_bits(self) -> int:
        """8; on x86 without VNNI 7, since kernels there add two products of uint8 and int8 in an int16: with 8 bits
        sums came out a quarter too small, with 7 exact."""
        return 7 if saturates() else 8

    def files(self, path: Path) -> tuple[Path, ...]:
        """The graph and the weights."""
        return path, path.with_suffix(".bin")

    def lower(self, form: Form, path: Path) -> None:
        """Write ``.xml`` and ``.bin``: int8 weights, and FakeQuantize where activations are rounded.

        Raises
        ------
        SlimlineError : an operator that OpenVINO has not.
        """
        from slimline.runtimes.forms.onnx import serialized, store_weights

        content = serialized(form.content, lambda model: store_weights(model, form.weights))
        # What it leaves out first of all are conversions of short floats, which it does once when it loads the file.
        short = any(
            isinstance(each, BlockFloat) or (isinstance(each, FloatFormat) and each.is_plain)
            for each in form.weights.values()
        )
        network = _converted(content, reduced=not short)
        _round_scaled(network)
        _write(network, _names(form.content), path)

    def sample(self, layer: Layer, path: Path) -> None:
        """Write layers such as `layer`, see `slimline.runtimes.base.Runtime`."""
        _write(_converted(chain(layer)), {}, path)

    def load(self, path: Path, threads: int = 1) -> Session:
        """Load a ``.xml`` file and the ``.bin`` beside it, for `threads` threads."""
        return Session(path.name, self._compiled(path, threads), threads if self._hint == "throughput" else 1)

    def integer_layers(self, path: Path) -> Mapping[str, str]:
        """Every operator that the CPU plugin made of the file, by layer: ``integer`` or ``float``.

        Conversions, operators that only move numbers and arithmetic on sizes are left out.
        """
        layers: dict[str, str] = {}
        # Where no activation is rounded, the plugin names the type in which weights are stored.
        rounded = any(operator.get_type_name() == "FakeQuantize" for operator in _read(path).get_ops())
        precisions = _PRECISIONS if rounded else _PRECISIONS | dict.fromkeys(_STORED, "float")
        for operator in _executed(path, self._compiled(path, 1)):
            if operator.kind not in _BOUNDARY | _MOVES and operator.precision in precisions:
                layers[_unique(operator.label, layers)] = precisions[operator.precision]
        return layers

    def profile(self, path: Path, inputs: tuple[Array, ...], threads: int = 1, runs: int = 30) -> dict[str, float]:
        """Median milliseconds of each operator that runs, by ``name (operator)``, over `runs` runs."""
        compiled = self._compiled(path, threads, PERF_COUNT=True)
        session = Session(path.name, compiled)
        labels = {operator.name: operator.label for operator in _executed(path, compiled)}
        times: dict[str, list[float]] = {}
        for _ in range(runs):
            session.run(inputs)
            for event in session.requests[0].profiling_info:
                if event.status.name == "EXECUTED":
                    label = f"{labels.get(event.node_name, event.node_name)} ({event.node_type})"
                    times.setdefault(label, []).append(event.real_time.total_seconds() * 1000)
        return {label: float(np.median(durations)) for label, durations in times.items()}

    def input_specs(self, path: Path) -> list[tuple[str, tuple[int | None, ...], str]]:
        """Name, shape (None where any size goes) and dtype of each input."""
        return _specs(_read(path))

    def _compiled(self, path: Path, threads: int, **settings: Any) -> Any:
        """A file compiled for `threads` threads of the CPU, or for another device."""
        network = _read(path)
        settings |= {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": self._hint.upper()}
        if self._device == "cpu":
            settings |= {
                "NUM_STREAMS": threads if self._hint == "throughput" else 1,
                "INFERENCE_NUM_THREADS": threads,
                "ENABLE_CPU_PINNING": False,  # processes measured side by side would be pinned to the same core
            }
        try:
            return _core().compile_model(network, self._device.upper(), settings)
        except RuntimeError as error:
            raise SlimlineError(f"OpenVINO cannot run {path} on {self._device.upper()} ({_reason(error)}).") from error


runtime = OpenVino()


@cache
def _core() -> Any:
    """What reads and compiles networks; it knows slimline's rounding."""
    # OpenVINO tells its makers of every import of it; without this package it does not.
    reporter = "openvino_telemetry"
    silenced = "openvino" not in sys.modules and reporter not in sys.modules
    if silenced:
        sys.modules[reporter] = None  # type: ignore[assignment]
    try:
        openvino = require("openvino", "openvino")
    finally:
        if silenced:
            del sys.modules[reporter]
    from openvino.frontend.onnx import ConversionExtension

    from slimline.runtimes.forms.onnx_graph import DOMAIN, FAKE_QUANTIZE

    core = openvino.Core()
    core.add_extension(ConversionExtension(FAKE_QUANTIZE, DOMAIN, _fake_quantize))
    return core


def _fake_quantize(node: Any) -> Any:
    """OpenVINO's FakeQuantize for slimline's, of an activation."""
    from openvino import opset13

    scale, zero, low, high = (node.get_attribute(name) for name in ("scale", "zero_point", "low", "high"))
    ends = [opset13.constant(np.float32((level - zero) * scale)) for level in (low, high)]
    return opset13.fake_quantize(node.get_input(0), *ends, *ends, levels=high - low + 1).outputs()


def _converted(content: bytes, reduced: bool = True) -> Any:
    """The network of an ONNX file; `reduced`, without what its plugins would leave out first of all."""
    core = _core()
    from openvino._offline_transformations import apply_moc_transformations

    try:
        with quiet():
            network = core.read_model(content)
            if reduced:
                apply_moc_transformations(network, cf=False)
    except RuntimeError as error:
        raise SlimlineError(
            f"OpenVINO cannot read the model ({_reason(error)}): express that part of it by common operators."
        ) from error
    return network


def _round_scaled(network: Any) -> None:
    """Round operands of attention behind the number they are multiplied by, not before: the same levels.

    The plugin computes the product of queries and keys in integers where nothing lies between it and the rounding but
    what moves numbers.
    """
    from openvino import opset13

    for operator in network.get_ordered_ops():
        if operator.get_type_name() != "FakeQuantize":
            continue
        ends = [end for i in range(1, 5) if (end := _number(operator.input_value(i))) is not None]
        last, factor = _scaled(operator)
        readers = list(last.output(0).get_target_inputs())
        kinds = {reader.get_node().get_type_name() for reader in readers}
        if len(ends) < 4 or factor <= 0 or factor == 1 or not kinds <= {"ScaledDotProductAttention", "MatMul"}:
            continue
        for reader in operator.output(0).get_target_inputs():
            reader.replace_source_output(operator.input_value(0))
        scaled = [opset13.constant(np.float32(end * factor)) for end in ends]
        rounded = opset13.fake_quantize(last.output(0), *scaled, levels=operator.get_attributes()["levels"])
        rounded.set_friendly_name(operator.get_friendly_name())
        for reader in readers:
            reader.replace_source_output(rounded.output(0))
    network.validate_nodes_and_infer_types()


def _scaled(operator: Any) -> tuple[Any, float]:
    """The last of those behind `operator`, one after another, that move numbers or multiply all by the same one; and
    the product of these."""
    factor = 1.0
    while len(readers := operator.output(0).get_target_inputs()) == 1:
        (reader,) = readers
        after, position = reader.get_node(), reader.get_index()
        if after.get_type_name() == "Multiply" and (number := _number(after.input_value(1 - position))) is not None:
            factor *= number
        elif after.get_type_name() not in ("Reshape", "Transpose") or position != 0:
            break
        operator = after
    return operator, factor


def _number(value: Any) -> float | None:
    """What is stored, where it is a single number."""
    node = value.get_node()
    stored = node.get_type_name() == "Constant" and node.get_data().size == 1
    return float(node.get_data().ravel()[0]) if stored else None


def _names(model: ir.Model) -> dict[str, str]:
    """The names of operators, by themselves and by the outputs of the model that they give."""
    graph = model.graph
    own = {str(node.name): str(node.name) for node in graph}
    producers = {str(v.name): str(node.name) for v in graph.outputs if (node := v.producer()) is not None}
    return {**own, **producers}


def _write(network: Any, names: Mapping[str, str], path: Path) -> None:
    """Put ``.xml`` and ``.bin`` in their places, the same bytes each time."""
    from openvino import save_model

    _rename(network, names)
    network.set_friendly_name("g")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        graph = Path(folder, "model.xml")
        save_model(network, graph, compress_to_fp16=False)
        atomic_write(path.with_suffix(".bin"), graph.with_suffix(".bin").read_bytes())
        atomic_write(path, re.sub(rb">\s+<", b"><", graph.read_bytes()))  # a quarter is indentation


def _rename(network: Any, names: Mapping[str, str]) -> None:
    """Call operators as `names` says, and a sum with a bias as the layer whose product it takes.

    OpenVINO numbers by a counter of the process what has no name in the ONNX file, calls what gives an output after
    that output, and forgets the name of a product once it has a bias.
    """
    called: dict[str, str] = {}
    for number, operator in enumerate(network.get_ordered_ops()):
        kind, name = operator.get_type_name(), operator.get_friendly_name()
        if kind in ("Parameter", "Result"):
            continue
        known = names.get(name) or names.get(name.removesuffix(_BIASED))
        if name in called:
            known = called[name]
        elif kind in _PRODUCTS and (bias := _bias(operator)) is not None:
            known = known or names.get(bias.get_friendly_name())
            if known:
                called[bias.get_friendly_name()], known = known, known + _BIASED
        operator.set_friendly_name(known or f"#{number}")


def _bias(product: Any) -> Any | None:
    """The sum with a stored tensor that alone reads a product."""
    readers = [reader.get_node() for reader in product.output(0).get_target_inputs()]
    if len(readers) != 1 or readers[0].get_type_name() != "Add":
        return None
    stored = any(value.get_node().get_type_name() == "Constant" for value in readers[0].input_values())
    return readers[0] if stored else None


def _read(path: Path) -> Any:
    """The network in a file and the weights beside it."""
    weights = path.with_suffix(".bin")
    try:
        with path.open("rb") as file:
            head = file.read(256)
    except OSError as error:
        raise SlimlineError(f"{path} cannot be read: {error.strerror}.") from error
    if b"<net" not in head:  # OpenVINO would try one format after the other, and say so at length
        raise SlimlineError(f"{path} is no OpenVINO model: give a .xml file, such as slimline.export writes.")
    if not weights.is_file():
        raise SlimlineError(f"{path} lacks its weights: put {weights.name}, which was written with it, beside it.")
    try:
        return _core().read_model(path)
    except RuntimeError as error:
        raise SlimlineError(f"{path} is a damaged OpenVINO model: export it again ({_reason(error)}).") from error


class _Operator(NamedTuple):
    """What the CPU plugin executes: under which name, called after which layer, of which kind, on which type."""

    name: str
    label: str
    kind: str
    precision: str


def _executed(path: Path, compiled: Any) -> Iterator[_Operator]:
    """The operators of the plugin's own graph; one that several were fused into is called after the first of them, one
    without a layer after what it does."""
    names = [operator.get_friendly_name() for operator in _read(path).get_ops()]
    known = {name.partition(_BIASED)[0] for name in names if not name.startswith("#")}
    for operator in compiled.get_runtime_model().get_ops():
        facts = operator.get_rt_info()
        kind, precision, fused = (
            str(facts[key].astype(str)) if key in facts else ""
            for key in ("layerType", "runtimePrecision", "originalLayersNames")
        )
        name = operator.get_friendly_name()
        layers = [each.partition(_BIASED)[0] for each in (*fused.split(","), name)]
        yield _Operator(name, next((layer for layer in layers if layer in known), kind), kind, precision)


def _unique(name: str, taken: Collection[str]) -> str:
    """`name`, or with the first number behind it that is free."""
    unique, count = name, 1
    while unique in taken:
        count += 1
        unique = f"{name}_{count}"
    return unique


def _specs(network: Any) -> list[tuple[str, tuple[int | None, ...], str]]:
    """Of the inputs of a network or of what it was compiled to."""
    return [
        (
            each.get_any_name(),
            tuple(None if size.is_dynamic else size.get_length() for size in each.get_partial_shape()),
            np.dtype(each.get_element_type().to_dtype()).name,
        )
        for each in network.inputs
    ]


def _reason(error: BaseException) -> str:
    """What OpenVINO lacks, or the last line of what it says: those before it are places in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line.removeprefix("-- ") for line in lines if line.startswith("-- ")][:1] or lines
    return " ".join(lines[-1].split())[:200].rstrip(".:! ") if lines else type(error).__name__
