"""Networks from wherever they are: objects of a framework, files, modules by parts."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from slimline.basics.arrays import examples
from slimline.basics.errors import SlimlineError, unknown
from slimline.files.slim import archive
from slimline.frameworks.base import adapter_for, adapter_of, written
from slimline.graph.quantization import Quantization
from slimline.model import parts as parted
from slimline.model.model import Model
from slimline.model.parts import PartedModel


@overload
def load(
    source: Any,
    example_inputs: Any = None,
    *,
    allow_pickle: bool = False,
    dynamic: bool = False,
    parts: None = None,
) -> Model: ...
@overload
def load(source: Any, example_inputs: Any = None, *, parts: Sequence[str] | str | Path) -> PartedModel: ...
def load(
    source: Any,
    example_inputs: Any = None,
    *,
    allow_pickle: bool = False,
    dynamic: bool = False,
    parts: Sequence[str] | str | Path | None = None,
) -> Model | PartedModel:
    """Read a network.

    Parameters
    ----------
    source : a `torch.nn.Module` or ExportedProgram, a `keras.Model`, an `onnx.ModelProto`, the path of a
        ``.pt2``, ``.keras`` or ``.onnx`` file or of a ``.slim`` archive of one, or a `Model`, which is returned as it
        is. The user's object is never changed.
    example_inputs : arrays or tensors ``(batch, …)``, one per input, or a dict of them by the inputs' names; needed for
        a torch module or a pickle of one.
    allow_pickle : whether a ``.pt`` or ``.pth`` file, which can run any code, may be opened.
    dynamic : for a torch module, whether every size of its inputs that it leaves free, such as the length of a sequence
        or the size of an image, stays so in files and artifacts; by default only the batch does. What else brings a
        model says that itself: a ``.pt2`` by its dynamic shapes, Keras by sizes of None, ONNX by names in place of
        sizes; of an `onnx.ModelProto` it asks that some size besides the batch is free.
    parts : for a torch module whose control flow depends on data: names of the submodules to compress, captured on
        what they receive when the module is called with `example_inputs` (a tuple for several arguments); or the
        folder that `PartedModel.save` wrote. See `slimline.model.parts`.

    Raises
    ------
    SlimlineError
        For what cannot be read, NaN or infinite weights, or a model without weights.
    """
    if parts is not None:
        return parted.load(source, example_inputs, parts)
    if isinstance(source, Model):
        return source
    if isinstance(source, PartedModel):
        raise SlimlineError("A model by parts is pruned by slimline.plan and slimline.apply: compress its parts else.")
    inputs = None
    if example_inputs is not None:
        inputs = examples(example_inputs, source)
    if isinstance(source, str | Path):
        path = Path(source)
        if not path.is_file():
            raise SlimlineError(f"There is no model file {path}: check the path.")
        if path.suffix == archive.SUFFIX:
            return _unpacked(path, example_inputs)
        adapter = adapter_of(path)
        native, example, metadata = adapter.open(path, allow_pickle, inputs)
        return _checked(Model.restored(adapter, native, example, metadata))
    adapter = adapter_for(source)
    native, example = adapter.load(source, inputs, dynamic)
    return _checked(Model(adapter, native, example, masks=adapter.masks(source)))


def _unpacked(path: Path, example_inputs: Any) -> Model:
    suffix, content = packed_file(path)
    with tempfile.TemporaryDirectory(prefix="slimline-") as folder:
        file = Path(folder) / f"{path.stem}{suffix}"
        file.write_bytes(content)
        return load(file, example_inputs)


def packed_file(path: Path) -> tuple[str, bytes]:
    """The suffix and the bytes of the model file that an archive holds.

    Raises
    ------
    SlimlineError : no archive, a damaged one, or one that holds no model file.
    """
    header, content = archive.unpack(archive.read(path), str(path))
    if header.suffix not in written():
        raise SlimlineError(
            f"{path} holds a {header.suffix} file, which no framework here saves models in: pack a model of "
            f"{', '.join(written())}."
        )
    return header.suffix, content


def _checked(model: Model) -> Model:
    stored = model.parameters()
    if not stored:
        raise SlimlineError("The model has no weights: there is nothing to compress.")
    for name, array in stored.items():
        if array.dtype.kind != "f" or np.isfinite(array).all():
            continue
        # A mask that attention adds holds minus infinity, and a bound that was never set is one infinite number.
        meant = np.isinf(array) if array.ndim == 0 else np.isneginf(array)
        if name in model.graph.trainable or not (np.isfinite(array) | meant).all():
            raise SlimlineError(f"The weights {name} hold NaN or infinity: train or load the model anew.")
    if model.quantization is not None:
        _check_formats(model, model.quantization)
    return model


def _check_formats(model: Model, quantization: Quantization) -> None:
    for formats in (quantization.activations, quantization.weights):
        for name, each in formats.items():
            if name not in model.graph.values:
                raise unknown("value with a format called", name, model.graph.values)
            if not each.fits(model.graph.values[name].shape):
                raise SlimlineError(f"The format of {name} does not fit it: quantize the model again.")
    different = model.adapter.format_mismatches(model.native, quantization)
    if different:
        # A weight may have been rounded once and for all: then its numbers are those of its format, and nothing rounds.
        stored, formats = model.parameters(), quantization.weights
        weights = [name for name in different if name in formats and name in stored]
        baked = {name for name in weights if np.array_equal(formats[name].round(stored[name]), stored[name])}
        others = {name: each for name, each in formats.items() if name not in baked}
        different = model.adapter.format_mismatches(model.native, replace(quantization, weights=others))
    if different:
        raise SlimlineError(
            f"The network does not round {different[0]} to the format that its notes hold, as the file was altered: "
            "save the model again, or quantize the float model anew."
        )
