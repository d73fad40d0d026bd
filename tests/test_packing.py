"""Archives of models: they give back the file byte for byte, small, and refuse what nobody packed."""

from __future__ import annotations

import hashlib
import json
import random
import struct
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import slimline as sl
from slimline import cli
from slimline.basics.errors import SlimlineError
from slimline.files.slim import archive, arrays
from slimline.files.slim.archive import Span, pack, unpack
from slimline.files.slim.arrays import BLOCKS, GRID, PALETTE, PALETTES, PLANES, SPARSE, VECTORS, Grid
from slimline.files.strictjson import Malformed
from slimline.methods.entropy import entropy
from tests.digit_models import Perceptron, digits, fitted
from tests.fuzz import mutate

RNG = np.random.default_rng(0)


def gaussian(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def clustered(count: int, *shape: int) -> np.ndarray:
    return RNG.choice(gaussian(count), shape)


def encode(content: bytes, shape: Sequence[int], width: int, grids: Sequence[Grid] = ()) -> bytes | None:
    code = arrays.encode(content, shape, width, grids)
    return None if code is None else arrays.written([code])


def decode(content: bytes, size: int, width: int) -> bytes:
    return arrays.read(content, [(size, width)])[0]


def coded(path: Path) -> tuple[int, int]:
    """Bytes of arrays in a file, and what they take in its archive."""
    content = path.read_bytes()
    header, end = archive.read_header(content, "")
    return sum(part.size for part in header.parts), len(content) - end - header.rest - 32


SCALES = np.random.default_rng(1).uniform(0.1, 2, 400).astype(np.float32)
ARRAYS = {
    PALETTE: clustered(32, 40, 90),
    PALETTES: np.stack([clustered(16, 400) for _ in range(30)]),
    PLANES: gaussian(60, 60),
    SPARSE: np.where(RNG.random((60, 60)) < 0.9, 0, gaussian(60, 60)),
    VECTORS: gaussian(200, 2)[RNG.integers(0, 200, 3000)].reshape(40, 150),
    GRID: RNG.integers(-127, 128, (40, 300)).astype(np.float32) * np.linspace(0.1, 2, 40, dtype=np.float32)[:, None],
    BLOCKS: RNG.integers(-8, 8, (40, 300)).astype(np.float32) * np.repeat(SCALES.reshape(40, 10), 32, 1)[:, :300],
}


def grid(kind: int) -> Grid:
    """That of the array of this way, and of the others one which fits their shape and not their numbers."""
    return Grid(0, SCALES, 32) if kind == BLOCKS else Grid(0, np.linspace(0.1, 2, 40, dtype=np.float32))


@pytest.mark.parametrize("kind", ARRAYS)
def test_each_way_is_taken_where_it_is_the_shortest(kind: int) -> None:
    array = ARRAYS[kind]
    content = encode(array.tobytes(), array.shape, 4, [grid(kind)])
    assert content is not None and content[0] == kind
    assert decode(content, array.nbytes, 4) == array.tobytes()


def test_the_last_axis_may_have_palettes_and_scales() -> None:
    for array, kind in ((ARRAYS[PALETTES], PALETTES), (ARRAYS[GRID], GRID)):
        turned = np.ascontiguousarray(array.T)
        content = encode(turned.tobytes(), turned.shape, 4, [Grid(-1, np.linspace(0.1, 2, 40, dtype=np.float32))])
        assert content is not None and content[:2] == bytes([kind, 1])
        assert decode(content, turned.nbytes, 4) == turned.tobytes()


def test_vectors_may_run_along_the_inputs_of_layers_that_count_outputs_last() -> None:
    vectors = gaussian(150, 4)[RNG.integers(0, 150, 4 * 1080)].reshape(30, 16, 3, 12)  # outputs, inputs, kernel
    turned = np.ascontiguousarray(vectors.transpose(2, 3, 1, 0))
    plain, content = encode(vectors.tobytes(), vectors.shape, 4), encode(turned.tobytes(), turned.shape, 4)
    assert plain is not None and content is not None
    assert content[:4] == bytes([VECTORS, 4, 16, 30]) and len(content) == len(plain)
    assert decode(content, turned.nbytes, 4) == turned.tobytes()


@settings(max_examples=60)
@given(
    st.sampled_from(["<f4", "<f2", "<f8", "i1", "<i2", "<i4", "<u8"]),
    st.sampled_from(["few", "bell", "bits", "constant", "negative zeros"]),
    st.lists(st.integers(1, 13), min_size=1, max_size=4),
    st.floats(0, 1),
    st.integers(0, 2**31),
)
def test_arrays_of_any_type_come_back_bit_for_bit(
    dtype: str, kind: str, shape: list[int], zeros: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        numbers = {
            "few": lambda: rng.choice(rng.standard_normal(5) * 50, shape).astype(dtype),
            "bell": lambda: (rng.standard_normal(shape) * 50).astype(dtype),
            "bits": lambda: np.frombuffer(rng.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype),
            "constant": lambda: np.full(shape, 3, dtype),
            "negative zeros": lambda: (-np.zeros(shape)).astype(dtype),
        }[kind]()
    array = np.where(rng.random(numbers.size) < zeros, np.zeros((), dtype), numbers.ravel()).astype(dtype)
    content = encode(array.tobytes(), shape, array.itemsize)
    if content is not None:
        assert len(content) < array.nbytes and decode(content, array.nbytes, array.itemsize) == array.tobytes()


def test_sizes_are_near_the_entropy_and_below_deflate() -> None:
    codes = np.clip(np.rint(RNG.standard_normal((300, 300)) * 4 + 16), 0, 31).astype(int)
    sparse = np.where(RNG.random((300, 300)) < 0.9, 16, codes)
    for each in (codes, sparse):
        weights = np.sort(gaussian(32))[each]
        least = entropy(np.bincount(each.ravel())) * each.size / 8
        content = encode(weights.tobytes(), weights.shape, 4)
        assert content is not None and len(content) < 1.02 * least + 4 * 32 + 100
        assert len(content) < 0.9 * len(zlib.compress(each.astype(np.uint8).tobytes(), 9))


@pytest.fixture(scope="module")
def trained() -> sl.Model:
    return sl.load(fitted(Perceptron), (digits()[:2],))


@pytest.fixture(scope="module")
def models(trained: sl.Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, sl.Model]:
    import keras

    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 1), batch_size=None)
    hidden = keras.layers.Conv2D(12, 3, activation="relu")(inputs)
    network = keras.Model(inputs, keras.layers.Dense(10)(keras.layers.Flatten()(hidden)))
    path = sl.export(trained, "onnxruntime", tmp_path_factory.mktemp("onnx") / "net.onnx")
    return {".pt2": trained, ".keras": sl.load(network), ".onnx": sl.load(path)}


