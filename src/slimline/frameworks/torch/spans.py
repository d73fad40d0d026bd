"""Where in a ``.pt2`` its tensors lie."""

from __future__ import annotations

import math

from torch._export.serde.serialize import _SERIALIZE_TO_TORCH_DTYPE

from slimline.files import archive
from slimline.files.slim.archive import Span
from slimline.frameworks.torch import program

_FOLDERS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")


def spans(content: bytes) -> list[Span]:
    """Of each member that is a tensor; of one that several tensors view, of the numbers without their shape."""
    held = archive.read(content)
    by_place: dict[int, Span] = {}
    for name in held.sizes:
        if not name.endswith(_FOLDERS):
            continue
        for meta in program.weights(held.read(name)).config.values():
            member = f"{name.rpartition('/')[0]}/{meta.path_name}"
            if member not in held.places or meta.tensor_meta is None:
                continue
            at, size = held.places[member], held.sizes[member]
            width = min(_SERIALIZE_TO_TORCH_DTYPE[meta.tensor_meta.dtype].itemsize, 8)  # complex numbers are pairs
            shape = tuple(n.as_int for n in meta.tensor_meta.sizes)
            fits = math.prod(shape) * width == size and at not in by_place
            by_place[at] = Span(at, shape if fits else (size // width,), width)
    return list(by_place.values())
