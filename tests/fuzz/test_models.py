"""Damaged models, weights and data: a model comes out, or one sentence, in little time and memory."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.numpy
import torch
from torch import nn

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.files import notes
from slimline.files.strictjson import Malformed
from slimline.graph.edits import Round
from slimline.graph.quantization import Quantization
from slimline.methods.formats import FloatFormat, Format, IntegerGrid, Levels, Masked
from slimline.methods.ranges import affine_grid, symmetric_grid
from slimline.run.sources import DataSource, load_data, load_weights
from tests.fuzz import mutate
from tests.security import hostile_torch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def originals(folder: Path) -> dict[str, bytes]:
    hostile_torch.foreign(folder / "foreign.pt2")
    sl.load(folder / "foreign.pt2").save(folder / "own.pt2")
    rng = np.random.default_rng(0)
    np.savez(folder / "plain.npz", x_train=rng.random((6, 4), np.float32), y_train=np.arange(6))
    np.savez_compressed(folder / "packed.npz", x_train=rng.random((6, 4), np.float32), y_train=np.arange(6))
    state = {k: v.numpy() for k, v in nn.Linear(4, 3).state_dict().items()}
    safetensors.numpy.save_file(state, folder / "linear.safetensors")
    from tests import zoo_keras

    zoo_keras.shared().save(folder / "plain.keras")
    graph = onnx.parser.parse_graph(
        "g (float[N,6,4] x) => (float[N,K] y) { m = MatMul(x, w) n = Shape(m) k = Gather <axis = 0> (n, zero) "
        "s = Concat <axis = 0> (k, rest) r = Reshape(m, s) f = Slice(r, zero, ten) y = Relu(f) }"
    )
    arrays = {"w": rng.random((4, 5), np.float32), "zero": np.array([0]), "rest": np.array([30]), "ten": np.array([10])}
    graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    foreign = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(foreign, folder / "foreign.onnx")
    model = sl.load(folder / "foreign.onnx")
    formats = Quantization({"x": affine_grid(-3, 3)}, {"w": symmetric_grid(arrays["w"], 1)})
    model.then(model.edit(Round(formats)), {"step": "StaticQuantization"}, formats).save(folder / "own.onnx")
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def _open(path: Path) -> None:
    if path.suffix == ".npz":
        load_data(DataSource(str(path)))
    elif path.suffix == ".safetensors":
        load_weights(nn.Linear(4, 3), path)
    else:
        model = sl.load(path)
        model.predict(*model.example)


def _fuzz(name: str, content: bytes, folder: Path, seed: int, count: int) -> Counter[str]:
    """How many damaged copies were read and how many refused; anything else raises, with the number of the copy."""
    by_suffix = {".safetensors": mutate.damaged_safetensors, ".onnx": mutate.damaged_onnx}
    structured = by_suffix.get(Path(name).suffix, mutate.damaged_zip)
    path = folder / f"damaged{Path(name).suffix}"
    path.write_bytes(content)
    _open(path)  # imports frameworks
    results: Counter[str] = Counter()
    for index, damaged in enumerate(mutate.mutations(content, seed, count, structured)):
        path.write_bytes(damaged)
        try:
            results[mutate.outcome(lambda: _open(path), SlimlineError)] += 1
        except Exception as error:
            error.add_note(f"{name}, seed {seed}, copy {index}")
            raise
    return results


COUNTS = {
    "own.pt2": 120,
    "foreign.pt2": 80,
    "plain.keras": 60,
    "own.onnx": 150,
    "foreign.onnx": 150,
    "plain.npz": 150,
    "packed.npz": 100,
    "linear.safetensors": 200,
}


@pytest.mark.parametrize("name", list(COUNTS))
def test_a_damaged_file_is_read_or_refused_in_a_sentence(name: str, originals: dict[str, bytes], folder: Path) -> None:
    results = _fuzz(name, originals[name], folder, 7, COUNTS[name])
    assert results["refused"] > COUNTS[name] / 3


def _quantized_notes() -> dict[str, Any]:
    """Of a model with a format of every kind."""
    scale = np.full((3, 1), 0.5, np.float32)
    zero = np.array([[1], [2], [3]], np.int32)
    formats: dict[str, Format] = {
        "grid": IntegerGrid(scale, (1, None), 4, False, zero_point=zero),
        "blocks": IntegerGrid(np.ones((3, 2), np.float32), (1, 32), 8, True, True),
        "float": FloatFormat(scale, (1, None), "float8_e4m3fn"),
        "levels": Levels.powers_of_two(3, scale, (1, None)),
        "masked": Masked(np.eye(3, 4, dtype=bool), Levels.ternary(scale, (1, None))),
    }
    return {"quantization": Quantization({"x": FloatFormat.plain("float16")}, formats, ("fc",), {"a": "b"}).notes()}


def test_damaged_formats_are_read_or_refused_in_a_sentence() -> None:
    packed, content = notes.pack(_quantized_notes())
    assert Quantization.from_notes(notes.unpack(packed, content)["quantization"]).weights["masked"].code_bits == 2
    results: Counter[str] = Counter()
    x = np.linspace(-2, 2, 12, dtype=np.float32).reshape(3, 4)

    def read(structure: Any, arrays: bytes) -> None:
        held = Quantization.from_notes(notes.unpack(structure, arrays).get("quantization"))
        for each in held.weights.values():
            if each.fits(x.shape):
                assert np.isfinite(each.round(x)).all()

    for index, arrays in enumerate(mutate.mutations(content, 7, 300, mutate.damaged_safetensors)):
        results[mutate.outcome(lambda arrays=arrays: read(packed, arrays), (SlimlineError, Malformed))] += 1
        structure = mutate.damaged_json(packed, random.Random(index))
        if isinstance(structure, dict):
            results[mutate.outcome(lambda s=structure: read(s, content), (SlimlineError, Malformed))] += 1
    assert results["refused"] > 300 and results["read"] > 0


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", list(COUNTS))
def test_ten_thousand_damaged_files(name: str, originals: dict[str, bytes], folder: Path) -> None:
    count = 10_000 * COUNTS[name] // sum(COUNTS.values())
    results = _fuzz(name, originals[name], folder, 2026, count)
    assert sum(results.values()) == count and results["refused"] > count / 3


def test_the_same_seed_gives_the_same_damage() -> None:
    content = b"some bytes of a file" * 10
    plain = list(mutate.mutations(content, 3, 20, mutate.damaged_bytes))
    assert plain == list(mutate.mutations(content, 3, 20, mutate.damaged_bytes))
    assert plain != list(mutate.mutations(content, 4, 20, mutate.damaged_bytes))
    value = {"a": [1, 2, {"b": None}], "c": "text"}
    assert mutate.damaged_json(value, random.Random(1)) == mutate.damaged_json(value, random.Random(1))
    assert value == {"a": [1, 2, {"b": None}], "c": "text"}


def test_torch_was_not_left_in_another_state() -> None:
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
