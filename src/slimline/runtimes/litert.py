"""The LiteRT target: ``.tflite`` files, run by XNNPACK on the CPU.

The artifact takes and gives float32 (or the model's own integer inputs). Where it is quantized, the first and
last operator round and unround inside the delegate: at batch 32 of 28 × 28 images that costs 0.1 ms of 13,
what rounding in numpy costs, so an integer interface would gain nothing and bind every caller to the grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from slimline.basics.errors import SlimlineError, require
from slimline.basics.quiet import quiet
from slimline.files.atomic import atomic_write
from slimline.graph.placement import Policy
from slimline.methods.formats import FloatFormat, Format, IntegerGrid, Levels
from slimline.runtimes.base import ABILITIES, Runtime, conform
from slimline.runtimes.forms import ONNX, TENSORFLOW_FUNCTION, Form
from slimline.runtimes.forms.tensorflow import tensorflow

if TYPE_CHECKING:
    from slimline.runtimes.base import Layer
    from slimline.runtimes.forms.tensorflow import Function

_INTERPRETERS = 4
"""Batch sizes for which a session keeps an interpreter."""
_BOUNDARY = frozenset({"QUANTIZE", "DEQUANTIZE", "DELEGATE"})
_PRODUCTS = frozenset({"CONV_2D", "CONV_3D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "FULLY_CONNECTED", "BATCH_MATMUL"})
_ROUNDING = frozenset({"FULLY_CONNECTED", "CONV_2D"})
_NUMBERS = (np.float32, np.float16, np.int8, np.uint8, np.int16)


_LITERT_FUNCTIONS = (
    "add", "sub", "mul", "max", "min", "relu", "relu6", "leaky_relu", "prelu",
    "sigmoid", "tanh", "gelu", "silu", "hard_sigmoid", "hard_silu",
)  # fmt: skip

POLICY = Policy(
    activations="int8",
    fused=frozenset({"relu", "relu6"}),
    glue=frozenset(
        {
            *(f"elementwise:{name}" for name in _LITERT_FUNCTIONS),
            "concat",
            "pool:mean",
            "pool:resize",
            "reduce:mean",
            "reduce:sum",
            "softmax",
            "matmul",
            "batch_norm",
        }
    ),
    transposed=True,
    float_results=frozenset(),
    linear_channels=True,
    constants=frozenset({"batch_norm", "elementwise:prelu"}),
    ranges={"sigmoid": (0.0, 255 / 256), "softmax": (0.0, 255 / 256), "tanh": (-1.0, 127 / 128)},
    transposed_channels=False,
    whole=True,
    one_grid=frozenset({"concat", "pool:mean", "pool:resize"}),
    spatial=2,
    composed=frozenset({"batch_norm", "hard_sigmoid", "hard_silu", "silu"}),
    stacked_channels=False,
)

WIDE = replace(
    POLICY,
    activations="int16",
    # Of others the converter makes no operators with 16 bits, though the kernels of some are there.
    glue=frozenset(
        {
            *(f"elementwise:{name}" for name in ("add", "sub", "mul", "max", "min", "relu", "leaky_relu")),
            "pool:mean",
            "pool:resize",
            "reduce:mean",
            "reduce:sum",
            "matmul",
        }
    ),
    constants=frozenset(),
    ranges={},
    symmetric=True,
    composed=frozenset(),
    form=ONNX,
)
"""Activations of 16 bits without zero points beside weights of 8 bits."""


class Session:
    """A ``.tflite`` file loaded by LiteRT, for one caller at a time.

    Parameters
    ----------
    path : of the file.
    threads : of the CPU kernels.
    reference : run the plain reference kernels instead of XNNPACK; slow, for checks.
    """

    def __init__(self, path: Path, threads: int = 1, reference: bool = False) -> None:
        self._path, self._threads, self._reference = path, threads, reference
        self._interpreters: dict[tuple[tuple[int, ...], ...], Any] = {}
        self._specs = input_specs(path)

    def run(self, inputs: tuple[np.ndarray, ...]) -> np.ndarray:
        """The first of `outputs`."""
        return self.outputs(inputs)[0]

    @property
    def output_names(self) -> list[str]:
        """Of `outputs`, where the file names them all."""
        interpreter = _interpreter(self._path)
        signatures = list(interpreter._get_full_signature_list().values())
        names = {index: name for name, index in signatures[0]["outputs"].items()} if len(signatures) == 1 else {}
        return [names[d["index"]] for d in interpreter.get_output_details() if d["index"] in names]

    def outputs(self, inputs: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        """All outputs ``(batch, …)`` for inputs ``(batch, …)`` of any batch size."""
        arrays = conform(self._path.name, self._specs, inputs)
        interpreter = self._interpreter(tuple(a.shape for a in arrays))
        for detail, array in zip(interpreter.get_input_details(), arrays, strict=True):
            interpreter.set_tensor(detail["index"], array)
        interpreter.invoke()
        return tuple(interpreter.get_tensor(detail["index"]) for detail in interpreter.get_output_details())

    def _interpreter(self, shapes: tuple[tuple[int, ...], ...]) -> Any:
        """An interpreter for these shapes; the oldest goes when there are too many."""
        if shapes not in self._interpreters:
            while len(self._interpreters) >= _INTERPRETERS:
                del self._interpreters[next(iter(self._interpreters))]
            interpreter = _interpreter(self._path, self._threads, self._reference)
            with quiet(), _reading(self._path):
                for detail, shape in zip(interpreter.get_input_details(), shapes, strict=True):
                    interpreter.resize_tensor_input(detail["index"], shape)
                interpreter.allocate_tensors()
            self._interpreters[shapes] = interpreter
        return self._interpreters[shapes]


class LiteRT(Runtime):
    """The target ``litert``, see `slimline.runtimes.base.Runtime`."""

    name = "litert"
    extra = "litert"
    suffix = ".tflite"
    forms = (TENSORFLOW_FUNCTION,)
    policy = POLICY
    policies = MappingProxyType({WIDE.activations: WIDE})
    writes = f"{Runtime.writes}, activations of 16 bits without zero points, and signs of activations"
    packages = ("ai-edge-litert", "tensorflow", "tensorflow-cpu", "keras")
    abilities = frozenset(ABILITIES) - {"profile"}
    precisions = ("float32", "int8", "int16 activations with int8 weights")
    description = "LiteRT (TensorFlow Lite) on the CPU with XNNPACK; float or full integer"
    dynamic = frozenset({"linear", "conv", "embedding"})
    dynamic_grid = "int8_per_row"
    short_group = None
    short_multiple = 2  # XNNPACK leaves others to a kernel that rounds otherwise
    marked_weights = False

    def available(self) -> str | None:
        """None, or the pip command that is needed."""
        try:
            require("ai_edge_litert", self.extra)
        except SlimlineError as error:
            return str(error)
        return None

    def can_write(self, each: Format, stored: bool) -> bool:
        """Of activations 16 bits too, around zero, and signs."""
        if isinstance(each, Levels) and each.is_sign and not stored:
            return True
        if isinstance(each, IntegerGrid) and each.bits == 16:
            return each.signed and each.per_tensor and not stored and not np.any(each.zero)
        return super().can_write(each, stored)

    stores = (
        "float16, and symmetric integers of 8 bits with one scale per output (4 bits are slower there than float32, "
        "blocks are left in float32)"
    )
    storage = "weights are turned to float32 when it loads the file: it is smaller, memory and time are not"

    def can_store(self, each: Format) -> bool:
        """What its DEQUANTIZE turns to float32, once."""
        if isinstance(each, FloatFormat):
            return each.is_plain and each.dtype == "float16"
        return _symmetric(each) and each.stored_bits == 8

    def can_multiply(self, each: Format) -> bool:
        """Symmetric integers of 4 or 8 bits with one scale per output."""
        return _symmetric(each) and each.stored_bits in (4, 8)

    @property
    def weight_bits(self) -> int:
        """8: XNNPACK's kernels widen before they add."""
        return 8

    def lower(self, form: Form, path: Path) -> None:
        """Write the file to `path`; atomic, and the same bytes each time.

        Raises
        ------
        SlimlineError : an operator that LiteRT has not.
        """
        require("ai_edge_litert", self.extra)
        require("flatbuffers", self.extra)
        from slimline.runtimes.forms.flatbuffer import compact

        function = form.content
        names = function.inputs, function.layers, function.outputs
        atomic_write(path, compact(_convert(function, form.integer), *names, form.weights, form.tensors, form.dynamic))

    def sample(self, layer: Layer, path: Path) -> None:
        """Write a ``.tflite`` file of layers such as `layer`, see `slimline.runtimes.base.Runtime`."""
        tf = tensorflow()
        rng = np.random.default_rng(0)
        weights = [_kernel(layer, *ends, rng) for ends in layer.chain[:2]] * (len(layer.chain) // 2)

        def run(x: Any) -> Any:
            for w in weights:
                if layer.depthwise:  # of one dimension or two
                    flat = len(layer.kernel) == 1
                    x = tf.expand_dims(x, 1) if flat else x
                    dilation = (1, *layer.dilation)[-2:]
                    x = tf.nn.depthwise_conv2d(x, w, [1] * 4, "SAME", dilations=dilation)
                    x = tf.squeeze(x, 1) if flat else x
                elif layer.kernel:
                    x = tf.nn.convolution(x, w, padding="SAME", dilations=layer.dilation)
                else:
                    x = tf.matmul(x, w)
            return x

        size = (None, *layer.places, layer.inputs) if layer.kernel else (None, layer.inputs)
        traced = tf.function(run).get_concrete_function(tf.TensorSpec(size))
        with quiet():
            data = tf.lite.TFLiteConverter.from_concrete_functions([traced]).convert()
        atomic_write(path, bytes(data))

    def load(self, path: Path, threads: int = 1) -> Session:
        """Load a ``.tflite`` file."""
        return Session(Path(path), threads)

    def integer_layers(self, path: Path) -> Mapping[str, str]:
        """Operators in the order in which they run, ``layer`` or ``layer (OPERATOR)`` where it has several, the first
        for what has its weight, to ``"integer"`` or ``"float"``; rounding itself and arithmetic on sizes are left
        out."""
        with _reading(Path(path)):
            interpreter = _allocated(Path(path))
            details = {t["index"]: t for t in interpreter.get_tensor_details()}
            operators = interpreter._get_ops_details()
        running = [
            (operator, details[operator["outputs"][0]]["name"] or operator["op_name"])
            for operator in operators
            # without rounding itself, and arithmetic on sizes
            if operator["op_name"] not in _BOUNDARY and details[operator["outputs"][0]]["dtype"] in _NUMBERS
        ]
        products = {name for operator, name in running if operator["op_name"] in _PRODUCTS}
        precisions: dict[str, str] = {}
        for operator, name in running:
            tensors = [details[i] for i in (*operator["inputs"], *operator["outputs"]) if i in details]
            floating = any(np.issubdtype(t["dtype"], np.floating) for t in tensors) and not _rounds(operator, details)
            if name in precisions or (name in products and operator["op_name"] not in _PRODUCTS):
                name = f"{name} ({operator['op_name']})"
            label, count = name, 1
            while label in precisions:
                label, count = f"{name} {count}", count + 1
            precisions[label] = "float" if floating else "integer"
        return precisions

    def profile(
        self, path: Path, inputs: tuple[np.ndarray, ...], threads: int = 1, runs: int = 30
    ) -> Mapping[str, float]:
        """Empty: the Python interpreter does not tell what an operator takes."""
        return {}

    def input_specs(self, path: Path) -> list[tuple[str, tuple[int | None, ...], str]]:
        """Name, shape (None where any size goes) and dtype of each input."""
        return input_specs(Path(path))


runtime = LiteRT()


def input_specs(path: Path) -> list[tuple[str, tuple[int | None, ...], str]]:
    """Name, shape (None where any size goes) and dtype of each input of a ``.tflite`` file."""
    specs = []
    with _reading(path):
        details = _interpreter(path).get_input_details()
    for detail in details:
        shape = tuple(None if size < 0 else int(size) for size in detail["shape_signature"])
        specs.append((str(detail["name"]), shape, np.dtype(detail["dtype"]).name))
    return specs


def _interpreter(path: Path, threads: int = 1, reference: bool = False) -> Any:
    require("ai_edge_litert", "litert")
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise SlimlineError(f"{path} cannot be read: {error.strerror}.") from error
    if head[4:] != b"TFL3":
        raise SlimlineError(f"{path} is no LiteRT model: give a .tflite file, such as slimline.export writes.")
    resolver = OpResolverType.BUILTIN_REF if reference else OpResolverType.AUTO
    try:
        with quiet():
            return Interpreter(str(path), num_threads=threads, experimental_op_resolver_type=resolver)
    except (ValueError, RuntimeError) as error:
        raise SlimlineError(f"{path} is a damaged LiteRT model: export it again ({_first_line(error)}).") from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say of a file that LiteRT opens, and only then finds damaged, that it is."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise SlimlineError(f"LiteRT cannot run {path}: export the model again ({_first_line(error)}).") from error


def _allocated(path: Path) -> Any:
    interpreter = _interpreter(path)
    with quiet():
        interpreter.allocate_tensors()
    return interpreter


def _convert(function: Function, integer: bool) -> bytes:
    """The converter's file."""
    tf = tensorflow()
    try:
        with quiet():
            converter = tf.lite.TFLiteConverter.from_concrete_functions([function.concrete])
            if integer:
                converter.optimizations = [tf.lite.Optimize.DEFAULT]
            return bytes(converter.convert())
    except Exception as error:  # the converter raises its own, private classes
        raise SlimlineError(f"LiteRT's converter refuses the model: {_first_line(error)}.") from error


def _symmetric(each: Format) -> bool:
    """Whether a format is of signed integers around zero, with one scale per output."""
    if not isinstance(each, IntegerGrid) or not each.signed or each.zero_point is not None:
        return False
    return bool(each.blocks) and set(each.blocks) <= {1, None}


def _rounds(operator: Mapping[str, Any], details: Mapping[int, Any]) -> bool:
    """Whether an operator multiplies integers by floats, which it rounds by itself."""
    weight = details.get(operator["inputs"][1]) if operator["op_name"] in _ROUNDING else None
    return weight is not None and np.issubdtype(weight["dtype"], np.integer)


def _kernel(layer: Layer, inputs: int, outputs: int, rng: np.random.Generator) -> np.ndarray:
    """Some weight in TensorFlow's layout."""
    if layer.depthwise:
        return rng.normal(size=(*(1, *layer.kernel)[-2:], inputs, 1)).astype(np.float32)
    return rng.normal(size=(*layer.kernel, inputs, outputs)).astype(np.float32)


def _first_line(error: BaseException) -> str:
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__)
