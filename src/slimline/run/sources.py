"""MODEL and DATA as the command line names them, and the JSON records from which a run loads them again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import TypeAdapter

from slimline.basics.arrays import Example
from slimline.basics.errors import NoExample, SlimlineError, unknown
from slimline.data.datasets import NAMES, Layout, builtin
from slimline.files import array_files
from slimline.files.archive import Damaged
from slimline.files.code import call, entered
from slimline.files.slim.archive import SUFFIX
from slimline.files.strictjson import Malformed
from slimline.frameworks.base import adapter_for, written

if TYPE_CHECKING:
    from slimline.data import Data
    from slimline.model import Model

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")
ARRAYS = ("x_train", "y_train", "x_test", "y_test", "groups_train", "groups_test")
_NAMES = re.compile(rf"{'|'.join(ARRAYS)}|x_(train|test)\.[^/\\]+")
"""Of arrays that are read; ``x_test.mask`` is the input ``mask`` of several."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Attributes
    ----------
    name : a ``.pt2``, ``.keras`` or ``.onnx`` file, or ``package.module:factory``. A factory returns a
        model of a framework, or a pair of it and example inputs.
    weights : a safetensors file for what the factory returns.
    input_shape : of one sample, to make an example from, where the data cannot give one.
    allow_pickle : whether a ``.pt`` or ``.pth`` file, which can run any code, may be opened.
    """

    name: str
    weights: str | None = None
    input_shape: tuple[int, ...] | None = None
    allow_pickle: bool = False

    def record(self) -> dict[str, Any]:
        """As JSON, with absolute paths."""
        absolute = {"name": self.name if ":" in self.name else str(Path(self.name).resolve())}
        if self.weights is not None:
            absolute["weights"] = str(Path(self.weights).resolve())
        return {**asdict(self), **absolute, "folder": str(Path.cwd())}


def load_model(source: ModelSource, data: Callable[[Layout], Data] | None = None) -> Model:
    """The model a source names.

    Parameters
    ----------
    data : gives the data for a layout; its first samples are the example inputs of what needs some and came with none.
    """
    try:
        return _load_model(source, data)
    except NoExample as e:
        raise SlimlineError(
            f"{source.name} needs example inputs: give --input-shape, such as 3,224,224, or --data."
        ) from e


def _load_model(source: ModelSource, data: Callable[[Layout], Data] | None) -> Model:
    from slimline.frameworks.base import adapter_of
    from slimline.model.loading import load

    if ":" not in source.name:
        path = _model_file(source)
        inputs: Example | None = None
        if source.input_shape is not None:
            inputs = _noise(source.input_shape)
        elif path.suffix in PICKLES and data is not None:
            inputs = data("channels_first").example_by_name()
        try:
            return load(path, inputs, allow_pickle=source.allow_pickle)
        except NoExample:
            if inputs is not None or data is None:
                raise
        return load(path, data(adapter_of(path).layout).example_by_name(), allow_pickle=source.allow_pickle)
    built = call(source.name, "model")
    native, example = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
    if source.weights is not None:
        load_weights(native, Path(source.weights))
    if example is not None:
        example = example if isinstance(example, tuple | list | dict) else (example,)
    elif source.input_shape is not None:
        example = _noise(source.input_shape)
    elif data is not None:
        example = data(adapter_for(native).layout).example_by_name()
    return load(native, example)


def _noise(shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    return (np.random.default_rng(0).random((2, *shape), dtype=np.float32),)


def _model_file(source: ModelSource) -> Path:
    path = Path(source.name)
    if path.suffix in PICKLES and not source.allow_pickle:
        raise SlimlineError(
            f"{path} is a pickle, which can run any code when it is opened: pass --allow-pickle if you trust it, or "
            "export it to .pt2."
        )
    if path.suffix not in (*written(), SUFFIX, *PICKLES):
        raise unknown("model format", path.suffix or source.name, [*written(), SUFFIX, "package.module:factory"])
    if not path.is_file():
        raise SlimlineError(f"There is no model file {path}: check the path.")
    if source.weights is not None:
        raise SlimlineError(f"--weights is for a package.module:factory; {path} holds its own.")
    return path


def load_weights(native: Any, path: Path) -> None:
    """Fill a model, by its framework's names of tensors, from a safetensors file, exactly."""
    adapter = adapter_for(native)
    slots = adapter.slots(native)
    try:
        tensors = array_files.safetensors(path)
    except OSError as e:
        raise SlimlineError(f"The weights {path} cannot be read: {e.strerror or e}.") from e
    except Malformed as e:
        raise SlimlineError(f"{path} is no safetensors file that slimline reads: it {e}.") from e
    except MemoryError as e:
        raise SlimlineError(f"There is not enough memory to read the weights {path}: close other programs.") from e
    missing, extra = [n for n in slots if n not in tensors], [n for n in tensors if n not in slots]
    if missing or extra:
        problems = [f"lacks {_few(missing)}"] * bool(missing) + [f"has {_few(extra)} besides"] * bool(extra)
        raise SlimlineError(f"The weights {path} do not fit the model: the file {' and '.join(problems)}.")
    for name, (shape, dtype) in slots.items():
        if shape != tensors[name].shape:
            raise SlimlineError(
                f"The weights {path} do not fit the model: {name} is {tensors[name].shape} in the file and {shape} in "
                "the model."
            )
        if tensors[name].dtype.kind != _kind(dtype):
            raise SlimlineError(
                f"The weights {path} do not fit the model: {name} is {tensors[name].dtype} in the file and {dtype} in "
                "the model; save it as the model's type."
            )
    adapter.fill(native, tensors)


