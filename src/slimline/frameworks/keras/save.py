"""Files of the Keras adapter: ``.keras`` archives that plain Keras loads too, with slimline's notes inside."""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from slimline.errors import SlimlineError
from slimline.frameworks.keras.load import example_inputs, load

Array = np.ndarray
NOTES = "slimline.json"
EPOCH = (1980, 1, 1, 0, 0, 0)


def save(native: keras.Model, path: Path, example: tuple[Array, ...], metadata: Mapping[str, Any]) -> None:
    """Write the model, the shapes of its example inputs and `metadata` to `path` atomically.

    The same model and metadata give the same bytes: times and object numbers inside the archive are fixed.
    """
    notes = {"example": [[list(a.shape), str(a.dtype)] for a in example], "metadata": dict(metadata)}
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            raw, final = Path(folder) / "model.keras", Path(folder) / "final.keras"
            keras.saving.save_model(native, raw)
            _rewrite(raw, final, json.dumps(notes, sort_keys=True).encode())
            final.replace(path)
    except OSError as error:
        raise SlimlineError(f"Cannot write {path}: {error.strerror or error}; choose another output path.") from error


def _rewrite(raw: Path, final: Path, notes: bytes) -> None:
    with zipfile.ZipFile(raw) as source, zipfile.ZipFile(final, "w", zipfile.ZIP_STORED) as target:
        contents = {name: source.read(name) for name in source.namelist()}
        stamp = json.loads(contents["metadata.json"])
        stamp["date_saved"] = "1980-01-01@00:00:00"
        config = _renumbered(json.loads(contents["config.json"]), {})
        contents |= {
            "config.json": json.dumps(config).encode(),
            "metadata.json": json.dumps(stamp).encode(),
            NOTES: notes,
        }
        for name in sorted(contents):
            target.writestr(zipfile.ZipInfo(name, EPOCH), contents[name])


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
    allow_pickle : also run the Python code that a file's Lambda layers carry.
    example : inputs for a file that holds none.

    Raises
    ------
    SlimlineError : no such file, no ``.keras`` file, a damaged one, or one that needs foreign code.
    """
    from slimline.frameworks.keras import fakequant  # noqa: F401  registers the layers of quantized models

    if not path.is_file():
        raise SlimlineError(f"There is no file {path}: check the path.")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            notes = json.loads(archive.read(NOTES)) if NOTES in archive.namelist() else {}
        if damaged is not None:
            raise zipfile.BadZipFile(damaged)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise SlimlineError(f"{path} is no .keras file or is damaged: save the model again.") from error
    try:
        source = keras.saving.load_model(path, compile=False, safe_mode=not allow_pickle)
    except (ValueError, TypeError, KeyError, OSError, ImportError) as error:
        raise SlimlineError(_refusal(path, error)) from error
    shapes = notes.get("example")
    example = example if shapes is None else example_inputs(source, shapes)
    native, example = load(source, example)
    return native, example, dict(notes.get("metadata", {}))


def _refusal(path: Path, error: Exception) -> str:
    said = str(error)
    if "Lambda" in said or "safe_mode" in said or "unsafe" in said.lower():
        return (
            f"{path} carries Python code in a Lambda layer, which is not run: replace the layer by a registered one, "
            "or pass --allow-pickle if you trust the file."
        )
    if "Could not locate" in said or "not registered" in said or "register" in said:
        return f"{path} uses a layer of your own: import the module that registers it, then load the model in Python."
    first = said.strip().splitlines()[0].rstrip(".") if said.strip() else type(error).__name__
    return f"{path} cannot be loaded by Keras ({first}): save the model again with this version of Keras."