@pytest.mark.parametrize("suffix", [".pt2", ".keras", ".onnx"])
def test_a_file_of_any_framework_comes_back_byte_for_byte(
    suffix: str, models: dict[str, sl.Model], tmp_path: Path
) -> None:
    model = sl.apply(models[suffix], sl.WeightSharing(clusters=16))
    assert all(len(np.unique(w)) == 16 for w in model.parameters().values() if w.ndim > 1)
    file = model.save(tmp_path / f"net{suffix}")
    packed = sl.pack(file, tmp_path / "net.slim")
    assert packed.model_bytes == file.stat().st_size and packed.packed_bytes == packed.path.stat().st_size
    again = sl.unpack(packed.path, tmp_path / "there")
    assert again.name == f"net{suffix}" and again.read_bytes() == file.read_bytes()
    weights = sum(w.size for w in model.parameters().values())
    before, after = coded(packed.path)
    assert before > 0.95 * 4 * weights and after < 0.6 * weights
    loaded = sl.load(packed.path)
    x = digits()[:9] if suffix != ".keras" else digits()[:9].transpose(0, 2, 3, 1)
    assert np.array_equal(loaded.predict(x), model.predict(x)) and loaded.history == model.history
    assert sl.pack(packed.path, tmp_path / "again.slim").packed_bytes == packed.packed_bytes


