"""From the bytes of an ``.onnx`` file to a message that says of itself nothing that is not so.

Everything is held against its own sizes before any of it is allocated; weights that lie beside the file are read from
its own folder alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from slimline.basics.errors import SlimlineError
from slimline.files.atomic import below, is_plain
from slimline.files.strictjson import Malformed
from slimline.frameworks.onnx.run import LARGEST

DEPTH, NODES, FUNCTIONS = 16, 200_000, 2_000
"""Levels of graphs in graphs, operators in all, and functions that a model may have."""
FREE_BYTES, RATIO = 256 << 20, 100
"""What the weights beside a file may take: so many bytes, or so many times those of their files if that is more.
Tensors may share a place in them."""
OLDEST = 7
"""The version of ONNX' operators from which models are read."""

_T = onnx.TensorProto
_BITS: dict[int, int] = {
    _T.FLOAT: 32, _T.DOUBLE: 64, _T.FLOAT16: 16, _T.BFLOAT16: 16, _T.INT8: 8, _T.UINT8: 8, _T.INT16: 16, _T.UINT16: 16,
    _T.INT32: 32, _T.UINT32: 32, _T.INT64: 64, _T.UINT64: 64, _T.BOOL: 8, _T.INT4: 4, _T.UINT4: 4,
    _T.FLOAT8E4M3FN: 8, _T.FLOAT8E4M3FNUZ: 8, _T.FLOAT8E5M2: 8, _T.FLOAT8E5M2FNUZ: 8,
}  # fmt: skip
_FIELDS: dict[int, str] = {
    _T.FLOAT: "float_data", _T.DOUBLE: "double_data", _T.INT64: "int64_data", _T.UINT32: "uint64_data",
    _T.UINT64: "uint64_data",
}  # fmt: skip


def read(path: Path) -> onnx.ModelProto:
    """The model that a file holds, checked, with all its weights in it.

    Raises
    ------
    SlimlineError : no such file, a damaged one, or one that docs/security.md does not allow.
    """
    if not path.is_file():
        raise SlimlineError(f"There is no file {path}: check the path.")
    if path.stat().st_size > LARGEST:
        raise SlimlineError(
            f"{path} is larger than 2 GB, more than ONNX Runtime takes in one piece: give a smaller model."
        )
    try:
        return checked(onnx.ModelProto.FromString(path.read_bytes()), path.parent)
    except (DecodeError, UnicodeDecodeError) as reason:
        raise SlimlineError(f"{path} is no ONNX file, or a damaged one: export it anew.") from reason
    except Malformed as reason:
        raise SlimlineError(
            f"{path} is damaged or not an ONNX file that slimline reads: it {reason}; export it anew."
        ) from reason
    except OSError as reason:
        raise SlimlineError(f"{path} cannot be read ({reason.strerror or reason}): check the file.") from reason


def checked(model: onnx.ModelProto, folder: Path | None = None) -> onnx.ModelProto:
    """The same message, if it is a model; its external weights, which lie in `folder`, are read into it.

    Raises
    ------
    Malformed : what it says of itself is not so.
    """
    del model.training_info[:]
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST <= opset <= newest:
        raise Malformed(f"is of ONNX operators version {opset}, where {OLDEST} to {newest} are known")
    if not model.graph.node:
        raise Malformed("holds no operator")
    if len(model.functions) > FUNCTIONS:
        raise Malformed(f"holds more than {FUNCTIONS} functions")
    _not_recursive(model)
    total = beside = 0
    backing: dict[Path, int] = {}
    for tensor in _tensors(model):
        outside = tensor.data_location == _T.EXTERNAL
        size = _size(tensor, folder, total, backing)
        total, beside = total + size, beside + outside * size
        if beside > max(FREE_BYTES, RATIO * sum(backing.values())):
            raise Malformed(f"reads {beside:,} bytes of weights from {sum(backing.values()):,} beside it")
    _runs(model)
    return model


