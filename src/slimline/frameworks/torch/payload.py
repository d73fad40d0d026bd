"""Stored tensors of an exported program: raw numbers, held against what is said of them before torch sees them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._export.serde import schema
from torch._export.serde.serialize import _SERIALIZE_TO_TORCH_DTYPE

from slimline.files.archive import Archive
from slimline.files.strictjson import Malformed

_KINDS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)
DIMENSIONS, SPREAD = 32, 1 << 24


def tensors(archive: Archive, folder: str, prefix: str, config: schema.PayloadConfig) -> dict[str, Tensor]:
    """The tensors of a folder by the names in `config`; those of one member share their memory.

    Parameters
    ----------
    folder, prefix : members are called ``FOLDER/PREFIX0``, ``FOLDER/PREFIX1``, ….

    Raises
    ------
    Malformed, Damaged : a member that is not there, or too short for what is said of it; sizes, strides or an offset
        that reach outside it; a type that slimline does not read.
    """
    stored: dict[str, Tensor] = {}
    loaded: dict[str, Tensor] = {}
    spread = 0
    for name, meta in config.config.items():
        file, about = meta.path_name, meta.tensor_meta
        if not file.startswith(prefix) or not file[len(prefix) :].isdecimal() or about is None:
            raise Malformed(f"keeps {name[:60]!r} in {file[:60]!r}, which is no tensor")
        dtype = _SERIALIZE_TO_TORCH_DTYPE.get(about.dtype)
        if dtype not in (*_KINDS, *_FLOATS):
            raise Malformed(f"holds {name[:60]!r} as {dtype}, which slimline does not read")
        if file not in stored:
            stored[file] = _numbers(archive.read(f"{folder}/{file}"), dtype, file)
        if stored[file].dtype != dtype:
            raise Malformed(f"reads {file} as two types")
        loaded[name] = _view(stored[file], about, name)
        spread += max(0, loaded[name].numel() - stored[file].numel())
        if spread > SPREAD:
            raise Malformed("repeats stored numbers too often")
        if meta.is_param:
            loaded[name] = nn.Parameter(loaded[name], requires_grad=about.requires_grad and dtype in _FLOATS)
    return loaded


def _numbers(content: bytes, dtype: torch.dtype, file: str) -> Tensor:
    if len(content) % dtype.itemsize:
        raise Malformed(f"holds {file} of {len(content):,} bytes, no whole number of {dtype}")
    if not content:
        return torch.empty(0, dtype=dtype)
    if dtype == torch.bool and max(content) > 1:
        raise Malformed(f"holds {file}, whose bytes are no booleans")
    return torch.frombuffer(bytearray(content), dtype=dtype)


def _view(numbers: Tensor, about: schema.TensorMeta, name: str) -> Tensor:
    sizes, strides = (tuple(map(_integer, part)) for part in (about.sizes, about.strides))
    offset = _integer(about.storage_offset)
    count = math.prod(sizes)
    reach = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=False)) + 1 if count else offset
    if len(sizes) != len(strides) or len(sizes) > DIMENSIONS or reach > numbers.numel():
        raise Malformed(f"describes {name[:60]!r} as more numbers than are stored")
    if count > numbers.numel() + SPREAD:
        raise Malformed(f"repeats the numbers of {name[:60]!r} too often")
    return torch.as_strided(numbers, sizes, strides, offset)


def _integer(value: Any) -> int:
    if value.type != "as_int" or not 0 <= value.as_int < 2**48:
        raise Malformed("describes a stored tensor with other sizes than numbers")
    return int(value.as_int)


def members(state: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Tensors as members and, ready for JSON, what is said of each; tied ones are stored once, all of them dense."""
    from torch._export.serde.serialize import _dataclass_to_dict, serialize_tensor_meta

    files: dict[Any, str] = {}
    stored: dict[str, bytes] = {}
    config = {}
    for name, tensor in state.items():
        dense = tensor.detach().cpu().contiguous()
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if place not in files:
            files[place] = f"{prefix}{len(files)}"
            stored[files[place]] = dense.reshape(-1).view(torch.uint8).numpy().tobytes() if dense.numel() else b""
        about = serialize_tensor_meta(torch.empty_like(dense, device="meta"))
        about.device, about.requires_grad = schema.Device("cpu"), tensor.requires_grad
        parameter = isinstance(tensor, nn.Parameter)
        meta = schema.PayloadMeta(files[place], parameter, False, about)
        config[name] = _dataclass_to_dict(meta)  # type: ignore[no-untyped-call]
    return stored, {"config": config}
