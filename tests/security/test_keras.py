"""Crafted ``.keras`` files: none runs code, each is refused in one sentence, and benign ones load."""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.frameworks.keras import config, stored

import keras  # isort: skip
from keras import layers as L  # isort: skip

Members = dict[str, bytes]
H5 = "model.weights.h5"


@pytest.fixture(scope="module")
def benign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("benign") / "model.keras"
    x = keras.Input((8,), name="x")
    y = L.Dense(4, activation="gelu", name="first")(x) * 2.0
    keras.Model(x, L.Dense(2, name="last")(y)).save(path)
    return path


def _members(path: Path) -> Members:
    with zipfile.ZipFile(path) as archive:
        return {n: archive.read(n) for n in archive.namelist()}


def _write(path: Path, held: Members) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in held.items():
            archive.writestr(name, content)


def _config(change: Callable[[Any], Any]) -> Any:
    def apply(held: Members) -> None:
        value = json.loads(held["config.json"])
        change(value)
        held["config.json"] = json.dumps(value).encode()

    return apply


def _layer(name: str, **entry: Any) -> Any:
    return _config(lambda c: next(x for x in c["config"]["layers"] if x["name"] == name)["config"].update(entry))


def _object(module: str | None, name: str, registered: str | None = None, **inner: Any) -> Any:
    """The first layer becomes another object."""

    def change(c: Any) -> None:
        layer = next(x for x in c["config"]["layers"] if x["name"] == "first")
        layer.update(module=module, class_name=name, registered_name=registered)
        layer["config"] = {"name": "first", **inner}
        layer.pop("build_config", None)

    return _config(change)


def _function(module: str, name: str) -> Any:
    said = {"module": module, "class_name": "function", "config": name, "registered_name": name}
    return _layer("first", activation=said)


def _h5(change: Callable[[Any], Any]) -> Any:
    def apply(held: Members) -> None:
        buffer = io.BytesIO(held[H5])
        with h5py.File(buffer, "a") as file:
            change(file)
        held[H5] = buffer.getvalue()

    return apply


def _exchanged(**how: Any) -> Callable[[Any], Any]:
    """The first kernel becomes another kind of dataset."""

    def change(file: Any) -> None:
        group = file["layers/dense/vars"]
        del group["0"]
        group.create_dataset("0", **{"shape": (8, 4), "dtype": "f4", **how})

    return change


def _linked(link: Any) -> Callable[[Any], Any]:
    def change(file: Any) -> None:
        group = file["layers/dense/vars"]
        del group["0"]
        group["0"] = link

    return change


