"""What slimline notes beside a model: JSON for the structure, safetensors for the numbers.

Notes are dicts, lists and plain values with arrays among the leaves. `pack` stores each array under its path in them
and leaves a reference in its place, so that no array is ever written as JSON. Truth values, such as masks, take a bit
each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from slimline.files import array_files
from slimline.files.strictjson import Malformed

_REFERENCE, _SHAPE = "$array", "$shape"


def pack(notes: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Notes ready for JSON, and their arrays as safetensors, empty where there is none; the same notes give the same
    bytes."""
    arrays: dict[str, np.ndarray] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, np.ndarray):
            while path in arrays:  # names may hold the mark that joins them
                path += "'"
            if value.dtype == np.bool_:
                arrays[path] = np.packbits(value)
                return {_REFERENCE: path, _SHAPE: list(value.shape)}
            arrays[path] = np.ascontiguousarray(value).reshape(value.shape)
            return {_REFERENCE: path}
        if isinstance(value, Mapping):
            return {str(key): walk(part, f"{path}/{key}") for key, part in value.items()}
        return [walk(part, f"{path}/{i}") for i, part in enumerate(value)] if isinstance(value, list | tuple) else value

    packed = {key: walk(value, key) for key, value in notes.items()}
    return packed, safetensors.numpy.save(arrays) if arrays else b""


def unpack(packed: Mapping[str, Any], content: bytes) -> dict[str, Any]:
    """What `pack` was given, lists in place of tuples.

    Raises
    ------
    Malformed : arrays that are damaged, missing or not referred to.
    """
    arrays = array_files.safetensors(content) if content else {}
    used: set[str] = set()

    def walk(value: Any) -> Any:
        if isinstance(value, list):
            return [walk(part) for part in value]
        if not isinstance(value, dict):
            return value
        if not {_REFERENCE} <= value.keys() <= {_REFERENCE, _SHAPE}:
            return {key: walk(part) for key, part in value.items()}
        path = value[_REFERENCE]
        if not isinstance(path, str) or path not in arrays:
            raise Malformed(f"notes an array {str(path)[:60]!r} that it does not hold")
        used.add(path)
        return _truths(arrays[path], value[_SHAPE], path) if _SHAPE in value else arrays[path]

    notes = {key: walk(value) for key, value in packed.items()}
    if unused := arrays.keys() - used:
        raise Malformed(f"holds an array {min(unused)[:60]!r} of which it notes nothing")
    return notes


def _truths(bits: np.ndarray, shape: Any, path: str) -> np.ndarray:
    """The boolean array of these bits, the first in the highest of each byte; what fills the last byte is zero."""
    sizes = isinstance(shape, list) and len(shape) <= array_files.DIMENSIONS
    if not sizes or any(type(n) is not int or n < 0 for n in shape):
        raise Malformed(f"gives the array {path[:60]!r} a shape that is none")
    count = math.prod(shape)
    if math.prod(max(n, 1) for n in shape) >= 2**48 or bits.dtype != np.uint8 or bits.shape != (-(-count // 8),):
        raise Malformed(f"holds the array {path[:60]!r} with other bits than its shape needs")
    whole = np.unpackbits(bits)
    if whole[count:].any():
        raise Malformed(f"holds the array {path[:60]!r} with more bits than its shape needs")
    return whole[:count].astype(bool).reshape(shape)
