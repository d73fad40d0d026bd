"""ONNX Runtime as what computes the native model: on the CPU, with one thread, the same numbers each time."""

from __future__ import annotations

import threading
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
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
LARGE = 2**16
"""Bytes from which on a tensor is handed over as an array; no sizes, which shapes are inferred from, are as many."""
_SEQUENCES = frozenset({"SequenceConstruct", "SequenceEmpty", "SequenceInsert", "SequenceErase", "SplitToSequence",
                        "SequenceMap", "Optional"})  # fmt: skip
_NUMPY = {"float": "float32", "double": "float64", "float8e4m3fn": "float8_e4m3fn"}
_ROUNDING = "QuantizeLinear"
_DROPS_RELUS = "ReluQuantRewrite"
"""What takes out a Relu before a QuantizeLinear to floats of 8 bits, as if zero were the lowest of them."""


@dataclass(frozen=True)
class Message:
    """A model, or a part of it, whose large tensors stand beside the message instead of being copied into it.

    Attributes
    ----------
    proto : in which they are external tensors of no file.
    arrays : their numbers, by name.
    """

    proto: onnx.ModelProto
    arrays: Mapping[str, Array]


class Session:
    """A model, or a part of it, loaded by ONNX Runtime.

    Parameters
    ----------
    model : as a whole message, or one with arrays beside it.
    optimized : whether ONNX Runtime may change the graph.
    patience : seconds that a call may take; None for any time.
    """

    def __init__(self, model: onnx.ModelProto | Message, optimized: bool = True, patience: float | None = None) -> None:
        import onnxruntime

        message = model if isinstance(model, Message) else Message(model, {})
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        options.use_deterministic_compute = True
        # The rounding of a quantized model is simulated: integer kernels are the artifact's.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        if not optimized:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.add_session_config_entry("session.disable_prepacking", "1")  # it copies, and is for many runs
        # They share the arrays' memory, and the session does not own them.
        self._values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in message.arrays.values()]
        options.add_external_initializers(list(message.arrays), self._values)
        try:
            content = message.proto.SerializeToString()
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


def light(proto: onnx.ModelProto) -> Message:
    """A message whose large tensors are taken out of it: it is changed."""
    arrays = {}
    for tensor in proto.graph.initializer:
        large = tensor.name not in arrays and len(tensor.raw_data) >= LARGE
        if large and _plain(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))):
            arrays[tensor.name] = onnx.numpy_helper.to_array(tensor)
            tensor.ClearField("raw_data")
            _beside(tensor)
    return Message(proto, arrays)


def opened(message: Message) -> ir.Model:
    """The model of a message, with its arrays."""
    model = ir.from_proto(message.proto)
    for name, array in message.arrays.items():
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    return model


def whole(model: ir.Model) -> Message:
    """All of a model."""
    graph = model.graph
    ends = (map(ir.to_proto, values) for values in (graph.inputs, graph.outputs))
    return _message(model, graph.initializers, map(ir.to_proto, graph), *ends)


def part(model: ir.Model, outputs: Sequence[str], sources: Mapping[str, Array] | None = None) -> Message:
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
    inputs = (
        [ir.to_proto(value) for value in graph.inputs]
        if sources is None
        else [
            onnx.helper.make_tensor_value_info(
                name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim
            )
            for name, array in sources.items()
        ]
    )
    ends = [onnx.ValueInfoProto(name=name) for name in outputs]
    return _message(model, needed, (nodes[node] for node in graph if node in nodes), inputs, ends)


def _message(
    model: ir.Model,
    needed: Container[str],
    nodes: Iterable[onnx.NodeProto],
    inputs: Iterable[onnx.ValueInfoProto],
    outputs: Iterable[onnx.ValueInfoProto],
) -> Message:
    """One of these operators and of the tensors that are `needed`."""
    proto, arrays = onnx.ModelProto(ir_version=model.ir_version), dict[str, Array]()
    proto.opset_import.extend(onnx.helper.make_opsetid(*pair) for pair in model.opset_imports.items())
    proto.functions.extend(ir.to_proto(function) for function in model.functions.values())
    proto.graph.name = model.graph.name or "part"
    proto.graph.input.extend(inputs)
    proto.graph.node.extend(nodes)
    for name, value in model.graph.initializers.items():
        content = value.const_value
        if name not in needed or content is None:
            continue
        tensor = proto.graph.initializer.add()
        if content.nbytes >= LARGE and _plain(content.dtype.numpy()):
            tensor.dims.extend(content.shape.numpy())
            tensor.data_type = content.dtype.value
            _beside(tensor)
            arrays[name] = np.ascontiguousarray(content.numpy())
        else:
            ir.serde.serialize_tensor_into(tensor, content)
        tensor.name = name
    proto.graph.output.extend(outputs)
    return Message(proto, arrays)


def _plain(kind: np.dtype[Any]) -> bool:
    """Whether numpy itself has such numbers, which ONNX Runtime then takes from its arrays."""
    return kind.isbuiltin == 1 and kind.kind in "fiu"


def _beside(tensor: onnx.TensorProto) -> None:
    """Say that its numbers are elsewhere."""
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="memory")


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
    message = whole(model)
    proto = message.proto
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    for k, name in enumerate(names):
        node = onnx.helper.make_node("Shape", [alike.get(name, name)], [f"slimline_shape_{k}"])
        proto.graph.node.append(node)
        proto.graph.output.append(onnx.ValueInfoProto(name=f"slimline_shape_{k}"))
    session = Session(message, optimized=False)
    shapes = session(example, [f"slimline_shape_{k}" for k in range(len(names))])
    return {
        name: Value(name, tuple(int(n) for n in shape), session.types[name])
        for name, shape in zip(names, shapes, strict=True)
    }


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