def _runs(model: onnx.ModelProto) -> None:
    try:
        content = model.SerializeToString()
    except Exception as reason:  # protobuf raises classes of its own where a message is too large
        raise Malformed("holds more than 2 GB") from reason
    try:
        onnx.checker.check_model(content)
    except Exception as reason:
        lines = [line.strip() for line in str(reason).splitlines() if line.strip()]
        rule = " ".join((lines[0] if lines else type(reason).__name__).split())[:200].rstrip(".: ")
        raise Malformed(f"breaks a rule of ONNX ({rule})") from reason


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every stored tensor, those in attributes and in graphs inside operators included."""
    counted = 0
    pending: list[tuple[int, onnx.GraphProto | None, list[onnx.NodeProto]]] = [(0, model.graph, list(model.graph.node))]
    pending += [(0, None, list(function.node)) for function in model.functions]
    while pending:
        depth, graph, nodes = pending.pop()
        if depth > DEPTH:
            raise Malformed(f"holds graphs in graphs, more than {DEPTH} levels deep")
        if graph is not None:
            if graph.sparse_initializer:
                raise Malformed("holds sparse tensors")
            yield from graph.initializer
        counted += len(nodes)
        if counted > NODES:
            raise Malformed(f"holds more than {NODES:,} operators")
        for node in nodes:
            for held in node.attribute:
                if held.HasField("sparse_tensor") or held.sparse_tensors:
                    raise Malformed("holds sparse tensors")
                if held.HasField("t"):
                    yield held.t
                yield from held.tensors
                inner = [*([held.g] if held.HasField("g") else ()), *held.graphs]
                pending += [(depth + 1, g, list(g.node)) for g in inner]


def _size(tensor: onnx.TensorProto, folder: Path | None, total: int, backing: dict[Path, int]) -> int:
    """Bytes of a tensor, which it has to back; those of an external one are read into it, and the size of its file is
    noted in `backing`."""
    name = tensor.name[:60]
    if tensor.data_type == _T.STRING:
        return sum(map(len, tensor.string_data))
    if tensor.data_type not in _BITS:
        raise Malformed(f"holds {name!r} of a type {tensor.data_type} that no weight has")
    if any(n < 0 for n in tensor.dims) or len(tensor.dims) > 32:
        raise Malformed(f"holds {name!r} of a shape that is none")
    numbers = math.prod(tensor.dims)
    size = -(-numbers * _BITS[tensor.data_type] // 8)
    if total + size > LARGEST:
        raise Malformed("holds more than 2 GB")
    if tensor.HasField("segment"):
        raise Malformed(f"holds {name!r} in segments")
    if tensor.data_location == _T.EXTERNAL:
        tensor.raw_data = _external(tensor, folder, size, backing)
        tensor.data_location = _T.DEFAULT
        del tensor.external_data[:]
    elif tensor.HasField("raw_data"):
        if len(tensor.raw_data) != size:
            raise Malformed(f"holds {len(tensor.raw_data):,} bytes of {name!r}, which has {size:,}")
    else:
        field = getattr(tensor, _FIELDS.get(tensor.data_type, "int32_data"))
        packed = -(-numbers // (8 // _BITS[tensor.data_type])) if _BITS[tensor.data_type] < 8 else numbers
        if len(field) != packed:
            raise Malformed(f"holds {len(field):,} numbers of {name!r}, which has {numbers:,}")
        if field and tensor.data_type not in _FIELDS:
            _in_range(field, tensor.data_type, name)
    return int(size)


def _in_range(field: object, kind: int, name: str) -> None:
    """Refuse numbers that are wider than their type, which other readers would cut off in silence."""
    array = np.asarray(field, np.int64)
    bits = max(_BITS[kind], 8)
    signed = kind in (_T.INT8, _T.INT16, _T.INT32)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    if array.size and (array.min() < min(low, -(2 ** (bits - 1))) or array.max() > high):
        raise Malformed(f"holds numbers in {name!r} that its type cannot hold")


def _external(tensor: onnx.TensorProto, folder: Path | None, size: int, backing: dict[Path, int]) -> bytes:
    """The bytes of a tensor that lies in another file of the model's folder."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    name = tensor.name[:60]
    if folder is None:
        raise Malformed(f"keeps {name!r} in another file, which a model in memory cannot name")
    location = entries.get("location", "")
    try:
        path = below(folder, location)
    except SlimlineError as reason:
        raise Malformed(f"keeps {name!r} in {location[:80]!r}, which is no plain file of its own folder") from reason
    if not is_plain(path):
        raise Malformed(f"keeps {name!r} in {location[:80]!r}, which is not there or is no plain file")
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", size))
    except ValueError as reason:
        raise Malformed(f"names a place of {name!r} that is no number") from reason
    backing[path] = path.stat().st_size
    if length != size or offset < 0 or offset + size > backing[path]:
        raise Malformed(f"keeps {name!r} at a place that {location[:80]!r} does not have")
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _not_recursive(model: onnx.ModelProto) -> None:
    """Refuse functions that call themselves, and those that unfold to more operators than a model may have."""
    functions = {(f.domain, f.name): f for f in model.functions}
    sizes: dict[tuple[str, str], int] = {}
    active: set[tuple[str, str]] = set()

    def size(key: tuple[str, str], depth: int) -> int:
        if key in active or depth > 100:
            raise Malformed("holds functions that call themselves")
        if key not in sizes:
            active.add(key)
            sizes[key] = unfolded(functions[key].node, depth + 1)
            active.remove(key)
        return sizes[key]

    def unfolded(nodes: object, depth: int) -> int:
        total = 0
        for node in nodes:  # type: ignore[attr-defined]
            key = (node.domain, node.op_type)
            total += size(key, depth) if key in functions else 1
            for held in node.attribute:
                for graph in (*([held.g] if held.HasField("g") else ()), *held.graphs):
                    if depth > 100:
                        raise Malformed(f"holds graphs in graphs, more than {DEPTH} levels deep")
                    total += unfolded(graph.node, depth + 1)
            if total > NODES:
                raise Malformed(f"holds more than {NODES:,} operators")
        return total

    unfolded(model.graph.node, 0)
    for key in functions:
        size(key, 0)
