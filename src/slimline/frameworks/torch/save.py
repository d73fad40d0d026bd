"""`.pt2` files: the exported program, and beside it what slimline knows. No pickle is written, none is run."""

from __future__ import annotations

import io
import json
import operator
import os
import pickle
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from torch import nn

from slimline.errors import SlimlineError
from slimline.frameworks.base import Array
from slimline.frameworks.torch import native as natives
from slimline.frameworks.torch import prune, read
from slimline.frameworks.torch.native import Native
from slimline.recipe.sparse import PackedMask

_METADATA = "slimline.json"
_EXAMPLE = "slimline_example.safetensors"


def save(native: Native, path: Path, example: tuple[Array, ...], metadata: Mapping[str, Any]) -> None:
    """Write `native` to a ``.pt2`` that `torch.export.load` reads too, atomically; the same model gives the same bytes.

    `metadata` is JSON; the example inputs are stored as safetensors.
    """
    program = natives.export(native, example)
    program._example_inputs = None  # torch would pickle them
    own = {
        "metadata": dict(metadata),
        "fixed_batch": native.fixed_batch,
        "free": native.free,
        "ties": natives.ties(native),
        "names": _names(native, program),
    }
    blob = safetensors.numpy.save({f"{i:04d}": np.ascontiguousarray(x) for i, x in enumerate(example)})
    extra = {_METADATA: json.dumps(own, sort_keys=True), _EXAMPLE: blob.hex()}
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files=extra)
    _write(path, buffer.getbuffer())


def _write(path: Path, content: memoryview) -> None:
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as reason:
        raise SlimlineError(
            f"Cannot write {path} ({reason.strerror}): choose a place that can be written to."
        ) from reason


def _names(native: Native, program: torch.export.ExportedProgram) -> dict[str, str]:
    """Names of activations that exporting changed: new to old. Grids and plans know the old ones."""
    own = {n.name: n for n in native.graph.nodes if n.op == "call_function"}
    taken = {(n.args[0].name, n.args[1]): n.name for n in own.values() if n.target is operator.getitem}
    came_from: dict[str, str] = {}
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        source = node.meta.get("from_node")
        old: str | None = source[-1].name if source else None
        if node.target is operator.getitem:  # torch says that it came from the operator whose output it takes
            old = taken.get((came_from.get(node.args[0].name), node.args[1]))
        if old is not None and old in own and own[old].target == node.target and old not in came_from.values():
            came_from[node.name] = old
    return {new: old for new, old in came_from.items() if new != old}


def open_(
    path: Path, allow_pickle: bool, example: tuple[Array, ...] | None = None
) -> tuple[Native, tuple[Array, ...], dict[str, Any]]:
    """Read what `save` wrote, or any program of `torch.export.save`: native, example inputs, metadata.

    A pickle (``.pt``, ``.pth``, or one inside a ``.pt2``) can run any code; it is read only with `allow_pickle`.
    `example` is for a file that holds no example inputs: a pickle, or a program of another's.
    """
    if not path.is_file():
        raise SlimlineError(f"There is no file {path}: check the path.")
    if path.suffix != ".pt2":
        return _open_pickle(path, allow_pickle, example)
    extra = {_METADATA: "", _EXAMPLE: ""}
    stored = _check(path, allow_pickle)
    try:
        program = torch.export.load(str(path), extra_files=extra)
    except Exception as reason:  # a damaged archive fails in torch in many ways
        raise SlimlineError(f"{path} is damaged or not a program of torch.export: save the model again.") from reason
    if not extra[_METADATA]:
        return (*read.load(program, stored if example is None else example), {})
    own = json.loads(extra[_METADATA])
    arrays = safetensors.numpy.load(bytes.fromhex(extra[_EXAMPLE]))
    native = natives.from_program(program, own["fixed_batch"], shared=True, free=own.get("free", "batch"))
    _restore(native, own)
    return native, tuple(arrays[k] for k in sorted(arrays)), own["metadata"]


def _restore(native: Native, own: Mapping[str, Any]) -> None:
    """Tie what was tied and name activations as they were."""
    for alias, first in own["ties"].items():
        owner, _, leaf = alias.rpartition(".")
        target, _, name = first.rpartition(".")
        native.get_submodule(owner)._parameters[leaf] = native.get_submodule(target)._parameters[name]
    readers = {node.target: node for node in native.graph.nodes if node.op == "get_attr"}
    for alias, first in own["ties"].items():
        if alias in readers and first in readers:
            readers[alias].replace_all_uses_with(readers[first])
    wanted = {node: own["names"][node.name] for node in native.graph.nodes if node.name in own["names"]}
    for node in native.graph.nodes:
        if node in wanted or node.name in wanted.values():
            node._rename(f"{node.name}_exported")
    for node, name in wanted.items():
        node.name = name
        native.graph._graph_namespace._used_names.add(name)
    native.recompile()


def _check(path: Path, allow_pickle: bool) -> tuple[Array, ...] | None:
    """Refuse what is no archive, or one in which torch would run a pickle; the example inputs of a foreign file."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if not any(name.endswith("archive_format") for name in names):
                raise zipfile.BadZipFile
            configs = [n for n in names if n.endswith(("_weights_config.json", "_constants_config.json"))]
            pickled = any(b'"use_pickle": true' in archive.read(n).replace(b'":true', b'": true') for n in configs)
            pickled |= any("/custom_obj" in n or n.endswith((".pkl", "serialized_state_dict.pt")) for n in names)
            samples = [held for n in names if "/sample_inputs/" in n and (held := archive.read(n))]
    except (zipfile.BadZipFile, OSError) as reason:
        raise SlimlineError(f"{path} is damaged or not a .pt2 file: save the model again.") from reason
    example = None
    for sample in samples:
        try:
            args, kwargs = torch.load(io.BytesIO(sample), weights_only=True)
        except pickle.UnpicklingError:
            pickled = True
        else:
            if not kwargs and all(isinstance(x, torch.Tensor) for x in args):
                example = tuple(x.detach().numpy() for x in args)
    if pickled and not allow_pickle:
        raise SlimlineError(
            f"{path} holds a pickle, which can run any code: pass --allow-pickle if you trust its author."
        )
    return example


def _open_pickle(
    path: Path, allow_pickle: bool, example: tuple[Array, ...] | None
) -> tuple[Native, tuple[Array, ...], dict[str, Any]]:
    if not allow_pickle:
        raise SlimlineError(
            f"{path} is a pickle, which can run any code: give a .pt2 file, or pass --allow-pickle "
            "if you trust its author."
        )
    try:
        module = torch.load(path, map_location="cpu", weights_only=False)
    except (pickle.UnpicklingError, EOFError, RuntimeError, AttributeError, ImportError) as reason:
        raise SlimlineError(f"{path} cannot be unpickled ({str(reason).splitlines()[0]}): save it as .pt2.") from reason
    if not isinstance(module, (nn.Module, torch.export.ExportedProgram)):
        raise SlimlineError(
            f"{path} holds a {type(module).__name__}, not a module: give package.module:factory with --weights."
        )
    masks = {name: PackedMask.of(mask).model_dump(mode="json") for name, mask in prune.masks(module).items()}
    return (*read.load(module, example), {"masks": masks} if masks else {})