def _kind(dtype: str) -> str:
    """Numpy's letter for the kind of numbers of a framework's dtype."""
    return "f" if "float" in dtype else "c" if "complex" in dtype else "b" if dtype == "bool" else dtype[0]


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@dataclass(frozen=True)
class DataSource:
    """Where data comes from: an ``.npz``, a folder of ``.npy``, ``package.module:factory`` or a built-in name."""

    name: str
    seed: int = 0

    def record(self) -> dict[str, Any]:
        """As JSON, with absolute paths."""
        name = self.name if ":" in self.name or self.name in NAMES else str(Path(self.name).resolve())
        return {"name": name, "seed": self.seed, "folder": str(Path.cwd())}


def load_data(source: DataSource, layout: Layout = "channels_first") -> Data:
    """The data a source names; `layout` is for the built-in ones."""
    from slimline.data import Data

    if source.name in NAMES:
        return builtin(source.name, layout, source.seed)
    if ":" in source.name:
        built = call(source.name, "data")
        if not isinstance(built, Data):
            raise SlimlineError(f"{source.name} returned a {type(built).__name__}: return a slimline.Data.")
        return built
    held = _arrays(Path(source.name))
    inputs = {part: _inputs(held, f"x_{part}") for part in ("train", "test")}
    train, test = (None if x is None else (x, held.get(f"y_{part}")) for part, x in inputs.items())
    groups = {part: held[f"groups_{part}"] for part in ("train", "test") if f"groups_{part}" in held}
    return Data(train=train, test=test, groups=groups, seed=source.seed)


def _inputs(held: Mapping[str, np.ndarray], name: str) -> Any:
    """The array of one input, a dict of those of several by their names, or None."""
    several = {key.partition(".")[2]: array for key, array in held.items() if key.startswith(f"{name}.")}
    if several and name in held:
        raise SlimlineError(f"The data has both {name} and {name}.{next(iter(several))}: name every input, or none.")
    return several or held.get(name)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays, as far as they are there, of an ``.npz`` or a folder of ``.npy``."""
    if not path.exists():
        near = unknown("data", str(path), NAMES) if path.suffix == "" and "/" not in str(path) else None
        raise near or SlimlineError(f"There is no data file {path}: check the path.")
    try:
        if path.is_dir():
            files = {file.stem: file for file in sorted(path.glob("*.npy"))}
            arrays = {name: array_files.npy(file) for name, file in files.items() if _NAMES.fullmatch(name)}
        else:
            arrays = array_files.npz(path, _NAMES)
    except OSError as e:
        raise SlimlineError(f"{path} cannot be read ({e.strerror or e}): check the file.") from e
    except (Malformed, Damaged) as e:
        raise SlimlineError(f"{path} cannot be read as numpy arrays: it {e}; save it with np.savez or np.save.") from e
    except MemoryError as e:
        raise SlimlineError(f"There is not enough memory to read {path}: give a folder of .npy files.") from e
    if not {"x_train", "x_test"} & {name.partition(".")[0] for name in arrays}:
        raise SlimlineError(
            f"{path} has neither x_train nor x_test: name its arrays {', '.join(ARRAYS)}, or of several "
            "inputs x_train.NAME."
        )
    return arrays


def load_pair(
    model: ModelSource, data: DataSource, teacher: ModelSource | None = None
) -> tuple[Model, Data, Model | None]:
    """A model and its data, in the layout the model takes, and the teacher that was named."""
    held: dict[Layout, Data] = {}

    def give(layout: Layout) -> Data:
        if layout not in held:
            held[layout] = load_data(data, layout)
        return held[layout]

    loaded = load_model(model, give)
    return loaded, give(loaded.adapter.layout), None if teacher is None else load_model(teacher, give)


def named_by(sources: Mapping[str, Any], what: str) -> ModelSource | DataSource:
    """The ``"model"``, ``"teacher"`` or ``"data"`` of a run's records, checked."""
    return _read(sources, what)[0]


def load_again(sources: Mapping[str, Any], what: str, data: Data | None = None, at_home: bool = False) -> Any:
    """The ``"model"``, ``"teacher"`` or ``"data"`` of a run's records.

    Parameters
    ----------
    data : the user's, in place of what the records name.
    at_home : import from the folder in which they were first loaded, which a stranger's run must not choose; else from
        the working directory.
    """

    def give(layout: Layout) -> Data:
        if data is not None:
            return data
        source, folder = _read(sources, "data")
        assert isinstance(source, DataSource)
        with entered(folder if at_home else None):
            return load_data(source, layout)

    if what == "data":
        return give
    source, folder = _read(sources, what)
    assert isinstance(source, ModelSource)
    with entered(folder if at_home else None):
        return load_model(source, give)


def _read(sources: Mapping[str, Any], what: str) -> tuple[ModelSource | DataSource, str]:
    """A record, and the folder in which it was made."""
    record = dict(sources[what]) if isinstance(sources.get(what), Mapping) else {}
    folder = record.pop("folder", "")
    kind: type[ModelSource | DataSource] = DataSource if what == "data" else ModelSource
    try:
        if not isinstance(folder, str) or record.keys() - {field.name for field in fields(kind)}:
            raise ValueError("no such field")
        source = TypeAdapter(kind).validate_json(json.dumps(record), strict=True)
    except ValueError as e:
        raise SlimlineError(f"The journal's record of the {what} is damaged: give the {what} itself.") from e
    return source, folder
