"""``.onnx`` files: a standard model, and in its notes what slimline knows."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import safetensors.numpy

from slimline.basics.arrays import Example
from slimline.basics.errors import SlimlineError
from slimline.files import array_files, notes, strictjson
from slimline.files.atomic import atomic_write
from slimline.files.strictjson import Malformed
from slimline.frameworks.base import Array
from slimline.frameworks.onnx import payload
from slimline.frameworks.onnx.canonical import canonical
from slimline.frameworks.onnx.load import quantized
from slimline.frameworks.onnx.native import Native
from slimline.graph.quantization import Quantization

_NOTES = "slimline"


def save(native: Native, path: Path, example: tuple[Array, ...], metadata: Mapping[str, Any]) -> None:
    """Write `native` to an ``.onnx`` file that any runtime loads, atomically; the same model gives the same bytes.

    `metadata` is JSON with arrays among its leaves. It stands in the model's ``metadata_props``; these arrays and the
    example inputs are safetensors, in base64, as ONNX takes what is beside a graph for text.
    """
    proto = ir.to_proto(native.model)
    held = safetensors.numpy.save({f"{i:04d}": np.ascontiguousarray(x).reshape(x.shape) for i, x in enumerate(example)})
    packed, arrays = notes.pack(metadata)
    own = {"metadata": packed, "example": base64.b64encode(held).decode(), "formats": base64.b64encode(arrays).decode()}
    try:
        text = json.dumps(own, sort_keys=True, allow_nan=False)
        _own(text)
        proto.metadata_props.append(onnx.StringStringEntryProto(key=_NOTES, value=text))
        content = proto.SerializeToString(deterministic=True)
    except (Malformed, ValueError) as reason:
        raise SlimlineError(f"The model cannot be saved: it {reason}; shorten that.") from reason
    atomic_write(path, content)


def open_(path: Path, example: Example | None = None) -> tuple[Native, tuple[Array, ...], dict[str, Any]]:
    """Read what `save` wrote, or anybody's ONNX file: native, example inputs, metadata.

    A file of another's that is quantized comes with formats of nothing in its metadata, so that no step changes it.

    Raises
    ------
    SlimlineError : no such file, a damaged one, or one that holds anything which docs/security.md does not list.
    """
    proto = payload.read(path)
    texts = [entry.value for entry in proto.metadata_props if entry.key == _NOTES]
    own = None
    if texts:
        try:
            own = _own(texts[0])
        except Malformed as reason:
            raise SlimlineError(
                f"{path} has notes that are not slimline's: it {reason}; save the model again."
            ) from reason
        others = [entry for entry in proto.metadata_props if entry.key != _NOTES]
        del proto.metadata_props[:]
        proto.metadata_props.extend(others)
    native, arrays = canonical(proto, example if own is None else own[1])
    metadata = {} if own is None else own[0]
    if "quantization" not in metadata and quantized(native.model):
        metadata = {**metadata, "quantization": Quantization().notes()}
    return native, arrays, metadata


def _own(text: str) -> tuple[dict[str, Any], tuple[Array, ...]]:
    """What slimline wrote beside the model, held against its kinds: metadata and example inputs."""
    own = strictjson.parse(text)
    if not isinstance(own, dict) or own.keys() != {"metadata", "example", "formats"}:
        raise Malformed("holds notes of another kind")
    if not isinstance(own["metadata"], dict):
        raise Malformed("holds notes of another kind")
    arrays = array_files.safetensors(_bytes(own["example"]))
    return notes.unpack(own["metadata"], _bytes(own["formats"])), tuple(arrays[k] for k in sorted(arrays))


def _bytes(text: Any) -> bytes:
    """What is written in base64."""
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, TypeError) as reason:
        raise Malformed("holds arrays that are not written in base64") from reason
