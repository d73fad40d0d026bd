"""Files: what is written is read back, by slimline and by plain Keras; what is bad is refused."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimline.basics.errors import SlimlineError
from slimline.frameworks.keras import adapter
from tests import zoo_keras

import keras  # isort: skip
from keras import layers as L  # isort: skip

METADATA = {"history": [{"step": "ChannelPruning", "ratio": 0.5}]}


@pytest.mark.parametrize("name", ["vit", "nested", "shuffled", "attention_ops", "lstm"])
def test_a_saved_model_loads_equal(name: str, tmp_path: Path) -> None:
    native, example = adapter.load(zoo_keras.shaken(zoo_keras.SMALL[name]()), None)
    path = tmp_path / "model.keras"
    adapter.save(native, path, example, METADATA)
    assert [p.name for p in tmp_path.iterdir()] == ["model.keras"]
    again, made, metadata = adapter.open(path, False)
    assert metadata == METADATA
    assert [a.shape for a in made] == [a.shape for a in example]
    assert list(adapter.parameters(again)) == list(adapter.parameters(native))
    np.testing.assert_array_equal(adapter.outputs(again, example)[0], adapter.outputs(native, example)[0])
    plain = keras.saving.load_model(path)
    np.testing.assert_array_equal(adapter.outputs(plain, example)[0], adapter.outputs(native, example)[0])


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    native, example = adapter.load(zoo_keras.shaken(zoo_keras.sequential()), None)
    for name in ("a.keras", "b.keras"):
        adapter.save(native, tmp_path / name, example, METADATA)
    assert (tmp_path / "a.keras").read_bytes() == (tmp_path / "b.keras").read_bytes()
    code = (
        "import sys; from pathlib import Path; from slimline.frameworks.keras import adapter\n"
        "native, example, notes = adapter.open(Path(sys.argv[1]), False)\n"
        "adapter.save(native, Path(sys.argv[2]), example, notes)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.keras", tmp_path / "c.keras"], check=True)
    assert (tmp_path / "a.keras").read_bytes() == (tmp_path / "c.keras").read_bytes()


def test_a_file_of_plain_keras_opens(tmp_path: Path) -> None:
    model = zoo_keras.shaken(zoo_keras.sequential())
    model.save(tmp_path / "plain.keras")
    native, example, metadata = adapter.open(tmp_path / "plain.keras", False)
    assert metadata == {}
    np.testing.assert_allclose(adapter.outputs(native, example)[0], model(example[0]), atol=1e-6)


def damaged(path: Path) -> None:
    zoo_keras.sequential().save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(bytes(data))


def truncated(path: Path) -> None:
    zoo_keras.sequential().save(path)
    path.write_bytes(path.read_bytes()[:2000])


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")


def with_code(path: Path) -> None:
    keras.Sequential([L.Input((4,)), L.Lambda(lambda x: x + 1)]).save(path)


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda path: None, "no file"),
        (lambda path: path.write_text("hello"), "no .keras file"),
        (damaged, "damaged"),
        (truncated, "damaged"),
        (other_zip, "no part of a model"),
        (with_code, "Lambda"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(write: object, says: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.keras"
    write(path)  # type: ignore[operator]
    with pytest.raises(SlimlineError) as error:
        adapter.open(path, False)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_code_runs_only_when_it_is_allowed(tmp_path: Path) -> None:
    with_code(tmp_path / "code.keras")
    native, example, _ = adapter.open(tmp_path / "code.keras", True)
    np.testing.assert_allclose(adapter.outputs(native, example)[0], example[0] + 1)


def test_a_layer_that_is_not_registered_is_not_saved(tmp_path: Path) -> None:
    class Noise(L.Layer):
        def call(self, x: Any, training: bool = False) -> Any:
            return x + keras.random.normal(keras.ops.shape(x)) if training else x

    inputs = keras.Input((4,))
    native, example = adapter.load(keras.Model(inputs, L.Dense(2)(Noise()(inputs))), None)
    sentence = "a layer of your own .*Noise; register its class with keras.saving.register_keras_serializable"
    with pytest.raises(SlimlineError, match=sentence):
        adapter.save(native, tmp_path / "model.keras", example, METADATA)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    native, example = adapter.load(zoo_keras.shared(), None)
    with pytest.raises(SlimlineError, match="Cannot write"):
        adapter.save(native, tmp_path / "missing" / "model.keras", example, {})
