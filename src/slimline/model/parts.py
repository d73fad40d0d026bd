"""A model whose control flow depends on data, compressed by its parts.

Detectors choose boxes in Python, so they cannot be captured whole; their backbones and heads it can. Every
part is an ordinary `Model`. What crosses a part's boundary keeps its size, since the code between the parts counts on
it; all that lies inside can be pruned.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.numpy

from slimline.basics.errors import SlimlineError, unknown
from slimline.files import array_files, strictjson
from slimline.frameworks.base import Parts, adapter_for
from slimline.model.model import Model, is_model

if TYPE_CHECKING:
    pass

MANIFEST, OUTER_STATE = "parts.json", "rest.safetensors"


@dataclass(frozen=True)
class PartedModel:
    """A module with some of its submodules captured. Steps give a new one and leave this one as it was.

    Attributes
    ----------
    native : the user's kind of module, trainable, which runs the parts; on a part it keeps the user's attributes and
        methods, but no other weights than the part's own (as its submodule ``slimline``).
    parts : each part's `Model`, by its name in the user's module.
    """

    native: Any
    parts: Mapping[str, Model]

    @property
    def size(self) -> int:
        """Number of trained numbers, parts and rest together."""
        return _parts_of(self.native).size(self.native)

    def then(self, parts: Mapping[str, Model]) -> PartedModel:
        """The model with these parts in place of its own."""
        merged = {**self.parts, **parts}
        natives = {name: model.native for name, model in merged.items()}
        return PartedModel(_parts_of(self.native).exchange(self.native, natives), merged)

    def save(self, folder: str | Path) -> Path:
        """Write a folder without pickle: a ``.pt2`` per part, the other weights as safetensors, and a manifest.

        The user's class is not in it: ``slimline.load(module, parts=folder)`` puts it together again, `module` being
        one of that class, whatever its weights.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        parts = _parts_of(self.native)
        files = {name: f"part-{i}{model.adapter.suffix}" for i, (name, model) in enumerate(self.parts.items())}
        for name, model in self.parts.items():
            model.save(folder / files[name])
        (folder / OUTER_STATE).write_bytes(safetensors.numpy.save(parts.outer_state(self.native)))
        record = [{**interface, "file": files[interface["name"]]} for interface in parts.records(self.native)]
        (folder / MANIFEST).write_text(json.dumps({"schema": 1, "parts": record}, indent=1))
        return folder


def _parts_of(module: Any) -> Parts:
    parts = adapter_for(module).parts
    if parts is None:
        raise SlimlineError(f"A {type(module).__name__} is not loaded by parts: load it whole.")
    return parts


def load(module: Any, example: Any, parts: Sequence[str] | str | Path) -> PartedModel:
    """Capture submodules of `module`, or put together what `PartedModel.save` wrote.

    Parameters
    ----------
    example : what the module is called with, a tuple for several arguments; anything it takes, nested as it likes.
    parts : names of submodules, dotted, or the folder of a saved model.
    """
    apart = _parts_of(module)
    if isinstance(parts, str | Path):
        return _open(module, Path(parts))
    if not isinstance(parts, Sequence) or not all(isinstance(part, str) for part in parts):
        raise SlimlineError(f"parts is {parts!r}: give names of submodules, such as parts=['backbone'].")
    if not parts:
        raise SlimlineError("No part was named: name submodules, such as parts=['backbone'].")
    if example is None:
        raise SlimlineError("A model is loaded by parts with example_inputs: what the module is called with.")
    args = example if isinstance(example, tuple) else (example,)
    native, captures = apart.take_apart(module, args, tuple(dict.fromkeys(parts)))
    return PartedModel(native, {name: Model(adapter_for(module), *captured) for name, captured in captures.items()})


def _open(module: Any, folder: Path) -> PartedModel:
    adapter, apart = adapter_for(module), _parts_of(module)
    try:
        record = _manifest(strictjson.parse((folder / MANIFEST).read_bytes()), adapter.suffix)
        interfaces = apart.interfaces(record)
        state = array_files.safetensors(folder / OUTER_STATE)
    except (OSError, ValueError, KeyError, TypeError) as reason:
        raise SlimlineError(f"{folder} is not a folder that a model by parts was saved to: check the path.") from reason
    known = apart.names(module)
    parts = {}
    for entry in record:
        if entry["name"] not in known:
            raise unknown(f"part in a {type(module).__name__}", entry["name"], known)
        native, example, metadata = adapter.open(folder / entry["file"], False)
        parts[entry["name"]] = Model.restored(adapter, native, example, metadata)
    whole = apart.put_together(module, interfaces, {name: m.native for name, m in parts.items()})
    apart.load_outer_state(whole, state)
    return PartedModel(whole, parts)


def _manifest(content: Any, suffix: str) -> list[dict[str, Any]]:
    """The entries of a manifest, whose files lie beside it."""
    match content:
        case {"schema": 1, "parts": list(entries)}:
            for i, entry in enumerate(entries):
                if not isinstance(entry["name"], str) or entry["file"] != f"part-{i}{suffix}":
                    raise ValueError("an entry that names no part")
            return entries
    raise ValueError("no manifest of parts")


def is_any_model(name: str, value: Any) -> None:
    """Refuse an argument that is no model, whole or by parts."""
    if not isinstance(value, PartedModel):
        is_model(name, value)
