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

from slimline.basics.arrays import Example
from slimline.basics.errors import SlimlineError, first_line
from slimline.files import archive, notes, strictjson
from slimline.files.archive import Archive, Damaged
from slimline.files.strictjson import Malformed
from slimline.frameworks.keras import config, stored
from slimline.frameworks.keras.functional import freeze, frozen
from slimline.frameworks.keras.load import example_inputs, load, output_names

Array = np.ndarray
NOTES, FORMATS = "slimline.json", "formats.safetensors"
WEIGHTS = "model.weights.h5"
MEMBERS = ("metadata.json", "config.json", WEIGHTS, NOTES, FORMATS)
EXAMPLE_SIZE = 1 << 28
"""Numbers that an example input may have."""


def save(native: keras.Model, path: Path, example: tuple[Array, ...], metadata: Mapping[str, Any]) -> None:
    """Write the model, the shapes of its example inputs and `metadata` to `path` atomically.

    `metadata` is JSON with arrays among its leaves, which are stored as safetensors.
    The same model and metadata give the same bytes: times and object numbers inside the archive are fixed.
    """
    packed, arrays = notes.pack(metadata)
    own: dict[str, Any] = {"example": [[list(a.shape), str(a.dtype)] for a in example], "metadata": packed}
    if frozen(native):
        own["frozen"] = sorted(frozen(native))
    if list(native.output_names) != output_names(native):
        own["outputs"] = list(native.output_names)
    try:
        with tempfile.TemporaryDirectory(prefix="slimline-") as folder:
            raw = Path(folder) / "model.keras"
            keras.saving.save_model(native, raw)
            members = _plain(raw, json.dumps(own, sort_keys=True, allow_nan=False).encode())
    except (Damaged, Malformed, ValueError) as reason:
        unregistered = config.OWN_LAYER in str(reason)
        mend = (
            "register its class with keras.saving.register_keras_serializable"
            if unregistered
            else "rename or replace that"
        )
        raise SlimlineError(f"The model cannot be saved: it {reason}; {mend}.") from reason
    except OSError as error:
        raise SlimlineError(f"Cannot write {path}: {error.strerror or error}; choose another output path.") from error
    if arrays:
        members[FORMATS] = arrays
    archive.write(path, members)


def _plain(raw: Path, own: bytes) -> dict[str, bytes]:
    """The members of a file that Keras wrote, without its times and object numbers, as `open_` takes them."""
    held = archive.read(raw, packed=True)
    stamp = strictjson.parse(held.read("metadata.json"))
    stamp["date_saved"] = "1980-01-01@00:00:00"
    described = _renumbered(config.checked(strictjson.parse(held.read("config.json"))), {})
    weights = held.read(WEIGHTS)
    stored.count(weights)
    _own(own)
    return {
        "config.json": json.dumps(described).encode(),
        "metadata.json": json.dumps(stamp).encode(),
        WEIGHTS: weights,
        NOTES: own,
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
    path: Path, allow_pickle: bool = False, example: Example | None = None
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
    path: Path, allow_pickle: bool, example: Example | None
) -> tuple[keras.Model, tuple[Array, ...], dict[str, Any]]:
    held = archive.read(path, packed=True)
    own = _own(held.read(NOTES, strictjson.BYTES)) if NOTES in held.sizes else None
    if own is not None:
        own["metadata"] = notes.unpack(own["metadata"], held.read(FORMATS) if FORMATS in held.sizes else b"")
    if allow_pickle:
        for name in held.sizes:
            held.read(name)
        source = _loaded(path, safe=False)
    else:
        source = _checked(held)
    try:
        if example is None or own is not None:
            example = example_inputs(source, None if own is None else own["example"])
        native, example = load(source, example)
        freeze(native, [] if own is None else own.get("frozen", []))
        names = [] if own is None else own.get("outputs", [])
        if names and len(names) != len(native.outputs):
            raise Malformed("names other outputs than it has")
        native.output_names = names or native.output_names
    except (SlimlineError, Malformed, MemoryError):
        raise
    except Exception as reason:  # a model that contradicts itself fails in Keras in many ways
        raise Malformed(f"does not run on its example inputs ({first_line(reason)[:200]})") from reason
    return native, example, {} if own is None else own["metadata"]


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


def _own(content: bytes) -> dict[str, Any]:
    """What slimline wrote beside the model, held against its kinds."""
    own = strictjson.parse(content)
    if not isinstance(own, dict) or own.keys() - {"frozen", "outputs"} != {"example", "metadata"}:
        raise Malformed("holds notes that are not slimline's")
    if not isinstance(own["metadata"], dict) or not isinstance(own["example"], list):
        raise Malformed("holds notes of other types than slimline's")
    for names in (own.get("frozen", []), own.get("outputs", [])):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise Malformed("names frozen weights or outputs that are no names")
        if len(set(names)) < len(names):
            raise Malformed("names a frozen weight or an output twice")
    for entry in own["example"]:
        match entry:
            case [list(shape), str(dtype)] if dtype in config.DTYPES and len(shape) <= 16:
                if any(type(n) is not int or n < 0 for n in shape) or math.prod(shape) > EXAMPLE_SIZE:
                    raise Malformed("holds example inputs of sizes that no input has")
            case _:
                raise Malformed("holds notes of example inputs that are no shape and type")
    return own


def _refusal(path: Path, problem: str) -> str:
    if "Lambda" in problem or "safe_mode" in problem or "unsafe" in problem.lower():
        return (
            f"{path} carries Python code in a Lambda layer, which is not run: replace the layer by a registered one, "
            "or pass --allow-pickle if you trust the file."
        )
    if (
        config.OWN_LAYER in problem
        or "Could not locate" in problem
        or "not registered" in problem
        or "register" in problem
    ):
        return f"{path} uses a layer of your own: import the module that registers it, then load the model in Python."
    return f"{path} is damaged or no .keras file that slimline reads: it {problem}; save the model again with Keras."
