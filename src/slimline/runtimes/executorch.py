"""The ExecuTorch target: PyTorch models as ``.pte`` files, run by XNNPACK on the CPU.

A file has a second method, ``slimline``, which answers with what ExecuTorch does not keep: the names of inputs and
which of their sizes are free, and the layers behind the operators of the delegate.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slimline.basics.errors import SlimlineError, first_line, require
from slimline.basics.quiet import silent
from slimline.files.atomic import atomic_write
from slimline.graph.placement import Policy
from slimline.methods.formats import Format, IntegerGrid
from slimline.runtimes.base import Runtime
from slimline.runtimes.forms import EXPORTED_PROGRAM, Form

if TYPE_CHECKING:
    import torch

Specs = list[tuple[str, tuple[int | None, ...], str]]

_RECORD = "slimline"
_IDENTIFIER = b"ET"
"""How a program begins, four bytes on; the number of a version follows."""
_PRODUCTS = ("convolution", "linear", "addmm", "mm", "bmm")
_MOVES = {"XNNConvert", "XNNStaticTranspose"}
"""Operators of the delegate that lay numbers out anew at its ends."""
_REAL = ("xnn_datatype_fp32", "xnn_datatype_fp16")
_ROUNDED_AS_IT_RUNS = "xnn_datatype_qdint8"
_CASTS = ("quantize", "dequantize", "_clone_dim_order", "_to_dim_order_copy", "sym_size", "et_view")


POLICY = Policy(
    activations="int8",
    fused=frozenset({"relu", "relu6", "clip", "hardtanh"}),
    glue=frozenset({"elementwise:add", "elementwise:sub", "elementwise:mul", "concat", "pool:mean", "reduce:mean"}),
    transposed=False,
    float_results=frozenset(),
    linear_channels=True,
    constants=frozenset(),
    ranges={},
    transposed_channels=False,
    whole=False,
    one_grid=frozenset(),
)


class Session:
    """A ``.pte`` file loaded by ExecuTorch; the number of threads is the process's."""

    output_names: Sequence[str] = ()

    def __init__(self, path: Path, threads: int) -> None:
        from executorch.extension.pybindings import portable_lib

        self._name = path.name
        self._program, record = _load(path)
        with silent():
            portable_lib._unsafe_reset_threadpool(threads)
            try:
                self._method = self._program.load_method("forward")
            except RuntimeError as error:
                raise SlimlineError(
                    f"ExecuTorch cannot run {path} ({first_line(error)[:200]}): export the model again."
                ) from error
        self._specs = _specs(self._method.metadata, record)
        meta = self._method.metadata
        self._most = [meta.input_tensor_meta(i).sizes()[:1] for i in range(meta.num_inputs())]

    def run(self, inputs: tuple[np.ndarray, ...]) -> np.ndarray:
        """The first output ``(batch, …)`` for inputs ``(batch, …)`` of any batch size up to the file's largest."""
        return self.outputs(inputs)[0]

    def outputs(self, inputs: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        """All outputs for `inputs`."""
        import torch

        arrays = self._checked(inputs)
        return tuple(x.numpy() for x in self._method.execute([torch.from_numpy(x) for x in arrays]))

    def _checked(self, inputs: tuple[np.ndarray, ...]) -> list[np.ndarray]:
        if len(inputs) != len(self._specs):
            raise SlimlineError(f"{self._name} takes {len(self._specs)} inputs, not {len(inputs)}.")
        arrays = []
        for (name, shape, dtype), most, array in zip(self._specs, self._most, inputs, strict=True):
            fits = len(shape) == array.ndim and all(a in (None, b) for a, b in zip(shape, array.shape, strict=True))
            if not fits or (shape and shape[0] is None and len(array) > most[0]):
                sizes = ", ".join(f"up to {most[0]}" if size is None else str(size) for size in shape)
                raise SlimlineError(
                    f"Input {name!r} of {self._name} has shape ({sizes}), not {array.shape}: "
                    "give arrays (batch, …) of these sizes."
                )
            arrays.append(np.require(array, dtype, ["C", "W"]))
        return arrays


class ExecuTorch(Runtime):
    """The target ``executorch``, see `slimline.runtimes.base.Runtime`."""

    name = "executorch"
    extra = "executorch"
    suffix = ".pte"
    forms = (EXPORTED_PROGRAM,)
    policy = POLICY
    abilities = frozenset({"run", "time", "count integer kernels"})
    packages = ("executorch", "torch", "torchao")
    dynamic = frozenset({"linear"})
    dynamic_grid = "int8_per_row"
    short_multiple = 32
    short_scales = "bfloat16"
    description = "ExecuTorch on the CPU with XNNPACK: int8 activations and int8 weights per channel"

    def available(self) -> str | None:
        """None, or the sentence with the pip command."""
        try:
            require("executorch", self.extra)
        except SlimlineError as error:
            return str(error)
        return None

    def can_multiply(self, each: Format) -> bool:
        """Symmetric integers, of 8 bits with one scale per output, or of 4 in blocks of 32."""
        if not isinstance(each, IntegerGrid) or not each.signed or each.zero_point is not None:
            return False
        return each.axis == 0 if each.stored_bits == 8 else each.bits == 4 and each.blocks == (1, self.short_group)

    def lower(self, form: Form, path: Path) -> None:
        """Write the file to `path`; atomic, and the same bytes each time.

        Raises
        ------
        SlimlineError : an operator that ExecuTorch has not, or integer weights that meet float activations, which it
            lowers to a file that answers wrongly.
        """
        require("executorch", self.extra)
        _refuse_weight_only(form.content)
        atomic_write(path, _lowered(form.content))

    def load(self, path: Path, threads: int = 1) -> Session:
        """Load a ``.pte`` file; `threads` are for every session of this process."""
        return Session(Path(path), threads)

    def integer_layers(self, path: Path) -> Mapping[str, str]:
        """Operators as XNNPACK was given them, and those that are left to the portable kernels, which are float; named
        after their layers, where it is known ``LAYER/OPERATOR`` unless they have weights."""
        layers = {int(k): str(v) for k, v in _load(Path(path))[1].get("layers", {}).items()}
        named: dict[str, str] = {}
        for label, kind in _operators(Path(path), layers):
            unique, count = label, 1
            while unique in named:
                unique, count = f"{label}_{count + 1}", count + 1
            named[unique] = kind
        return named

    def input_specs(self, path: Path) -> Specs:
        """Name, shape (None where any size up to a bound goes) and dtype of each input."""
        program, record = _load(Path(path))
        return _specs(program.metadata("forward"), record)


runtime = ExecuTorch()


def _lowered(program: torch.export.ExportedProgram) -> bytes:
    """The bytes of the file."""
    import torch

    with silent():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeProgramManager, ExecutorchBackendConfig, to_edge_transform_and_lower
        from executorch.exir.passes import MemoryPlanningPass

        # Callers bring the memory of inputs and outputs: planned, it would be as large as for the largest batch.
        config = ExecutorchBackendConfig(
            memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False)
        )
        # To choose between these backends of a convolution torch narrows the range of a free batch.
        with torch.backends.mkldnn.flags(enabled=False), torch.backends.nnpack.flags(enabled=False):
            try:
                edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
                record = {"inputs": _inputs(program), "layers": _layers(edge.exported_program())}
                named = EdgeProgramManager(
                    {"forward": edge.exported_program()}, {_RECORD: json.dumps(record, sort_keys=True)}
                )
                return bytes(named.to_executorch(config).buffer)
            except Exception as error:  # passes raise many types
                raise SlimlineError(
                    f"The model cannot be written for ExecuTorch ({first_line(error)[:200]}): "
                    "express that part of it by common operators."
                ) from error


