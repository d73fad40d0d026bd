"""Where in a ``.keras`` file its arrays lie."""

from __future__ import annotations

import io
from typing import Any

from slimline.basics.errors import require
from slimline.files import archive
from slimline.files.slim.archive import Span


def spans(content: bytes) -> list[Span]:
    """Of each array of the HDF5 file inside, whose numbers lie there as they are."""
    from slimline.frameworks.keras.save import WEIGHTS

    held = archive.read(content, packed=True)
    if WEIGHTS not in held.places:
        return []
    h5py: Any = require("h5py", "keras")
    placed = []

    def visit(name: str, item: Any) -> None:
        offset = item.id.get_offset() if isinstance(item, h5py.Dataset) else None
        if offset is not None and item.dtype.itemsize <= 8:
            placed.append(Span(held.places[WEIGHTS] + offset, tuple(item.shape), item.dtype.itemsize))

    with h5py.File(io.BytesIO(held.read(WEIGHTS)), "r") as file:
        file.visititems(visit)
    return placed