@pytest.mark.parametrize("suffix", [".pt2", ".keras", ".onnx"])
def test_a_quantized_model_is_stored_by_its_codes(suffix: str, models: dict[str, sl.Model], tmp_path: Path) -> None:
    x = digits() if suffix != ".keras" else digits().transpose(0, 2, 3, 1)
    model = sl.apply(models[suffix], sl.StaticQuantization(undo=False), sl.Data(calibration=(x[:200],)))
    packed = sl.pack(model, tmp_path / "net.slim")
    before, after = coded(packed.path)
    assert after < 0.3 * before
    loaded = sl.load(packed.path)
    assert loaded.quantization == model.quantization
    assert np.array_equal(loaded.predict(x[:50]), model.predict(x[:50]))
    file = model.save(tmp_path / f"net{suffix}")
    assert sl.pack(file, tmp_path / "file.slim").packed_bytes == packed.packed_bytes


def test_commands_pack_and_unpack_and_read_archives(
    trained: sl.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = trained.save(tmp_path / "net.pt2")
    archived, again = tmp_path / "net.slim", tmp_path / "again.pt2"
    for words, said in (
        (["pack", str(file), "-o", str(archived)], "smaller than the model's"),
        (["unpack", str(archived), "-o", str(again)], "again.pt2"),
        (["inspect", str(archived)], "parameters"),
    ):
        monkeypatch.setattr(sys, "argv", ["slimline", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code and said in capsys.readouterr().out.replace("\n", " ")
    assert again.read_bytes() == file.read_bytes()


def test_weights_beside_an_onnx_file_are_no_part_of_it(tmp_path: Path) -> None:
    graph = onnx.parser.parse_graph("g (float[N,8] x) => (float[N,8] y) { y = MatMul(x, w) }")
    graph.initializer.append(onnx.numpy_helper.from_array(gaussian(8, 8), "w"))
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "net.onnx", save_as_external_data=True, size_threshold=0)
    with pytest.raises(SlimlineError, match="files beside it"):
        sl.pack(tmp_path / "net.onnx", tmp_path / "net.slim")
    assert sl.pack(sl.load(tmp_path / "net.onnx"), tmp_path / "net.slim").packed_bytes


def test_what_cannot_be_packed_is_said(trained: sl.Model, tmp_path: Path) -> None:
    for source, output, words in (
        (trained, "net.pt2", "ends in .slim"),
        (tmp_path / "none.pt2", "net.slim", "There is no model file"),
        (tmp_path, "net.slim", "There is no model file"),
        (3, "net.slim", "give a path"),
    ):
        with pytest.raises(SlimlineError, match=words):
            sl.pack(source, tmp_path / output)  # type: ignore[arg-type]
    with pytest.raises(SlimlineError, match="There is no file"):
        sl.unpack(tmp_path / "none.slim")
    (tmp_path / "other.slim").write_bytes(b"PK" * 100)
    for read in (sl.unpack, sl.load):
        with pytest.raises(SlimlineError, match=r"is no \.slim archive"):
            read(tmp_path / "other.slim")


def sealed(header: object, payload: bytes = b"", version: int = 1) -> bytes:
    """An archive with the right checksum, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = struct.pack("<4sBI", b"SLIM", version, len(text)) + text + payload
    return body + hashlib.sha256(body).digest()


def described(**changes: object) -> dict[str, object]:
    nothing = zlib.compress(b"")
    whole = {"suffix": ".pt2", "size": 0, "sha256": hashlib.sha256(b"").hexdigest(), "rest": len(nothing), "parts": []}
    return {**whole, **changes}


def part(**changes: int) -> dict[str, int]:
    return {"at": 0, "size": 8, "width": 4, **changes}


HOSTILE = {
    "version": sealed(described(), version=2),
    "not json": sealed(b"{", zlib.compress(b"")),
    "other fields": sealed(described(code="x"), zlib.compress(b"")),
    "a path for a suffix": sealed(described(suffix="/../x"), zlib.compress(b"")),
    "negative": sealed(described(size=-1), zlib.compress(b"")),
    "true for a number": sealed(described(size=True), zlib.compress(b"")),
    "a terabyte": sealed(described(size=2**40), zlib.compress(b"")),
    "a bomb": sealed(described(size=2**27, rest=len(bomb := zlib.compress(bytes(2**28)))), bomb),
    "too short": sealed(described(size=5), zlib.compress(b"")),
    "no deflate": sealed(described(rest=9), b"\xff" * 9),
    "bytes behind": sealed(described(), zlib.compress(b"") + b"x"),
    "overlap": sealed(described(size=12, parts=[part(), part(at=4)]), zlib.compress(b"") + b"\1\1"),
    "outside": sealed(described(size=8, parts=[part(at=2**40)]), zlib.compress(b"") + b"\1"),
    "width": sealed(described(size=9, parts=[part(size=9)]), zlib.compress(b"") + b"\1"),
    "empty code": sealed(described(size=8, parts=[part()]), zlib.compress(b"")),
    "another file": sealed(described(sha256="0" * 64), zlib.compress(b"")),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_crafted_archive_ends_in_one_sentence(name: str, tmp_path: Path) -> None:
    (tmp_path / "net.slim").write_bytes(HOSTILE[name])
    with pytest.raises(SlimlineError) as refused:
        sl.unpack(tmp_path / "net.slim")
    assert "\n" not in str(refused.value) and "net.slim" in str(refused.value)
    assert [file.name for file in tmp_path.iterdir()] == ["net.slim"]


def test_an_archive_of_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net.slim").write_bytes(pack(b"#!/bin/sh", ".sh", []))
    with pytest.raises(SlimlineError, match=r"holds a \.sh file"):
        sl.unpack(tmp_path / "net.slim")


def test_truncated_and_altered_archives_are_refused() -> None:
    array = ARRAYS[PALETTE]
    content = b"head" + array.tobytes() + b"tail"
    whole = pack(content, ".onnx", [Span(4, array.shape, 4), Span(5, (3,), 1), Span(0, (10**9,), 8)])
    assert unpack(whole, "it")[1] == content and len(whole) < 0.3 * len(content)
    for damaged in mutate.mutations(whole, 1, 60, mutate.damaged_bytes):
        if damaged != whole:
            with pytest.raises(SlimlineError):
                unpack(damaged, "it")


def test_damaged_headers_are_refused_in_little_time_and_memory(tmp_path: Path) -> None:
    """With the checksum of a whole archive, as a stranger could write it."""
    content = b"head" + ARRAYS[SPARSE].tobytes() + ARRAYS[PALETTE].tobytes()
    spans = [Span(4, (60, 60), 4), Span(4 + 14400, (40, 90), 4)]
    whole = pack(content, ".onnx", spans)
    _, end = archive.read_header(whole, "it")
    for seed in range(60):
        header = mutate.damaged_text(whole[9:end], random.Random(seed))
        damaged = sealed(header, whole[end:-32])
        mutate.outcome(lambda each=damaged: unpack(each, "it"), SlimlineError, 3.0, 150.0)  # type: ignore[misc]


@pytest.mark.parametrize("kind", ARRAYS)
def test_damaged_codes_are_refused_or_give_as_many_bytes(kind: int) -> None:
    """As a stranger could make them: with checksums that are right."""
    array = ARRAYS[kind]
    content = encode(array.tobytes(), array.shape, 4, [grid(kind)])
    assert content is not None and content[0] == kind

    def read(damaged: bytes) -> None:
        assert len(decode(damaged, array.nbytes, 4)) == array.nbytes

    outcomes = [
        mutate.outcome(lambda each=each: read(each), Malformed, 2.0, 100.0)  # type: ignore[misc]
        for each in mutate.mutations(content, kind, 60, mutate.damaged_bytes)
    ]
    assert outcomes.count("refused") > 10


def test_absurd_sizes_take_no_memory() -> None:
    for kind in ARRAYS:
        for wide in (b"\xff\xff\xff\xff\x7f", b"\xff" * 12, b"\x80" * 40):
            result = mutate.outcome(lambda k=kind, w=wide: decode(bytes([k]) + w * 3, 2**26, 4), Malformed, 2.0, 50.0)  # type: ignore[misc]
            assert result == "refused"
    with pytest.raises(Malformed):
        decode(b"", 9, 4)
    assert encode(b"", (0,), 4) is None
