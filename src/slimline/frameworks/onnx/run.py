"""ONNX Runtime as what computes the native model: on the CPU, with one thread, the same numbers each time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir

from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import Array
from slimline.frameworks.onnx.operators import SIZES
from slimline.graph.ir import Value

if TYPE_CHECKING:
    import onnxruntime as ort

LARGEST = 2**31 - 2**24
"""Bytes of a protobuf message, and some to spare for what is added to run a part of it."""
APART = 2**10
"""Bytes from which on a weight is handed to ONNX Runtime where it lies, and not as part of a message."""
_SEQUENCES = frozenset({"SequenceConstruct", "SequenceEmpty", "SequenceInsert", "SequenceErase", "SplitToSequence",
                        "SequenceMap", "Optional"})  # fmt: skip
_REAL = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16})
"""Types of weights that ONNX Runtime takes as numpy arrays. Integers, by which shapes are told, stay in messages."""
_NUMPY = {"float": "float32", "double": "float64", "float8e4m3fn": "float8_e4m3fn"}
_ROUNDING = "QuantizeLinear"
_DROPS_RELUS = "ReluQuantRewrite"
"""What takes out a Relu before a QuantizeLinear to floats of 8 bits, as if zero were the lowest of them."""


@dataclass(frozen=True)
class Part:
    """A model, or a part of it, whose message says of its `weights`, those of `APART` bytes and more, only that there
    are such: a session reads them where they lie, so that many sessions of many copies hold them once."""

    proto: onnx.ModelProto
    weights: Mapping[str, Array]


class Session:
    """A model, or a part of it, loaded by ONNX Runtime.

    Parameters
    ----------
    model : a message with all of its weights, or a part.
    optimized : whether ONNX Runtime may change the graph.
    patience : seconds that a call may take; None for any time.
    """

    def __init__(self, model: onnx.ModelProto | Part, optimized: bool = True, patience: float | None = None) -> None:
        import onnxruntime

        held = model if isinstance(model, Part) else Part(model, {})
        self._weights = held.weights  # ONNX Runtime has no copy of them
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        options.use_deterministic_compute = True
        # The rounding of a quantized model is simulated: integer kernels are the artifact's.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        if not optimized:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            # Sizes are read as soon as they can be, after which what they are of need not stay in memory.
            options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        try:
            values = [onnxruntime.OrtValue.ortvalue_from_numpy(x) for x in self._weights.values()]
            options.add_external_initializers(list(self._weights), values)
            content = held.proto.SerializeToString()
            self._session: ort.InferenceSession = onnxruntime.InferenceSession(
                content, options, providers=["CPUExecutionProvider"], disabled_optimizers=[_DROPS_RELUS]
            )
        except Exception as reason:  # ONNX Runtime raises classes of its own, and protobuf others
            raise SlimlineError(
                f"ONNX Runtime cannot load the model ({reason_of(reason)}): export it anew."
            ) from reason
        self._patience = patience
        self.inputs = [i.name for i in self._session.get_inputs()]
        self.types = {o.name: numpy_name(o.type) for o in self._session.get_outputs()}

    def __call__(self, inputs: Sequence[Array], names: Sequence[str] | None = None) -> list[Array]:
        """The outputs, or those of these names."""
        if len(inputs) != len(self.inputs):
            raise SlimlineError(f"The model takes {len(self.inputs)} inputs, not {len(inputs)}: give one array each.")
        try:
            with self._options() as options:
                result: list[Array] = self._session.run(names, dict(zip(self.inputs, inputs, strict=True)), options)
        except Exception as reason:
            shapes = ", ".join(f"{x.dtype}{x.shape}" for x in inputs)
            raise SlimlineError(
                f"The model cannot take inputs {shapes} ({reason_of(reason)}): give arrays of the shapes and dtypes of "
                "its example inputs."
            ) from reason
        return result

    @contextmanager
    def _options(self) -> Iterator[ort.RunOptions | None]:
        """Those of one call, which end it when patience does."""
        if self._patience is None:
            yield None
            return
        import onnxruntime

        options = onnxruntime.RunOptions()
        timer = threading.Timer(self._patience, setattr, (options, "terminate", True))
        timer.daemon = True
        timer.start()
        try:
            yield options
        finally:
            timer.cancel()

    def takes(self, inputs: Sequence[Array]) -> bool:
        """Whether it computes its outputs of these inputs."""
        try:
            self(inputs)
        except SlimlineError:
            return False
        return True


def reason_of(error: BaseException) -> str:
    """What ONNX Runtime says of an error, in one short line."""
    first = " ".join((str(error).strip().splitlines() or [type(error).__name__])[0].split())
    return first.rpartition(" : ")[2][:200].rstrip(".: ")


def numpy_name(kind: str) -> str:
    """``tensor(float)`` to ``float32``, and so on."""
    name = kind.removeprefix("tensor(").removesuffix(")")
    return _NUMPY.get(name, name)


def whole(model: ir.Model) -> Part:
    """All of a model that its outputs need."""
    return part(model, [str(value.name) for value in model.graph.outputs])


def part(model: ir.Model, outputs: Sequence[str], sources: Mapping[str, Array] | None = None) -> Part:
    """The part of a model that computes `outputs` from its inputs, or from `sources`, arrays of values by
    their names, the first of them with the batch in front. Nothing else of the model is copied."""
    graph = model.graph
    makers = {str(o.name): node for node in graph for o in node.outputs}
    starts = {str(value.name) for value in graph.inputs} if sources is None else set(sources)
    needed: set[str] = set()
    nodes: dict[ir.Node, onnx.NodeProto] = {}
    pending = [name for name in outputs if name not in starts]
    while pending:
        name = pending.pop()
        if name in needed or name in starts:
            continue
        needed.add(name)
        if (maker := makers.get(name)) is not None and maker not in nodes:
            node = nodes[maker] = ir.to_proto(maker)
            if sources is not None and SIZES in node.output:
                node.input[0] = next(iter(sources))
            pending += read_names(node)
    proto = onnx.ModelProto(ir_version=model.ir_version)
    proto.opset_import.extend(onnx.helper.make_opsetid(*pair) for pair in model.opset_imports.items())
    proto.functions.extend(ir.to_proto(function) for function in model.functions.values())
    proto.graph.name = graph.name or "part"
    if sources is None:
        proto.graph.input.extend(ir.to_proto(value) for value in graph.inputs)
    for name, array in ({} if sources is None else sources).items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        proto.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, [None] * array.ndim))
    proto.graph.node.extend(nodes[node] for node in graph if node in nodes)
    weights: dict[str, Array] = {}
    for name, value in graph.initializers.items():
        if name not in needed or value.const_value is None:
            continue
        tensor = proto.graph.initializer.add()
        if value.const_value.nbytes < APART or value.const_value.dtype not in _REAL:
            ir.serde.serialize_tensor_into(tensor, value.const_value)
        else:
            array = weights[name] = np.ascontiguousarray(value.const_value.numpy())
            tensor.data_type = value.const_value.dtype.value
            tensor.dims.extend(array.shape)
            _outside(tensor)
        tensor.name = name
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    return Part(proto, weights)


def apart(proto: onnx.ModelProto) -> Part:
    """A message whose weights are moved, in place, out of it."""
    weights: dict[str, Array] = {}
    for tensor in proto.graph.initializer:
        if len(tensor.raw_data) >= APART and tensor.data_type in _REAL:
            weights[tensor.name] = onnx.numpy_helper.to_array(tensor)
            tensor.ClearField("raw_data")
            _outside(tensor)
    return Part(proto, weights)


def _outside(tensor: onnx.TensorProto) -> None:
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights")


def read_names(node: onnx.NodeProto) -> list[str]:
    """Names that an operator reads, those of the graphs in it included."""
    names = [name for name in node.input if name]
    for held in node.attribute:
        for graph in (*([held.g] if held.HasField("g") else ()), *held.graphs):
            names += [output.name for output in graph.output]
            for inner in graph.node:
                names += read_names(inner)
    return names


def outline(model: ir.Model, example: Sequence[Array]) -> dict[str, Value]:
    """Shape and dtype of every tensor that the graph computes of `example`, by name."""
    (shapes,) = outlines(model, [example])
    types = Session(part(model, list(shapes)), optimized=False).types
    return {name: Value(name, shape, types[name]) for name, shape in shapes.items()}


def outlines(model: ir.Model, batches: Sequence[Sequence[Array]]) -> list[dict[str, tuple[int, ...]]]:
    """Shapes of every tensor that the graph computes of each of the inputs, by name."""
    names = [
        str(output.name)
        for node in model.graph
        for output in node.outputs
        if output.name
        and node.op_type not in _SEQUENCES
        and not isinstance(output.type, (ir.SequenceType, ir.OptionalType))
    ]
    # ONNX Runtime takes no shapes of floats of 8 bits; what is rounded has that of what it was.
    alike = {
        str(n.outputs[0].name): str(n.inputs[0].name) for n in model.graph if n.op_type == _ROUNDING and n.inputs[0]
    }
    every = part(model, names)
    # Only shapes are outputs: what is an output itself would stay in memory to the end.
    del every.proto.graph.output[:]
    told = [f"slimline_shape_{k}" for k in range(len(names))]
    for name, shape in zip(names, told, strict=True):
        every.proto.graph.node.append(onnx.helper.make_node("Shape", [alike.get(name, name)], [shape]))
        every.proto.graph.output.append(onnx.ValueInfoProto(name=shape))
    session = Session(every, optimized=False)
    return [
        {name: tuple(map(int, shape)) for name, shape in zip(names, session(inputs, told), strict=True)}
        for inputs in batches
    ]


def typed(array: Array, kind: str) -> Array:
    """An array in the dtype of an input, where no number is lost by it."""
    dtype = np.dtype(kind)
    return array.astype(dtype) if np.can_cast(array.dtype, dtype, "same_kind") else array


def evaluate(model: ir.Model, batches: Sequence[Sequence[Array]], names: Sequence[str]) -> list[dict[str, Any]]:
    """These values, computed of each of the inputs."""
    if not names:
        return [{} for _ in batches]
    session = Session(part(model, names), optimized=False)
    return [dict(zip(names, session(inputs, names), strict=True)) for inputs in batches]
