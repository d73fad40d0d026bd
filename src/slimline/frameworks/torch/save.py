"""`.pt2` files: the exported program, and beside it what slimline knows. No pickle is written, none is run.

What is written goes through the reader first, so that nothing is written that it refuses. See docs/security.md for
what a file may hold.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import operator
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from torch import fx, nn
from torch._export.serde.serialize import ExportedProgramDeserializer, serialize

from slimline.basics.arrays import Example
from slimline.basics.errors import SlimlineError, first_line
from slimline.files import archive, notes, strictjson
from slimline.files.archive import Archive, Damaged
from slimline.files.strictjson import Malformed
from slimline.frameworks.base import Array
from slimline.frameworks.torch import native as natives
from slimline.frameworks.torch import payload, program, prune, read, samples
from slimline.frameworks.torch.native import Native
from slimline.frameworks.torch.rehearse import rehearse
from slimline.recipe.packed import PackedMask

_METADATA, _EXAMPLE = "extra/slimline.json", "extra/slimline_example.safetensors"
_FORMATS = "extra/slimline_formats.safetensors"
_ROOT = "model"
_PLAIN = {"archive_format": b"pt2", "archive_version": b"0", ".data/version": b"6\n", "byteorder": b"little"}
_WEIGHTS, _CONSTANTS = ("data/weights", "weight_"), ("data/constants", "tensor_")
# Tensors are stored by slimline; torch before 2.12 cannot be told so, and what it made of them is dropped.
_WITHOUT_TENSORS: dict[str, Any] = {
    option: False
    for option in ("serialize_state_dict", "serialize_constants")
    if option in inspect.signature(serialize).parameters
}
_MODEL, _SAMPLES = "models/model.json", "data/sample_inputs/model.pt"
_MEMBERS = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/(version|serialization_id)|\.format_version"
    r"|\.storage_alignment|models/model\.json|data/sample_inputs/model\.pt"
    r"|data/weights/(model_weights_config\.json|weight_\d{1,9})"
    r"|data/constants/(model_constants_config\.json|tensor_\d{1,9})"
    r"|extra/slimline_(example|formats)\.safetensors|extra/[A-Za-z0-9_-]{1,100}(\.(json|txt|md|yaml|csv))?"
)


def save(native: Native, path: Path, example: tuple[Array, ...], metadata: Mapping[str, Any]) -> None:
    """Write `native` to a ``.pt2`` that `torch.export.load` reads too, atomically; the same model gives the same bytes.

    `metadata` is JSON with arrays among its leaves; these and the example inputs are stored as safetensors, in
    hexadecimal, as torch takes what is beside a program for text. The bytes depend on nothing but these and the
    versions: no times, paths, addresses or stack traces are in them.

    Raises
    ------
    SlimlineError : a name or an operator that no ``.pt2`` may hold, or a place that cannot be written to.
    """
    exported = natives.export(native, example)
    exported._example_inputs = None  # torch would pickle them
    packed, arrays = notes.pack(metadata)
    own = {
        "metadata": packed,
        "fixed_batch": native.fixed_batch,
        "free": native.free,
        "ties": natives.ties(native),
        "names": _names(native, exported),
    }
    blob = safetensors.numpy.save({f"{i:04d}": np.ascontiguousarray(x) for i, x in enumerate(example)})
    try:
        members = _members(exported)
        text = json.dumps(own, sort_keys=True, allow_nan=False).encode()
        _own(text)
    except (Malformed, ValueError) as reason:
        raise SlimlineError(f"The model cannot be saved: it {reason}; rename or replace that.") from reason
    members |= {_METADATA: text, _EXAMPLE: blob.hex().encode()}
    if arrays:
        members[_FORMATS] = arrays.hex().encode()
    archive.write(path, {f"{_ROOT}/{name}": content for name, content in members.items()})


def _members(exported: torch.export.ExportedProgram) -> dict[str, bytes]:
    """The files of torch's format, without what it would add of this machine."""
    for module in exported.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            paths = [program.escaped(str(path)) for path, *_ in (node.meta.get("nn_module_stack") or {}).values()]
            node.meta["nn_module_stack"] = {f"L{i}": (path, "torch.nn.Module") for i, path in enumerate(paths)}
    artifact = serialize(exported, **_WITHOUT_TENSORS)
    members = dict(_PLAIN)
    members[_MODEL] = program.clean(artifact.exported_program)
    for (folder, prefix), state in ((_WEIGHTS, exported.state_dict), (_CONSTANTS, exported.constants)):
        stored, config = payload.members(state, prefix)
        text = json.dumps(config).encode()
        program.weights(text)
        members[f"{folder}/model_{folder.rpartition('/')[2]}_config.json"] = text
        members |= {f"{folder}/{name}": content for name, content in stored.items()}
    members[_SAMPLES] = b""
    return members


