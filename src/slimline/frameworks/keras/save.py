"""Files of the Keras adapter: ``.keras`` archives that plain Keras loads too, with slimline's notes inside."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from slimline.basics.errors import SlimlineError, first_line
from slimline.files import archive, strictjson
from slimline.files.archive import Archive, Damaged
from slimline.files.strictjson import Malformed
from slimline.frameworks.keras import config, stored
from slimline.frameworks.keras.functional import freeze, frozen
from slimline.frameworks.keras.load import example_inputs, load

Array = np.ndarray
NOTES = "slimline.json"
WEIGHTS = "model.weights.h5"
MEMBERS = ("metadata.json", "config.json", WEIGHTS, NOTES)
EXAMPLE_SIZE = 1 << 28
"""Numbers that an example input may have."""


def save(native: keras.Model, path: Path, example: tuple[Array, ...], metadata: Mapping[str, Any]) -> None:
    """Write the model, the shapes of its example inputs and `metadata` to `path` atomically.

    The same model and metadata give the same bytes: times and object numbers inside the archive are fixed.
    """
    notes: dict[str, Any] = {"example": [[list(a.shape), str(a.dtype)] for a in example], "metadata": dict(metadata)}
    if frozen(native):
        notes["frozen"] = sorted(frozen(native))
    try:
        with tempfile.TemporaryDirectory(prefix="slimline-") as folder:
            raw = Path(folder) / "model.keras"
            keras.saving.save_model(native, raw)
            members = _plain(raw, json.dumps(notes, sort_keys=True, allow_nan=False).encode())
    except (Damaged, Malformed, ValueError) as reason:
        raise SlimlineError(f"The model cannot be saved: it {reason}; rename or replace that.") from reason
    except OSError as error:
        raise SlimlineError(f"Cannot write {path}: {error.strerror or error}; choose another output path.") from error
    archive.write(path, members)


def _plain(raw: Path, notes: bytes) -> dict[str, bytes]:
    """The members of a file that Keras wrote, without its times and object numbers, as `open_` takes them."""
    held = archive.read(raw, packed=True)
    stamp = strictjson.parse(held.read("metadata.json"))
    stamp["date_saved"] = "1980-01-01@00:00:00"
    described = _renumbered(config.checked(strictjson.parse(held.read("config.json"))), {})
    weights = held.read(WEIGHTS)
    stored.count(weights)
    _notes(notes)
    return {
        "config.json": json.dumps(described).encode(),
        "metadata.json": json.dumps(stamp).encode(),
        WEIGHTS: weights,
        NOTES: notes,
    }


def _renumbered(config: Any, ids: dict[int, int]) -> Any:
    """A config whose shared objects are numbered in order and not by where they lay in memory."""
    if isinstance(config, list):
        return [_renumbered(item, ids) for item in config]
    if not isinstance(config, dict):
        return config
    return {
        key: ids.setdefault(item, len(ids)) if key == "shared_object_id" else _renumbered(item, ids)
        for key, item in config.items()
    }


def open_(
    path: Path, allow_pickle: bool = False, example: tuple[Array, ...] | None = None
) -> tuple[keras.Model, tuple[Array, ...], dict[str, Any]]:
    """The canonical model, example inputs and metadata of a ``.keras`` file, slimline's own or Keras'.

    Parameters
    ----------
    allow_pickle : also open a file that holds what docs/security.md does not list, such as code in a Lambda layer.
    example : inputs for a file that holds none.

    Raises
    ------
    SlimlineError : no such file, no ``.keras`` file, a damaged one, or one that needs foreign code.
    """
    from slimline.frameworks.keras import fakequant, fusednorm, gridded, weight  # noqa: F401  register their layers

    if not path.is_file():
        raise SlimlineError(f"There is no file {path}: check the path.")
    try:
        return _open(path, allow_pickle, example)
    except (Damaged, Malformed) as reason:
        raise SlimlineError(_refusal(path, str(reason))) from reason
    except MemoryError as reason:
        raise SlimlineError(f"There is not enough memory to read {path}: close other programs.") from reason


def _open(
    path: Path, allow_pickle: bool, example: tuple[Array, ...] | None
) -> tuple[keras.Model, tuple[Array, ...], dict[str, Any]]:
    held = archive.read(path, packed=True)
    notes = _notes(held.read(NOTES, strictjson.BYTES)) if NOTES in held.sizes else None
    if allow_pickle:
        for name in held.sizes:
            held.read(name)
        source = _loaded(path, safe=False)
    else:
        source = _checked(held)
    try:
        if example is None or notes is not None:
            example = example_inputs(source, None if notes is None else notes["example"])
        native, example = load(source, example)
        freeze(native, [] if notes is None else notes.get("frozen", []))
    except (SlimlineError, Malformed, MemoryError):
        raise
    except Exception as reason:  # a model that contradicts itself fails in Keras in many ways
        raise Malformed(f"does not run on its example inputs ({first_line(reason)[:200]})") from reason
    return native, example, {} if notes is None else notes["metadata"]


def _checked(held: Archive) -> keras.Model:
    """The model of an archive, from a copy in which only what was checked is left."""
    for name in held.sizes:
        if name not in MEMBERS:
            raise Damaged(f"holds {name[:80]!r}, which is no part of a model")
    described = config.checked(strictjson.parse(held.read("config.json", strictjson.BYTES)))
    version = strictjson.parse(held.read("metadata.json", 10_000))
    if not isinstance(version, dict) or not all(isinstance(v, (str, int)) for v in version.values()):
        raise Malformed("holds metadata that is not Keras'")
    weights = held.read(WEIGHTS)
    numbers = stored.count(weights)
    with tempfile.TemporaryDirectory(prefix="slimline-") as folder:
        copy = Path(folder) / "model.keras"
        members = {"metadata.json": json.dumps(version), "config.json": json.dumps(described)}
        archive.write(copy, {**{name: text.encode() for name, text in members.items()}, WEIGHTS: weights})
        with stored.no_more_weights(numbers):
            model = _loaded(copy, safe=True)
    stored.check_sizes(model, numbers)
    return model


def _loaded(path: Path, safe: bool) -> keras.Model:
    try:
        model = keras.saving.load_model(path, compile=False, safe_mode=safe)
    except MemoryError:
        raise
    except Exception as reason:  # a config that contradicts itself fails in Keras in many ways
        raise Malformed(f"cannot be loaded by Keras ({first_line(reason)[:200]})") from reason
    if not isinstance(model, keras.Model):
        raise Malformed("holds no model")
    return model


def _notes(content: bytes) -> dict[str, Any]:
    """What slimline wrote beside the model, held against its kinds."""
    notes = strictjson.parse(content)
    if not isinstance(notes, dict) or notes.keys() - {"frozen"} != {"example", "metadata"}:
        raise Malformed("holds notes that are not slimline's")
    if not isinstance(notes["metadata"], dict) or not isinstance(notes["example"], list):
        raise Malformed("holds notes of other types than slimline's")
    names = notes.get("frozen", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise Malformed("names frozen weights that are no names")
    for entry in notes["example"]:
        match entry:
            case [list(shape), str(dtype)] if dtype in config.DTYPES and len(shape) <= 16:
                if any(type(n) is not int or n < 0 for n in shape) or math.prod(shape) > EXAMPLE_SIZE:
                    raise Malformed("holds example inputs of sizes that no input has")
            case _:
                raise Malformed("holds notes of example inputs that are no shape and type")
    return notes


def _refusal(path: Path, problem: str) -> str:
    if "Lambda" in problem or "safe_mode" in problem or "unsafe" in problem.lower():
        return (
            f"{path} carries Python code in a Lambda layer, which is not run: replace the layer by a registered one, "
            "or pass --allow-pickle if you trust the file."
        )
    if (
        "layer of your own" in problem
        or "Could not locate" in problem
        or "not registered" in problem
        or "register" in problem
    ):
        return f"{path} uses a layer of your own: import the module that registers it, then load the model in Python."
    return f"{path} is damaged or no .keras file that slimline reads: it {problem}; save the model again with Keras."
