"""Models in ``.slim`` archives: as small as their numbers allow, and back."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from slimline.basics import arguments
from slimline.basics.arguments import takes
from slimline.basics.errors import SlimlineError
from slimline.files.atomic import atomic_write
from slimline.files.slim import archive
from slimline.files.slim.arrays import Grid
from slimline.graph.edits import PutTensors
from slimline.methods.formats import BlockFloat, Format, IntegerGrid, Levels
from slimline.model.loading import load, packed_file
from slimline.model.model import Model


@dataclass(frozen=True)
class Packed:
    """An archive.

    Attributes
    ----------
    path : of it.
    model_bytes, packed_bytes : sizes of the model file that it gives, and its own.
    """

    path: Path
    model_bytes: int
    packed_bytes: int

    @property
    def ratio(self) -> float:
        """How many times smaller it is than the model file."""
        return self.model_bytes / self.packed_bytes

    def __str__(self) -> str:
        smaller = f"{self.ratio:.1f}× smaller than the model's {self.model_bytes:,}"
        return f"{self.path}: {self.packed_bytes:,} bytes, {smaller}"


def _is_source(name: str, value: object) -> None:
    if not isinstance(value, Model):
        arguments.path(name, value)


@takes(source=_is_source, output=arguments.path)
def pack(source: Model | str | Path, output: str | Path) -> Packed:
    """Write a model, saved and with its arrays entropy-coded, to a ``.slim`` archive.

    The archive gives back the saved model byte for byte, with one exception that changes none of its answers: the
    weights of a quantized model, which it stores in float and rounds where they are read, are rounded before it is
    saved.

    Parameters
    ----------
    source : a model, or the path of a file that `Model.save` wrote or any other that `load` reads without a flag.
    output : ends in ``.slim``.

    Raises
    ------
    SlimlineError : another suffix, what cannot be loaded, or a place that cannot be written to.
    """
    path = Path(output)
    if path.suffix != archive.SUFFIX:
        raise SlimlineError(f"An archive ends in {archive.SUFFIX}, not {path.suffix or path.name!r}: name it so.")
    model = load(source)
    formats = {} if model.quantization is None else model.quantization.weights
    if isinstance(source, Model) or formats or Path(source).suffix == archive.SUFFIX:
        content, suffix = _saved(_rounded(model, formats)), model.adapter.suffix
    else:
        content, suffix = Path(source).read_bytes(), Path(source).suffix
    grids = _grids(model, formats)
    spans = [replace(span, grids=grids.get(span.shape, [])) for span in model.adapter.spans(content)]
    packed = archive.pack(content, suffix, spans)
    atomic_write(path, packed)
    return Packed(path, len(content), len(packed))


@takes(source=arguments.path, output=arguments.optional(arguments.path))
def unpack(source: str | Path, output: str | Path | None = None) -> Path:
    """Write the model file that an archive holds, as it was packed; the path of it.

    Parameters
    ----------
    output : a folder, in which it is called like the archive, or a path with the model's suffix; by default beside the
        archive.

    Raises
    ------
    SlimlineError : no archive, or one that is damaged or not what slimline wrote; a place that cannot be written to.
    """
    source = Path(source)
    suffix, content = packed_file(source)
    path = source.parent if output is None else Path(output)
    if path.suffix != suffix:
        path = path / f"{source.stem}{suffix}"
    return atomic_write(path, content)


def _rounded(model: Model, formats: Mapping[str, Format]) -> Model:
    """The model with weights that are already what their formats make of them."""
    if not formats:
        return model
    stored = model.parameters()
    weights = {name: each.round(stored[name]) for name, each in formats.items()}
    return replace(model, native=model.edit(PutTensors(weights)))


def _saved(model: Model) -> bytes:
    with tempfile.TemporaryDirectory(prefix="slimline-") as folder:
        return model.save(Path(folder) / f"model{model.adapter.suffix}").read_bytes()


def _grids(model: Model, formats: Mapping[str, Format]) -> dict[tuple[int, ...], list[Grid]]:
    """By shape the grids that arrays of it may lie on."""
    shapes: dict[tuple[int, ...], list[Grid]] = {}
    for name, each in formats.items():
        shape = model.graph.values[name].shape
        grid = _grid(each, shape)
        if grid is not None:
            shapes.setdefault(shape, []).append(grid)
    return shapes


def _grid(each: Format, shape: Sequence[int]) -> Grid | None:
    """The grid of all numbers of a format, where scales lie along rows or columns of a tensor of `shape`."""
    each = (each.grid or each) if isinstance(each, Levels) else each
    if isinstance(each, BlockFloat):
        scale = each.scale * np.float32(each.unscaled.decode(np.arange(2))[1])  # its least number divides the others
    elif isinstance(each, IntegerGrid) and not np.any(each.zero):
        scale = each.scale
    else:
        return None
    if each.per_tensor or each.axis in (0, len(shape) - 1):
        axis = each.axis if not each.axis else -1
        return Grid(axis, scale.ravel())
    divided = [d for d, block in enumerate(each.blocks) if block is not None]
    if divided == [0, 1] and each.blocks[0] == 1:
        return Grid(0, scale.ravel(), int(each.blocks[1] or 1) * math.prod(shape[2:]))
    if divided == [0, 1] and each.blocks[1] == 1 and len(shape) == 2:
        return Grid(-1, scale.T.ravel(), each.blocks[0])
    return None