def _names(native: Native, exported: torch.export.ExportedProgram) -> dict[str, str]:
    """Names of activations that exporting changed: new to old. Grids and plans know the old ones."""
    own = {n.name: n for n in native.graph.nodes if n.op == "call_function"}
    taken = {(n.args[0].name, n.args[1]): n.name for n in own.values() if n.target is operator.getitem}
    came_from: dict[str, str] = {}
    for node in exported.graph.nodes:
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
    path: Path, allow_pickle: bool, example: Example | None = None
) -> tuple[Native, tuple[Array, ...], dict[str, Any]]:
    """Read what `save` wrote, or any program of `torch.export.save`: native, example inputs, metadata.

    A pickle (``.pt``, ``.pth``, or one inside a ``.pt2``) can run any code; it is read only with `allow_pickle`.
    `example` is for a file that holds no example inputs: a pickle, or a program of another's.

    Raises
    ------
    SlimlineError : no such file, a damaged one, or one that holds anything which docs/security.md does not list.
    """
    if not path.is_file():
        raise SlimlineError(f"There is no file {path}: check the path.")
    if path.suffix != ".pt2":
        return _open_pickle(path, allow_pickle, example)
    try:
        return _open(path, example)
    except (Malformed, Damaged) as reason:
        if allow_pickle:
            return _open_trusted(path, example)
        hint = "pass --allow-pickle if you trust its author" if "pickle" in str(reason) else "save the model again"
        raise SlimlineError(f"{path} is damaged or not a .pt2 that slimline reads: it {reason}; {hint}.") from reason
    except MemoryError as reason:
        raise SlimlineError(f"There is not enough memory to read {path}: close other programs.") from reason


def _open(path: Path, example: Example | None) -> tuple[Native, tuple[Array, ...], dict[str, Any]]:
    held, root = _checked(path)

    def content(name: str, limit: int = strictjson.BYTES) -> bytes:
        return held.read(root + name, limit)

    description = program.read(content(_MODEL))
    state, constants = (
        payload.tensors(
            held,
            root + folder,
            prefix,
            program.weights(content(f"{folder}/model_{folder.rpartition('/')[2]}_config.json")),
        )
        for folder, prefix in (_WEIGHTS, _CONSTANTS)
    )
    own = _own(content(_METADATA)) if root + _METADATA in held.sizes else None
    stored = None if own is None else _example(held.read(root + _EXAMPLE))
    if own is not None:
        arrays = held.read(root + _FORMATS) if root + _FORMATS in held.sizes else b""
        own["metadata"] = notes.unpack(own["metadata"], _from_hexadecimal(arrays))
    elif example is None and held.sizes.get(root + _SAMPLES):
        try:
            example = samples.read(held.read(root + _SAMPLES))
        except samples.NotPlain as reason:
            raise Malformed("holds a pickle in place of example inputs, which can run any code") from reason
    with _torch_says():
        exported = ExportedProgramDeserializer().deserialize(description, state, constants, None)
    if own is None:
        with _torch_says():
            native, stored = read.load(exported, example)
        rehearse(native, stored)
        return native, stored, {}
    assert stored is not None
    with _torch_says():
        native = natives.from_program(exported, own["fixed_batch"], shared=True, free=own["free"])
        _restore(native, own)
    rehearse(native, stored)
    return native, stored, own["metadata"]


@contextlib.contextmanager
def _torch_says() -> Iterator[None]:
    """What torch raises of a program that contradicts itself, as `Malformed`: it raises all kinds."""
    try:
        yield
    except (SlimlineError, Malformed, MemoryError):
        raise
    except Exception as reason:
        raise Malformed("is no program that torch can put together") from reason


def _checked(path: Path) -> tuple[Archive, str]:
    """The archive and the folder that all its members are in, if they are those of one program."""
    held = archive.read(path)
    roots = {name.partition("/")[0] for name in held.sizes}
    if len(roots) != 1:
        raise Malformed("holds no program of torch.export")
    root = f"{roots.pop()}/"
    for name in held.sizes:
        if not _MEMBERS.fullmatch(name[len(root) :]):
            raise Malformed(f"holds {name[:80]!r}, which can be code or a pickle and is not opened")
    for name, expected in (("archive_format", b"pt2"), ("archive_version", b"0")):
        if held.read(root + name, 16).strip() != expected:
            raise Malformed(f"is of another {name} than torch.export writes")
    if root + "byteorder" in held.sizes and held.read(root + "byteorder", 16) != b"little":
        raise Malformed("holds numbers in another order of bytes")
    return held, root


