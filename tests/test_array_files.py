"""Arrays in files: plain numbers are read, whatever else a header says is refused before memory is taken."""

from __future__ import annotations

import io
import json
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from safetensors.torch import save_file
from torch import nn

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.files import array_files, notes
from slimline.files.strictjson import Malformed
from slimline.recipe.packed import PackedMask
from slimline.run.sources import DataSource, load_data, load_weights

X = np.random.default_rng(0).random((6, 4), np.float32)


def _npy(header: str, content: bytes = b"") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content


def _refused(path: Path) -> str:
    with pytest.raises(SlimlineError) as error:
        load_data(DataSource(str(path)))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 4), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 5000 + ",), }",
        "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }",
        "{'descr': '<U9999999', 'fortran_order': False, 'shape': (1,), }",
        "__import__('os').system('true')",
        "(" * 5000,
        "",
    ],
)
def test_a_header_that_is_not_of_plain_numbers_is_refused(header: str, tmp_path: Path) -> None:
    content = _npy(header, b"\0" * 16)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x_train.npy").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        archive.writestr("x_train.npy", content)
    for name in ("folder", "data.npz"):
        assert "cannot be read as numpy arrays" in _refused(tmp_path / name)


def test_plain_arrays_of_both_orders_are_read(tmp_path: Path) -> None:
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "data.npz", x_train=X, y_train=np.asfortranarray(X), other=[None])
        found = array_files.npz(tmp_path / "data.npz", re.compile("x_train|y_train|x_test"))
        assert set(found) == {"x_train", "y_train"}
        np.testing.assert_array_equal(found["x_train"], X)
        np.testing.assert_array_equal(found["y_train"], X)
        found["x_train"][0] = 1  # it may be written to
    np.save(tmp_path / "x.npy", np.asfortranarray(X))
    np.testing.assert_array_equal(array_files.npy(tmp_path / "x.npy"), X)


def test_an_archive_that_unpacks_to_gigabytes_is_refused_before_it_is(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    archive = zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with archive, archive.open("x_train.npy", "w") as member:
        member.write(_npy("{'descr': '|u1', 'fortran_order': False, 'shape': (314572800,), }"))
        for _ in range(300):
            member.write(bytes(1 << 20))
    (tmp_path / "bomb.npz").write_bytes(buffer.getvalue())
    assert "unpacks to" in _refused(tmp_path / "bomb.npz")


def test_weights_of_another_kind_are_named(tmp_path: Path) -> None:
    path, layer = tmp_path / "w.safetensors", nn.Linear(4, 3)
    state = {"weight": torch.ones(3, 4), "bias": torch.ones(3)}
    for dtype, says in ((torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "int8"), (torch.bool, "bool")):
        save_file({**state, "weight": state["weight"].to(dtype)}, path)
        with pytest.raises(SlimlineError, match=says):
            load_weights(layer, path)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        save_file({**state, "weight": (state["weight"] * 1.5).to(dtype)}, path)
        load_weights(layer, path)
        assert bool((layer.weight == 1.5).all())


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 48]},
        {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 4800]},
        {"dtype": "F32", "shape": [3, 4], "data_offsets": [8, 56]},
        {"dtype": "F32", "shape": "ab", "data_offsets": [0, 48]},
        {"dtype": 4, "shape": [3, 4], "data_offsets": [0, 48]},
        {"dtype": "F32", "shape": [True, 12], "data_offsets": [0, 48]},
        {"shape": [3, 4]},
        [],
    ],
)
def test_damaged_safetensors_are_one_sentence(entry: Any, tmp_path: Path) -> None:
    header = json.dumps({"weight": entry}).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 48)
    with pytest.raises(SlimlineError, match="no safetensors file"):
        load_weights(nn.Linear(4, 3, bias=False), path)


def test_all_types_of_safetensors_are_those_of_the_library(tmp_path: Path) -> None:
    held = {str(t): np.arange(6).reshape(2, 3).astype(t) for t in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "?")}
    safetensors.numpy.save_file({**held, "empty": np.zeros((0, 3), "f4")}, tmp_path / "all.safetensors", {"a": "b"})
    found = array_files.safetensors(tmp_path / "all.safetensors")
    for name, array in held.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def test_masked_arrays_are_refused() -> None:
    masked = np.ma.masked_array(X, X > 0.5)
    with pytest.raises(SlimlineError, match="masked"):
        sl.load(nn.Linear(4, 2), masked)
    with pytest.raises(SlimlineError, match="masked"):
        sl.Data(train=(masked, np.arange(6)))


def test_a_packed_mask_holds_what_its_shape_needs() -> None:
    mask = X > 0.5
    packed = PackedMask.of(mask)
    np.testing.assert_array_equal(packed.array(), mask)
    assert PackedMask.of(np.zeros((0, 3))).array().shape == (0, 3)
    for shape in ((10**6, 10**6), (4, 4), (-6, -4), (60, 4)):
        with pytest.raises(ValueError, match=r"mask|bits"):
            packed.model_copy(update={"shape": shape}).array()
    for bits in ("", "AAAA", "!", packed.bits[:8]):
        with pytest.raises(ValueError, match=r"mask|padding"):
            packed.model_copy(update={"bits": bits}).array()


def test_truth_values_of_notes_take_a_bit_each() -> None:
    rng = np.random.default_rng(0)
    shapes = ((), (1,), (8,), (3, 5), (0, 3), (2, 3, 4))
    held = {"masks": {str(shape): np.asarray(rng.random(shape) < 0.5) for shape in shapes}, "x": X}
    packed, arrays = notes.pack(held)
    assert "true" not in json.dumps(packed)
    assert {k: v.nbytes for k, v in array_files.safetensors(arrays).items() if k == "masks/(3, 5)"} == {
        "masks/(3, 5)": 2
    }
    again = notes.unpack(packed, arrays)
    np.testing.assert_equal(again, held)
    assert again["masks"]["()"].dtype == np.bool_
    whole = safetensors.numpy.save({"m": held["masks"]["(3, 5)"]})  # as they were once written
    np.testing.assert_equal(notes.unpack({"m": {"$array": "m"}}, whole), {"m": held["masks"]["(3, 5)"]})
    bits = safetensors.numpy.save({"m": np.array([255, 255], np.uint8)})
    for shape in (
        [3, 5],
        [2, 4],
        [17],
        [-2, -8],
        [2.0, 8],
        "ab",
        None,
        [True, 16],
        [0, 2**60],
        [2**40, 2**40],
        [1] * 40,
    ):
        with pytest.raises(Malformed, match="shape"):
            notes.unpack({"m": {"$array": "m", "$shape": shape}}, bits)
    with pytest.raises(Malformed, match="shape"):
        notes.unpack({"m": {"$array": "m", "$shape": [2]}}, safetensors.numpy.save({"m": np.ones(2, np.int32)}))