def _refuse_weight_only(program: torch.export.ExportedProgram) -> None:
    """ExecuTorch 1.5.1 lowers integer weights beside a float input without complaint to what answers garbage."""
    stored = {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}
    for node in program.graph.nodes:
        if node.op != "call_function" or len(node.args) < 2:
            continue
        x, weight = node.args[:2]
        if not _dequantized(weight) or weight.args[0].name not in stored:
            continue
        if not _dequantized(x):
            layer = stored[weight.args[0].name].rpartition(".")[0]
            raise SlimlineError(
                f"ExecuTorch computes wrongly with integer weights and float activations, as layer {layer!r} has: "
                "quantize its activations too, or keep the layer in float."
            )


def _dequantized(node: Any) -> bool:
    return str(getattr(node, "target", "")).startswith("quantized_decomposed.dequantize")


def _inputs(program: torch.export.ExportedProgram) -> list[tuple[str, list[int | None], str]]:
    """What `Runtime.input_specs` tells, ready for JSON."""
    nodes = {node.name: node for node in program.graph.nodes}
    values = [(name, nodes[name].meta["val"]) for name in program.graph_signature.user_inputs if isinstance(name, str)]
    return [
        (name, [n if isinstance(n, int) else None for n in x.shape], str(x.dtype).removeprefix("torch."))
        for name, x in values
    ]


def _layers(program: torch.export.ExportedProgram) -> dict[int, str]:
    """The layers behind the delegate's operators, by their handle."""
    named: dict[int, str] = {}
    for module in program.graph_module.children():
        part = getattr(module, "original_module", None)
        if part is None:
            continue
        stored = {**part.graph_signature.inputs_to_parameters, **part.graph_signature.inputs_to_buffers}
        for node in part.graph.nodes:
            handle = node.meta.get("debug_handle")
            if not hasattr(node.target, "_op") or not handle or "quantize" in str(node.target):
                continue
            operator = str(node.target._op).split(".")[1]
            owners = [
                stored[n.name] for n in (_source(a) for a in node.args[1:2]) if n is not None and n.name in stored
            ]
            stack = [str(path) for path, *_ in (node.meta.get("nn_module_stack") or {}).values()]
            if owners and operator in _PRODUCTS:
                named[handle] = owners[0].rpartition(".")[0]
            else:
                named.setdefault(handle, f"{stack[-1] if stack else ''}/{operator}".lstrip("/"))
    return dict(sorted(named.items()))


