"""Arrays in files of anybody: ``.npy``, ``.npz`` and safetensors, of which only plain numbers are taken.

What a header says is held against the bytes that are there before any memory is taken for it.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from slimline.files import archive, strictjson
from slimline.files.strictjson import Malformed

KINDS, DIMENSIONS = "biufc", 32
_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "<u1", "BOOL": "?",
}  # fmt: skip


def npz(path: Path, names: re.Pattern[str]) -> dict[str, np.ndarray]:
    """The arrays that an ``.npz`` holds by names that match; no others are read.

    Raises
    ------
    Malformed, Damaged : no such archive, or an array of objects, or of another size than it says.
    """
    held = archive.read(path, packed=True)
    arrays = {}
    for member in held.sizes:
        name = member.removesuffix(".npy")
        if name != member and names.fullmatch(name):
            with held.open(member) as stream:
                shape, dtype, fortran = _header(stream, name)
                before = stream.tell()
            if before + math.prod(shape) * dtype.itemsize != held.sizes[member]:
                raise Malformed(f"holds {name} of another size than it says")
            numbers = np.frombuffer(bytearray(held.read(member)), dtype, offset=before)
            arrays[name] = numbers.reshape(shape, order="F" if fortran else "C")
    return arrays


def npy(path: Path) -> np.ndarray:
    """The array of an ``.npy`` file, mapped and not read.

    Raises
    ------
    Malformed : no such file, or an array of objects, or of another size than it says.
    """
    with path.open("rb") as stream:
        shape, dtype, fortran = _header(stream, path.stem)
        before = stream.tell()
    if before + math.prod(shape) * dtype.itemsize != path.stat().st_size:
        raise Malformed(f"holds {path.stem} of another size than it says")
    if 0 in shape:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", before, shape, "F" if fortran else "C")


def _header(stream: IO[bytes], name: str) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
    """Shape, type and order of an array; the stream stands where its numbers begin."""
    try:
        version = np.lib.format.read_magic(stream)
        read: Callable[..., Any] = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read(stream)
    except Exception as reason:  # a header is a Python literal, which numpy reads and may stumble over in many ways
        raise Malformed(f"holds {name}, which is no array of numpy") from reason
    if dtype.kind not in KINDS or dtype.hasobject or dtype.names is not None or dtype.subdtype is not None:
        raise Malformed(f"holds {name} of type {str(dtype)[:60]}, which is no number")
    if len(shape) > DIMENSIONS or any(n < 0 for n in shape) or math.prod(shape) >= 2**48:
        raise Malformed(f"holds {name} of a shape that no array has")
    return shape, dtype, fortran


def safetensors(source: Path | bytes) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file, or of its bytes; bfloat16 as float32, which holds the same numbers.

    Raises
    ------
    Malformed : no such file; tensors that overlap, leave gaps or are longer than the file; a type that numpy lacks.
    OSError : the file cannot be read.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as stream:
        size = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise Malformed("is no safetensors file, or its end is missing")
        entries = strictjson.parse(stream.read(length).rstrip(b" "))
        if not isinstance(entries, dict):
            raise Malformed("is no safetensors file")
        entries.pop("__metadata__", None)
        spans = sorted(((*_span(name, entry), name) for name, entry in entries.items()), key=lambda s: s[:2])
        at, tensors = 0, {}
        for start, end, name in spans:
            if start != at or end > size - 8 - length:
                raise Malformed(f"keeps {name[:60]!r} in bytes that are not there, or are another's")
            at = end
            tensors[name] = _tensor(stream.read(end - start), entries[name], name)
        if at != size - 8 - length:
            raise Malformed("holds bytes that belong to no tensor")
    return {name: tensors[name] for name in entries}


def _span(name: str, entry: Any) -> tuple[int, int]:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(end)]} if len(entry) == 3:
            if any(type(n) is not int or n < 0 for n in shape) or not 0 <= start <= end:
                raise Malformed(f"describes {name[:60]!r} by what is no size")
            if dtype not in (*_TYPES, "BF16"):
                raise Malformed(f"holds {name[:60]!r} as {dtype[:20]}: save it as F32")
            width = 2 if dtype == "BF16" else np.dtype(_TYPES[dtype]).itemsize
            if math.prod(shape) * width != end - start or len(shape) > DIMENSIONS:
                raise Malformed(f"holds {name[:60]!r} of another size than it says")
            return start, end
    raise Malformed(f"describes {name[:60]!r} as no tensor")


def _tensor(content: bytes, entry: Mapping[str, Any], name: str) -> np.ndarray:
    if entry["dtype"] == "BF16":
        wide = np.frombuffer(content, "<u2").astype(np.uint32) << 16
        return wide.view(np.float32).reshape(entry["shape"])
    if entry["dtype"] == "BOOL" and content and max(content) > 1:
        raise Malformed(f"holds {name[:60]!r}, whose bytes are no booleans")
    return np.frombuffer(content, _TYPES[entry["dtype"]]).reshape(entry["shape"])