def _virtual(file: Any) -> None:
    layout = h5py.VirtualLayout((8, 4), "f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (8, 4))
    del file["layers/dense/vars/0"]
    file["layers/dense/vars"].create_virtual_dataset("0", layout)


def _cycle(file: Any) -> None:
    file["layers/dense/again"] = file["layers"]


def _nested_compile(c: Any) -> None:
    c["config"]["layers"][1]["compile_config"] = {"optimizer": {"module": "os", "class_name": "system", "config": {}}}


def attacks(canary: Path) -> dict[str, Any]:
    touch = f"touch {canary}"
    code = {"class_name": "__lambda__", "config": {"value": ["4wAAAA==", None, None]}}
    return {
        "lambda": _object("keras.layers", "Lambda", function=code, arguments={}),
        "lambda value": _layer("first", activation=code),
        "lambda registered": _object("keras.layers", "Lambda", "Lambda", function=code),
        "lambda path": _object("keras.src.layers.core.lambda_layer", "Lambda", function=code),
        "os": _object("os", "system", command=touch),
        "builtins": _object("builtins", "eval", source=touch),
        "subprocess": _object("keras.src.utils.file_utils.subprocess", "Popen", args=touch),
        "get_file": _function("keras.utils", "get_file"),
        "load_model": _function("keras.saving", "load_model"),
        "image": _function("keras.utils", "load_img"),
        "deserialize": _function("keras.saving", "deserialize_keras_object"),
        "unsafe": _function("keras.config", "enable_unsafe_deserialization"),
        "function builtins": _function("builtins", "get_file"),
        "function path": _function("keras.src.utils.file_utils", "get_file"),
        "initializer function": _layer(
            "first", kernel_initializer={"module": "keras.utils", "class_name": "function", "config": "get_file"}
        ),
        "saved model": _object("keras.layers", "TFSMLayer", filepath="/tmp/x"),
        "torch": _object("keras.layers", "TorchModuleWrapper", data={"class_name": "__bytes__"}),
        "jax": _object("keras.layers", "JaxLayer", call_fn=touch),
        "vocabulary": _object("keras.layers", "StringLookup", vocabulary="/etc/passwd"),
        "text": _object("keras.layers", "TextVectorization", vocabulary="/etc/passwd"),
        "features": _object("keras.utils", "FeatureSpace", features={}),
        "loop": _object("keras.src.ops.core", "WhileLoop", "WhileLoop", cond=code, body=code),
        "map": _object("keras.src.ops.core", "Map", "Map"),
        "typespec": _layer("first", activation={"class_name": "__typespec__", "config": [], "spec_name": "X"}),
        "not registered": _object("my.module", "Mine", "mine>Mine"),
        "no module": _object(None, "Dense", units=4),
        "application": _function("keras.applications.imagenet_utils", "decode_predictions"),
        "callback": _object("keras.callbacks", "BackupAndRestore", backup_dir=str(canary)),
        "trainer": _object("keras.src.trainers.data_adapters.py_dataset_adapter", "OrderedEnqueuer"),
        "operation base": _object("keras.src.ops.numpy", "Operation"),
        "operation imported": _object("keras.src.ops.nn", "KerasTensor"),
        "object numbers": _layer(
            "first",
            activity_regularizer={"class_name": "__numpy__", "config": {"value": [1], "dtype": "O"}},
        ),
        "units": _layer("first", units=10**10),
        "units float": _layer("first", units=1e300),
        "units text": _layer("first", units="4"),
        "units null": _layer("first", units=None),
        "units digits": lambda held: held.update(
            {"config.json": held["config.json"].replace(b'"units": 4', b'"units": ' + b"4" * 5000)}
        ),
        "unrolled": _object("keras.layers", "LSTM", units=4, unroll="yes"),
        "repeats": _object("keras.layers", "RepeatVector", n=10**9),
        "input": _layer("x", batch_shape=[None, 10**10]),
        "batch": _layer("x", batch_shape=[10**10, 8]),
        "nested config": lambda held: held.update({"config.json": b'{"a":' * 5000 + b"1" + b"}" * 5000}),
        "list config": lambda held: held.update({"config.json": b"[1]"}),
        "nan": lambda held: held.update({"config.json": held["config.json"].replace(b'"units": 4', b'"units": NaN')}),
        "layers": _config(lambda c: c["config"].update(layers=3)),
        "no layers": _config(lambda c: c["config"].pop("layers")),
        "metadata": lambda held: held.update({"metadata.json": b"[" * 9000}),
        "assets": lambda held: held.update({"assets/layers/x/vocabulary.txt": b"x"}),
        "npz": lambda held: held.update({"model.weights.npz": b"x"}),
        "pickle": lambda held: held.update({"data.pkl": b"cos\nsystem\n"}),
        "traversal": lambda held: held.update({"assets/../../x": b"x"}),
        "notes": lambda held: held.update({"slimline.json": b'{"example": 1, "metadata": {}}'}),
        "notes size": lambda held: held.update(
            {"slimline.json": b'{"example": [[[1000000000, 8], "float32"]], "metadata": {}}'}
        ),
        "notes dtype": lambda held: held.update({"slimline.json": b'{"example": [[[2, 8], "O"]], "metadata": {}}'}),
        "notes history": lambda held: held.update(
            {"slimline.json": b'{"example": [[[2, 8], "float32"]], "metadata": {"history": [1]}}'}
        ),
        "notes mask": lambda held: held.update(
            {
                "slimline.json": b'{"example": [[[2, 8], "float32"]], "metadata": {"history": [], '
                b'"masks": {"a": {"shape": [100000, 100000], "bits": "eJw="}}}}'
            }
        ),
        "no weights": lambda held: held.pop(H5),
        "text weights": lambda held: held.update({H5: b"hello"}),
        "cut weights": lambda held: held.update({H5: held[H5][: len(held[H5]) // 2]}),
        "external link": _h5(_linked(h5py.ExternalLink("/etc/passwd", "/x"))),
        "soft link": _h5(_linked(h5py.SoftLink("/layers/dense_1/vars/0"))),
        "cycle": _h5(_cycle),
        "external": _h5(_exchanged(external=[("/etc/passwd", 0, 128)])),
        "virtual": _h5(_virtual),
        "compressed": _h5(_exchanged(compression="gzip")),
        "huge": _h5(_exchanged(shape=(10**6, 10**6))),
        "strings": _h5(_exchanged(dtype=h5py.string_dtype())),
        "references": _h5(_exchanged(dtype=h5py.ref_dtype)),
    }


@pytest.mark.parametrize("name", list(attacks(Path("canary"))))
def test_a_crafted_model_runs_nothing_and_is_refused_in_a_sentence(name: str, benign: Path, tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / "bad.keras"
    held = _members(benign)
    attacks(canary)[name](held)
    _write(path, held)
    started = time.process_time()
    with pytest.raises(SlimlineError) as error:
        sl.load(path)
    assert not canary.exists()
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert time.process_time() - started < 10
    assert [p.name for p in tmp_path.iterdir()] == ["bad.keras"]


@pytest.mark.parametrize("odd", [{"a": []}, ["a"], [[]], 0, True, 1.5, None, ""], ids=repr)
@pytest.mark.parametrize("kind", ["__numpy__", "__tensor__", "__keras_tensor__", "function", "Dense", "L2"])
def test_what_names_an_object_is_read_or_refused_whatever_its_kind(
    kind: str, odd: Any, benign: Path, tmp_path: Path
) -> None:
    whole = {"module": "keras.regularizers", "registered_name": None, "class_name": kind, "shared_object_id": 9}
    for key in ("module", "registered_name", "class_name", "shared_object_id", "config", "dtype", "unroll"):
        said = {**whole, "config": {"value": [1], "dtype": "float32", "shape": [1]}}
        (said["config"] if key in ("dtype", "unroll") else said)[key] = odd
        held = _members(benign)
        _layer("first", activity_regularizer=said)(held)
        _write(tmp_path / "odd.keras", held)
        try:
            sl.load(tmp_path / "odd.keras")
        except SlimlineError as error:
            assert "\n" not in str(error) and len(str(error)) < 600


def test_what_a_file_says_of_training_is_not_read(benign: Path, tmp_path: Path) -> None:
    held = _members(benign)
    _config(_nested_compile)(held)
    _write(tmp_path / "odd.keras", held)
    assert sl.load(tmp_path / "odd.keras").graph.nodes


def test_a_benign_model_answers_the_same(benign: Path) -> None:
    x = np.random.default_rng(0).standard_normal((5, 8)).astype("float32")
    np.testing.assert_allclose(sl.load(benign).predict(x), keras.saving.load_model(benign)(x), atol=1e-6)


@keras.saving.register_keras_serializable(package="security_test")
class Doubled(L.Layer):
    def call(self, x: Any) -> Any:
        return x * 2


def test_a_layer_that_the_user_registered_is_read(tmp_path: Path) -> None:
    keras.Sequential([L.Input((8,)), L.Dense(3), Doubled()]).save(tmp_path / "own.keras")
    assert sl.load(tmp_path / "own.keras").graph.nodes


def test_every_listed_layer_and_activation_exists_and_is_of_keras() -> None:
    for name in config.LAYERS:
        layer = getattr(L, name, None)
        assert layer is None or (issubclass(layer, keras.Layer) and layer.__module__.startswith("keras.src.layers"))
    present = [name for name in config.LAYERS if hasattr(L, name)]
    assert len(present) > 0.9 * len(config.LAYERS)
    assert not {"Lambda", "TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer", "StringLookup"} & config.LAYERS


def test_one_operation_may_not_make_tensors_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = keras.Input((8,), name="x")
    rows = keras.ops.unstack(L.Dense(4)(x), axis=1)
    path = tmp_path / "model.keras"
    keras.Model(x, L.Dense(2)(keras.ops.stack(rows[:2], 1))).save(path)
    sl.load(path)
    held = _members(path)
    held["config.json"] = held["config.json"].replace(b'"num": null', b'"num": 3000')
    _write(path, held)
    monkeypatch.setattr(stored, "TENSORS", 1000)
    made = 0

    def counted(self: Any, *args: Any, **named: Any) -> None:
        nonlocal made
        made += 1
        original(self, *args, **named)

    original = keras.KerasTensor.__init__
    monkeypatch.setattr(keras.KerasTensor, "__init__", counted)
    with pytest.raises(SlimlineError, match=r"cannot be loaded by Keras|more than 1,000 tensors"):
        sl.load(path)
    assert made <= 1000


@pytest.fixture(scope="module")
def learning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network while its formats learn."""
    x = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    inputs = keras.Input((8,), name="x")
    network = keras.Model(inputs, L.Dense(2, name="last")(L.Dense(4, activation="relu", name="first")(inputs)))
    step = sl.QuantizationAwareTraining(epochs=1)
    prepared = sl.prepare(sl.load(network), step, sl.Data(train=(x, np.arange(64) % 2)))
    path = tmp_path_factory.mktemp("learning") / "model.keras"
    prepared.native.save(path)
    return path


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("steps", value) for value in (10**10, -1, "x", 1.5, None, [3, 10**9])),
        *(("count", value) for value in (0, -4, "x", 1e300, True)),
        *((key, value) for key in ("moves", "fixed", "waits", "clips") for value in ("yes", [], 1)),
        *(("drop", value) for value in ("x", -0.5, 1.0, None)),
        *(("format", value) for value in ({}, None, {"kind": "levels"})),
    ],
)
def test_formats_that_learn_are_read_as_they_were_written(learning: Path, tmp_path: Path, key: str, value: Any) -> None:
    def change(part: Any) -> None:
        if isinstance(part, dict):
            if key in part and "count" in part:
                part[key] = value
            part = list(part.values())
        for inner in part if isinstance(part, list) else ():
            change(inner)

    held = _members(learning)
    assert len(sl.load(learning).graph.nodes) > 2
    _config(change)(held)
    _write(tmp_path / "altered.keras", held)
    with pytest.raises(SlimlineError) as error:
        sl.load(tmp_path / "altered.keras")
    assert "\n" not in str(error.value)
