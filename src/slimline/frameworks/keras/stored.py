"""The numbers of a ``.keras`` file: an HDF5 file of plain arrays, held against its size before Keras reads it."""

from __future__ import annotations

import contextlib
import io
import math
import unittest.mock as mock
from collections.abc import Iterator
from typing import Any

import keras

from slimline.basics.errors import require
from slimline.files.strictjson import Malformed

OBJECTS, DEPTH, SLACK = 200_000, 64, 1 << 16
TENSORS = 100_000
"""That Keras may make while it puts a model together."""
FREE_BYTES, RATIO = 256 << 20, 256
"""A value may take so many bytes, or so many times those of weights and inputs if that is more."""


def count(content: bytes) -> int:
    """How many numbers an HDF5 file holds.

    Raises
    ------
    Malformed : no HDF5, or anything in it but groups of arrays that lie in the file as they are: links, arrays of
        other files, compressed or computed ones, arrays of which the file holds fewer numbers than it says.
    """
    h5py: Any = require("h5py", "keras")
    try:
        with h5py.File(io.BytesIO(content), "r") as file:
            numbers = _Walk(h5py, len(content)).group(file, 0)
    except Malformed:
        raise
    except Exception as reason:  # the HDF5 library raises whatever it likes on damaged files
        raise Malformed("holds weights that are no HDF5 file, or a damaged one") from reason
    return numbers


class _Walk:
    def __init__(self, h5py: Any, size: int) -> None:
        self._h5py, self._size = h5py, size
        self._seen: set[Any] = set()

    def group(self, group: Any, level: int) -> int:
        """The numbers in a group and those within it, each array once."""
        numbers = 0
        if level > DEPTH:
            raise Malformed(f"holds weights more than {DEPTH} groups deep")
        for name in group:
            if not isinstance(group.get(name, getlink=True), self._h5py.HardLink):
                raise Malformed(f"holds weights that lie elsewhere, behind the link {name[:60]!r}")
            item = group[name]
            place = self._h5py.h5o.get_info(item.id).addr
            if place in self._seen or len(self._seen) > OBJECTS:
                raise Malformed(f"holds weights that are in two places, or too many, at {name[:60]!r}")
            self._seen.add(place)
            if isinstance(item, self._h5py.Group):
                numbers += self.group(item, level + 1)
            elif isinstance(item, self._h5py.Dataset):
                numbers += self._array(item, name)
            else:
                raise Malformed(f"holds {name[:60]!r}, which is no array")
        return numbers

    def _array(self, item: Any, name: str) -> int:
        if item.external or item.is_virtual:
            raise Malformed(f"holds {name[:60]!r}, whose numbers lie in another file")
        if item.dtype.kind not in "fiub" and item.dtype.name not in ("bfloat16", "void16", "V2"):
            raise Malformed(f"holds {name[:60]!r} of type {item.dtype}, which is no number")
        if item.id.get_create_plist().get_nfilters() or item.chunks is not None:
            raise Malformed(f"holds {name[:60]!r} in a form that Keras does not write")
        if item.shape is None:
            raise Malformed(f"holds {name[:60]!r} without numbers")
        numbers: int = math.prod(item.shape)
        if numbers * item.dtype.itemsize != item.id.get_storage_size() or numbers > self._size:
            raise Malformed(f"holds fewer numbers of {name[:60]!r} than it says")
        return numbers


@contextlib.contextmanager
def no_more_weights(numbers: int) -> Iterator[None]:
    """While it lasts, layers may not make more weights than `numbers`, which a file holds for them, nor all together
    more tensors than `TENSORS`: so a config cannot ask for memory that no file backs."""
    original, total = keras.layers.Layer.add_weight, 0
    make, tensors = keras.KerasTensor.__init__, 0

    def init(self: Any, *args: Any, **named: Any) -> None:
        nonlocal tensors
        tensors += 1
        if tensors > TENSORS:
            raise Malformed(f"describes more than {TENSORS:,} tensors")
        make(self, *args, **named)

    def add_weight(self: Any, shape: Any = None, *args: Any, **named: Any) -> Any:
        nonlocal total
        sizes = (shape,) if isinstance(shape, int) else tuple(shape or ())
        total += math.prod(n for n in sizes if isinstance(n, int))
        if total > numbers + SLACK or any(isinstance(n, int) and n < 0 for n in sizes):
            raise Malformed(f"describes a layer {self.name[:60]!r} with more weights than it holds")
        return original(self, shape, *args, **named)

    with (
        mock.patch.object(keras.layers.Layer, "add_weight", add_weight),
        mock.patch.object(keras.KerasTensor, "__init__", init),
    ):
        yield


def check_sizes(model: Any, numbers: int) -> None:
    """Refuse a model in which a value of two samples takes more memory than an honest file's would.

    Raises
    ------
    Malformed : by that value's layer.
    """

    def size(tensor: Any) -> int:
        return math.prod(2 if n is None else int(n) for n in tensor.shape) * 8

    limit = max(FREE_BYTES, RATIO * 8 * numbers)
    for tensor in keras.tree.flatten([model.inputs, model.outputs]):
        _check_size(size(tensor), limit, "an input or output")
    for operation in model.operations if hasattr(model, "operations") else model.layers:
        for node in operation._inbound_nodes:
            for tensor in node.output_tensors:
                _check_size(size(tensor), limit, operation.name)
        if isinstance(operation, keras.Model):
            check_sizes(operation, numbers)


def _check_size(size: int, limit: int, name: str) -> None:
    if size > limit:
        raise Malformed(f"makes a value of {size:,} bytes at {name[:60]}")