_FREE = ("none", "batch", "sizes")


def _own(content: bytes) -> dict[str, Any]:
    """What slimline wrote beside the program, held against its kinds."""
    own = strictjson.parse(content)
    kinds = {"metadata": dict, "fixed_batch": (int, type(None)), "free": str, "ties": dict, "names": dict}
    if not isinstance(own, dict) or own.keys() != kinds.keys():
        raise Malformed("holds notes that are not slimline's")
    for key, kind in kinds.items():
        if not isinstance(own[key], kind) or isinstance(own[key], bool):  # type: ignore[arg-type]
            raise Malformed(f"holds a {type(own[key]).__name__} as {key} in slimline's notes")
    if own["free"] not in _FREE or (own["fixed_batch"] is not None and own["fixed_batch"] < 0):
        raise Malformed("holds notes of a size that is not one")
    for alias, first in own["ties"].items():
        program.path(alias), program.path(first)
    for new, old in own["names"].items():
        program.identifier(new), program.identifier(old)
    if len(set(own["names"].values())) != len(own["names"]):
        raise Malformed("gives one name to two values")
    return own


def _from_hexadecimal(content: bytes) -> bytes:
    try:
        return bytes.fromhex(content.decode("ascii"))
    except ValueError as reason:
        raise Malformed("holds arrays that are not written in hexadecimal") from reason


def _example(content: bytes) -> tuple[Array, ...]:
    """Example inputs from hexadecimal safetensors."""
    try:
        arrays = safetensors.numpy.load(_from_hexadecimal(content))
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as reason:
        raise Malformed("holds example inputs that cannot be read") from reason
    if not arrays:
        raise Malformed("holds no example inputs")
    return tuple(arrays[k] for k in sorted(arrays))


def _restore(native: Native, own: Mapping[str, Any]) -> None:
    """Tie what was tied and name activations and their layers as they were."""
    stored = dict(native.named_parameters(remove_duplicate=False))
    for alias, first in own["ties"].items():
        if alias not in stored or first not in stored or stored[alias].shape != stored[first].shape:
            raise Malformed(f"ties {alias[:60]!r} to what it is not")
        owner, _, leaf = alias.rpartition(".")
        target, _, name = first.rpartition(".")
        native.get_submodule(owner)._parameters[leaf] = native.get_submodule(target)._parameters[name]
    readers = {node.target: node for node in native.graph.nodes if node.op == "get_attr"}
    for alias, first in own["ties"].items():
        if alias in readers and first in readers:
            readers[alias].replace_all_uses_with(readers[first])
    for node in native.graph.nodes:
        if layers := node.meta.get("nn_module_stack"):
            node.meta["nn_module_stack"] = {k: (program.unescaped(p), t) for k, (p, t) in layers.items()}
    renamed = {node: own["names"][node.name] for node in native.graph.nodes if node.name in own["names"]}
    for node in native.graph.nodes:
        if node in renamed or node.name in renamed.values():
            node._rename(f"{node.name}_exported")
    for node, name in renamed.items():
        node.name = name
        native.graph._graph_namespace._used_names.add(name)
    native.recompile()


def _open_trusted(path: Path, example: Example | None) -> tuple[Native, tuple[Array, ...], dict[str, Any]]:
    """A program that holds a pickle, of an author whom the user trusts: read by torch, which runs it."""
    try:
        exported = torch.export.load(str(path))
    except Exception as reason:  # a damaged archive fails in torch in many ways
        raise SlimlineError(f"{path} is damaged or not a program of torch.export: save the model again.") from reason
    return (*read.load(exported, example), {})


def _open_pickle(
    path: Path, allow_pickle: bool, example: Example | None
) -> tuple[Native, tuple[Array, ...], dict[str, Any]]:
    if not allow_pickle:
        raise SlimlineError(
            f"{path} is a pickle, which can run any code: give a .pt2 file, or pass --allow-pickle "
            "if you trust its author."
        )
    try:
        module = torch.load(path, map_location="cpu", weights_only=False)
    except (pickle.UnpicklingError, EOFError, RuntimeError, AttributeError, ImportError) as reason:
        raise SlimlineError(f"{path} cannot be unpickled ({first_line(reason)}): save it as .pt2.") from reason
    if not isinstance(module, (nn.Module, torch.export.ExportedProgram)):
        raise SlimlineError(
            f"{path} holds a {type(module).__name__}, not a module: give package.module:factory with --weights."
        )
    masks = {name: PackedMask.of(mask).model_dump(mode="json") for name, mask in prune.masks(module).items()}
    return (*read.load(module, example), {"masks": masks} if masks else {})