def _source(node: Any) -> Any:
    """What a weight is read from, through its dequantization."""
    while _is_node(node) and node.op == "call_function" and node.args:
        node = node.args[0]
    return node if _is_node(node) else None


def _is_node(value: Any) -> bool:
    return hasattr(value, "op")


def _operators(path: Path, layers: Mapping[int, str]) -> Iterator[tuple[str, str]]:
    """Name and kind of every operator of ``forward``, in the order in which they run."""
    with silent():
        from executorch.exir._serialize._program import deserialize_pte_binary

        program = deserialize_pte_binary(path.read_bytes()).program
    plan = next(plan for plan in program.execution_plan if plan.name == "forward")
    for instruction in plan.chains[0].instructions:
        call = instruction.instr_args
        if hasattr(call, "delegate_index"):
            data = program.backend_delegate_data[plan.delegates[call.delegate_index].processed.index].data
            yield from _delegated(bytes(data), layers)
        elif hasattr(call, "op_index"):
            name = plan.operators[call.op_index].name.rpartition("::")[2]
            if not name.startswith(_CASTS):
                yield name, "float"


def _delegated(payload: bytes, layers: Mapping[int, str]) -> Iterator[tuple[str, str]]:
    """The operators of one call of XNNPACK."""
    graph = _xnnpack(payload)
    types = {}
    for value in graph["xvalues"]:
        tensor = value["xvalue_union"]
        tensor = tensor.get("tensor_value", tensor)
        types[tensor["id_out"]] = tensor["datatype"]
    for node in graph["xnodes"]:
        kind, ends = node["xnode_union_type"], node["xnode_union"]
        if kind not in _MOVES:
            operator = kind.removeprefix("XNN")
            rounded = types.get(ends.get("input1_id")) == _ROUNDED_AS_IT_RUNS
            integer = rounded or types[ends["output_id"]] not in _REAL
            yield layers.get(node["debug_handle"], operator), "integer" if integer else "float"


def _xnnpack(payload: bytes) -> dict[str, Any]:
    """The graph that a delegate's payload holds, by the compiler of flatbuffers that ExecuTorch brings."""
    from importlib import resources

    with silent():
        from executorch.backends.xnnpack import serialization
        from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
        from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = XNNHeader.from_bytes(payload[: XNNHeader.EXPECTED_LENGTH])
    with tempfile.TemporaryDirectory() as folder:
        schema, graph = Path(folder, "schema.fbs"), Path(folder, "graph.bin")
        schema.write_bytes(resources.files(serialization).joinpath("schema.fbs").read_bytes())
        graph.write_bytes(payload[header.flatbuffer_offset :][: header.flatbuffer_size])
        _flatc_decompile(folder, str(schema), str(graph))
        text = Path(folder, "graph.json").read_text("utf-8")
    parsed: dict[str, Any] = json.loads(text.replace(": inf", ": Infinity").replace(": -inf", ": -Infinity"))
    return parsed


def _load(path: Path) -> tuple[Any, dict[str, Any]]:
    """The program in a file and what slimline noted in it; nothing in a file of others."""
    require("executorch", ExecuTorch.extra)
    if not path.is_file():
        raise SlimlineError(f"There is no file {path}: give the path of a .pte file.")
    with path.open("rb") as file:
        if file.read(6)[4:] != _IDENTIFIER:  # of other bytes ExecuTorch may end the process
            raise SlimlineError(f"{path} is no ExecuTorch program: give a .pte file, such as slimline.export writes.")
    with silent():
        from executorch.runtime import Runtime as Reader

        try:
            program = Reader.get().load_program(path)
            if "forward" not in program.method_names:
                raise SlimlineError(f"{path} has no method 'forward': give a .pte file of a model.")
            noted = program.load_method(_RECORD).execute([])[0] if _RECORD in program.method_names else "{}"
            return program, json.loads(noted)
        except (RuntimeError, ValueError) as error:
            raise SlimlineError(
                f"ExecuTorch cannot load {path} ({first_line(error)[:200]}): give a .pte file."
            ) from error


def _specs(meta: Any, record: Mapping[str, Any]) -> Specs:
    """Name, shape and dtype of each input, by the record, else as far as ExecuTorch tells."""
    if "inputs" in record:
        return [(str(name), tuple(shape), str(dtype)) for name, shape, dtype in record["inputs"]]
    tensors = [meta.input_tensor_meta(i) for i in range(meta.num_inputs())]
    return [(f"input{i}", tuple(t.sizes()), _DTYPES.get(t.dtype(), "float32")) for i, t in enumerate(tensors)]


_DTYPES = {
    0: "uint8",
    1: "int8",
    2: "int16",
    3: "int32",
    4: "int64",
    5: "float16",
    6: "float32",
    7: "float64",
    11: "bool",
}
