"""Formats against exhaustive search, ml_dtypes, numpy, and the operators of ONNX and ONNX Runtime."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import helper, numpy_helper

from slimline.basics.errors import SlimlineError
from slimline.methods.formats import (
    FloatFormat,
    Format,
    IntegerGrid,
    Levels,
    Masked,
    Scaled,
    along,
    from_notes,
    spread,
)

few = settings(deadline=None, max_examples=40)
FLOATS = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}
SMALL = tuple(FLOATS)[1:]


def one(scale: float) -> np.ndarray:
    return np.asarray(scale, np.float32)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int | None, ...], np.ndarray]:
    """A shape, blocks of it (which need not divide it) and scales."""
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=3, max_side=7))
    blocks = tuple(draw(st.none() | st.integers(1, 4)) for _ in shape) if draw(st.booleans()) else ()
    counts = tuple(1 if b is None else -(-n // b) for n, b in zip(shape, blocks, strict=False))
    return shape, blocks, draw(hnp.arrays(np.float32, counts, elements=st.floats(2**-6, 8, width=32)))


def tensors(shape: tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float32, shape, elements=st.floats(-1000, 1000, width=32))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Scaled, np.ndarray]:
    """A format of any kind, and a tensor that it fits."""
    shape, blocks, scale = draw(layouts())
    kind = draw(st.sampled_from(["integer", "float", "levels"]))
    made: Scaled
    if kind == "integer":
        bits, signed = draw(st.integers(2, 16)), draw(st.booleans())
        narrow = signed and draw(st.booleans())
        bare = IntegerGrid(scale, blocks, bits, signed, narrow)
        zero = draw(st.none() | hnp.arrays(np.int32, scale.shape, elements=st.integers(bare.low, bare.high)))
        made = IntegerGrid(scale, blocks, bits, signed, narrow, zero)
    elif kind == "float":
        made = FloatFormat(scale, blocks, draw(st.sampled_from(SMALL)))
    else:
        whole = draw(st.lists(st.integers(-100, 100), min_size=2, max_size=20, unique=True))
        made = Levels(scale, blocks, np.sort(np.array(whole, np.float32) / 8))
    return made, draw(tensors(shape))


def every_number(each: Scaled) -> np.ndarray:
    """All that a format of scale 1 can hold, float64."""
    if isinstance(each, IntegerGrid):
        return np.arange(each.low, each.high + 1, dtype=np.float64)
    if isinstance(each, Levels):
        return each.codebook.astype(np.float64)
    assert isinstance(each, FloatFormat)
    bare = FloatFormat.plain(each.dtype)
    patterns = np.arange(1 << bare.code_bits, dtype=np.uint64).astype(f"uint{bare.code_bits}")
    with np.errstate(invalid="ignore"):
        numbers = patterns.view(FLOATS[each.dtype]).astype(np.float64)
    return np.unique(numbers[np.isfinite(numbers)])


@given(cases())
@few
def test_no_number_of_the_format_is_nearer(case: tuple[Scaled, np.ndarray]) -> None:
    each, x = case
    scale = np.broadcast_to(spread(each.scale, each.blocks, x.shape), x.shape).astype(np.float64)
    zero = 0.0
    if isinstance(each, IntegerGrid):
        zero = np.broadcast_to(spread(each.zero, each.blocks, x.shape), x.shape).astype(np.float64)
    numbers = every_number(each)
    units = x / scale + zero
    at = np.clip(np.searchsorted(numbers, units), 1, len(numbers) - 1)
    least = np.minimum(np.abs(numbers[at] - units), np.abs(numbers[at - 1] - units)) * scale
    distance = np.abs(each.round(x).astype(np.float64) - x)
    assert (distance <= least + 1e-6 * np.abs(x) + 1e-6 * scale).all()


@given(cases())
@few
def test_rounding_is_encoding_and_decoding_and_a_second_time_changes_nothing(case: tuple[Scaled, np.ndarray]) -> None:
    each, x = case
    codes = each.encode(x)
    assert codes.shape == x.shape and codes.dtype.kind in "iu"
    assert 0 <= int(codes.astype(np.int64).max()) - int(codes.astype(np.int64).min()) < 2**each.code_bits
    once = each.round(x)
    assert once.shape == x.shape and once.dtype == x.dtype
    np.testing.assert_array_equal(each.decode(codes), once)
    np.testing.assert_array_equal(each.encode(once), codes)
    assert each.round(x.astype(np.float64)).dtype == np.float64


@given(cases())
@few
def test_blocks_are_rounded_as_if_each_were_a_tensor(case: tuple[Scaled, np.ndarray]) -> None:
    each, x = case
    whole = each.round(x)
    for index in np.ndindex(each.scale.shape):
        where = tuple(
            slice(None) if b is None else slice(i * b, (i + 1) * b) for i, b in zip(index, each.blocks, strict=True)
        )
        own = {"scale": each.scale[index], "blocks": ()}
        if isinstance(each, IntegerGrid) and each.zero_point is not None:
            own["zero_point"] = np.asarray(each.zero_point[index])
        alone = from_notes({**each.notes(), **own, "blocks": [], "scale": np.asarray(each.scale[index])})
        np.testing.assert_array_equal(whole[where], alone.round(x[where]))


@given(cases())
@few
def test_notes_rebuild_the_format(case: tuple[Scaled, np.ndarray]) -> None:
    each, x = case
    masked = Masked(x > 0, each)
    for made in (each, masked):
        assert from_notes(made.notes()) == made
    other = from_notes({**each.notes(), "scale": each.scale * 2})
    assert other != each and Masked(x > 0, other) != masked and each != masked


@given(st.sampled_from(list(FLOATS)), hnp.arrays(np.float32, 50, elements=st.floats(width=32, allow_nan=False)))
@few
def test_floats_are_ml_dtypes_within_the_range(name: str, x: np.ndarray) -> None:
    each = FloatFormat.plain(name)
    with np.errstate(over="ignore"):
        oracle = x.astype(FLOATS[name])
    inside = np.isfinite(oracle.astype(np.float32))
    np.testing.assert_array_equal(each.encode(x)[inside], oracle.view(f"uint{each.code_bits}")[inside])
    np.testing.assert_array_equal(np.abs(each.round(x)[~inside]), each.largest)
    assert (np.signbit(each.round(x)) == np.signbit(x)).all()


@pytest.mark.parametrize("name", SMALL)
def test_every_pattern_and_the_middle_of_every_two_are_rounded_as_ml_dtypes_does(name: str) -> None:
    each = FloatFormat.plain(name)
    numbers = every_number(each).astype(np.float32)
    middles = ((numbers[1:].astype(np.float64) + numbers[:-1]) / 2).astype(np.float32)
    above, below = (np.nextafter(middles, np.float32(end)) for end in (np.inf, -np.inf))
    x = np.concatenate([numbers, middles, above, below])
    np.testing.assert_array_equal(each.round(x), x.astype(FLOATS[name]).astype(np.float32))
    patterns = np.arange(1 << each.code_bits).astype(f"uint{each.code_bits}")
    held = patterns.view(FLOATS[name]).astype(np.float32)
    finite = np.isfinite(held)
    np.testing.assert_array_equal(each.decode(patterns[finite]), held[finite])
    np.testing.assert_array_equal(each.encode(held[finite]), patterns[finite])


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_saturates_as_onnx_does(name: str) -> None:
    from onnx.reference import ReferenceEvaluator

    x = np.concatenate([np.random.default_rng(0).normal(size=400) * 300, [1e9, -1e9, 449, 464, 465, 61440, 61441, 0]])
    x = x.astype(np.float32)
    kind = {"float8_e4m3fn": onnx.TensorProto.FLOAT8E4M3FN, "float8_e5m2": onnx.TensorProto.FLOAT8E5M2}[name]
    there = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], saturate=1)
    back = helper.make_node("DequantizeLinear", ["q", "s"], ["y"])
    for scale in (1.0, 0.25, 0.3):
        zero = helper.make_tensor("z", kind, [], [0.0])
        ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, x.shape) for n in ("x", "y")]
        graph = helper.make_graph(
            [there, back], "g", ends[:1], ends[1:], [numpy_helper.from_array(one(scale), "s"), zero]
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
        oracle = ReferenceEvaluator(model).run(None, {"x": x})[0]
        np.testing.assert_array_equal(FloatFormat(one(scale), (), name).round(x), oracle)


TYPES = {
    (8, True): onnx.TensorProto.INT8,
    (8, False): onnx.TensorProto.UINT8,
    (16, True): onnx.TensorProto.INT16,
    (16, False): onnx.TensorProto.UINT16,
    (4, True): onnx.TensorProto.INT4,
    (4, False): onnx.TensorProto.UINT4,
}


@pytest.mark.parametrize(("bits", "signed"), list(TYPES))
@pytest.mark.parametrize("blocks", [(), (1, None), (None, 1), (None, 4), (4, None)])
def test_integers_are_those_of_onnx_runtime(bits: int, signed: bool, blocks: tuple[int | None, ...]) -> None:
    rng = np.random.default_rng(bits)
    shape = (8, 12)
    counts = tuple(1 if b is None else n // b for n, b in zip(shape, blocks, strict=False))
    scale = (2.0 ** rng.integers(-4, 0, counts)).astype(np.float32)  # powers of two, so that ties are met
    bare = IntegerGrid(scale, blocks, bits, signed)
    zero = np.asarray(rng.integers(bare.low, bare.high + 1, counts), np.int32)
    each = IntegerGrid(scale, blocks, bits, signed, zero_point=zero)
    x = (rng.integers(-(2 ** (bits + 1)), 2 ** (bits + 1), shape) / 2 * scale.max()).astype(np.float32)

    divided = next((d for d, b in enumerate(blocks) if b is not None), None)
    attributes: dict[str, int] = {} if divided is None else {"axis": divided}
    if divided is not None and blocks[divided] != 1:
        attributes["block_size"] = blocks[divided] or 0
        lying = scale.repeat(shape[1 - divided], 1 - divided), zero.repeat(shape[1 - divided], 1 - divided)
    else:
        lying = (scale, zero) if divided is None else (scale.ravel(), zero.ravel())
    stored = [
        numpy_helper.from_array(lying[0], "s"),
        helper.make_tensor("z", TYPES[bits, signed], lying[1].shape, lying[1].ravel().tolist()),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attributes),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attributes),
    ]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("x", "y")]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:], stored),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(each.round(x), session.run(None, {"x": x})[0])


def test_integers_in_closed_form() -> None:
    ties = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 100, -100], np.float32)
    assert IntegerGrid(one(1), (), 4, True).encode(ties).tolist() == [-2, -2, 0, 0, 2, 2, 7, -8]
    assert IntegerGrid(one(1), (), 4, True, narrow=True).encode(ties).tolist()[-2:] == [7, -7]
    affine = IntegerGrid(one(0.5), (), 4, False, zero_point=np.asarray(3, np.int32))
    assert affine.encode(ties).tolist() == [0, 0, 2, 4, 6, 8, 15, 0]
    assert [float(end) for end in affine.ends] == [-1.5, 6.0]
    assert (affine.low, affine.high) == (0, 15)
    assert IntegerGrid.between(-63, 63, one(1)) == IntegerGrid(one(1), (), 7, True, True)
    assert IntegerGrid.between(0, 255, one(1)) == IntegerGrid(one(1), (), 8, False)
    assert IntegerGrid(one(1), (), 16, True).encode(ties).dtype == np.int16


def test_levels_in_closed_form() -> None:
    x = np.array([-3, -0.4, 0.0, 0.4, 0.6, 3], np.float32)
    assert Levels.binary(one(2)).round(x).tolist() == [-2, -2, -2, 2, 2, 2]  # a tie goes to the lower level
    assert Levels.ternary(one(1)).round(x).tolist() == [-1, 0, 0, 0, 1, 1]
    powers = Levels.powers_of_two(3, one(1))
    assert powers.codebook.tolist() == [-1, -0.5, -0.25, 0, 0.25, 0.5, 1]
    assert powers.round(x).tolist() == [-1, -0.5, 0, 0.5, 0.5, 1]
    low = np.float32(1)
    close = Levels(one(1), (), np.array([low, np.nextafter(low, np.float32(2))], np.float32))
    np.testing.assert_array_equal(close.round(close.codebook), close.codebook)


def test_a_block_may_be_longer_than_the_tensor() -> None:
    x = np.linspace(-3, 3, 12, dtype=np.float32).reshape(3, 4)
    wide = IntegerGrid(np.full((3, 1), 0.5, np.float32), (1, 1 << 40), 4, True)
    np.testing.assert_array_equal(wide.round(x), IntegerGrid(one(0.5), (), 4, True).round(x))


def test_masks_leave_zeros() -> None:
    keep = np.array([[True, False], [False, True]])
    x = np.array([[0.9, 5], [5, -7]], np.float32)
    grid = IntegerGrid(np.array([[1], [2]], np.float32), (1, None), 4, True, zero_point=np.array([[2], [-3]], np.int32))
    each = Masked(keep, grid)
    assert each.round(x).tolist() == [[1, 0], [0, -8]]
    np.testing.assert_array_equal(each.round(each.round(x)), each.round(x))
    assert each.density == 0.5 and each.code_bits == 4


@pytest.mark.parametrize(
    ("each", "shape", "bits", "said"),
    [
        (IntegerGrid(one(1), (), 8, True), (10, 10), 8 + 0.32, "int8, symmetric, per tensor"),
        (IntegerGrid(one(1), (), 7, True, True), (32,), 9, "int7, symmetric, per tensor"),
        (
            IntegerGrid(np.ones((4, 2), np.float32), (1, 32), 4, False, False, np.zeros((4, 2), np.int32)),
            (4, 64),
            4 + 36 / 32,
            "uint4, affine, in blocks of 1×32",
        ),
        (
            IntegerGrid(np.ones((4, 1), np.float32), along(0, 2), 4, True),
            (4, 32),
            5,
            "int4, symmetric, per position of axis 0",
        ),
        (FloatFormat.plain("bfloat16"), (3, 5), 16, "bfloat16"),
        (FloatFormat(one(2), (), "float8_e5m2"), (32,), 9, "float8_e5m2, scaled per tensor"),
        (Levels.ternary(one(1)), (128,), 2 + 4 * 32 / 128, "3 levels, per tensor"),
        (
            Masked(np.arange(32) % 4 == 0, FloatFormat.plain("float16")),
            (32,),
            5,
            "float16, 25.0% of the positions kept",
        ),
    ],
)
def test_storage_and_words(each: Format, shape: tuple[int, ...], bits: float, said: str) -> None:
    assert each.bits_per_value(shape) == pytest.approx(bits)
    assert each.describe() == said


NAN = np.array([1, np.nan], np.float32)
ROW = np.ones((1, 3), np.float32)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: IntegerGrid(one(0), (), 8, True), "not positive"),
        (lambda: IntegerGrid(one(np.nan), (), 8, True), "not positive"),
        (lambda: IntegerGrid(np.ones((), np.float64), (), 8, True), "float32"),
        (lambda: IntegerGrid(1.0, (), 8, True), "float32"),
        (lambda: IntegerGrid(ROW, (), 8, True), "dimensions"),
        (lambda: IntegerGrid(ROW, (None, None), 8, True), "several scales"),
        (lambda: IntegerGrid(ROW, (None, 0), 8, True), "positive number"),
        (lambda: IntegerGrid(ROW, (None, True), 8, True), "positive number"),
        (lambda: IntegerGrid(one(1), (), 1, True), "2 to 16"),
        (lambda: IntegerGrid(one(1), (), True, True), "2 to 16"),
        (lambda: IntegerGrid(one(1), (), 8, False, True), "narrow"),
        (lambda: IntegerGrid(one(1), (), 8, True, False, np.asarray(128, np.int32)), "outside -128 … 127"),
        (lambda: IntegerGrid(one(1), (), 8, True, False, np.zeros(1, np.int32)), "as many as scales"),
        (lambda: IntegerGrid.between(-5, 9, one(1)), "No integer grid has the codes -5 … 9"),
        (lambda: FloatFormat(one(1), (), "float9"), "no float format"),
        (lambda: Levels(one(1), (), np.array([1, 1], np.float32)), "ascending|above the last"),
        (lambda: Levels(one(1), (), np.array([1], np.float32)), "2 to 65536"),
        (lambda: Levels.powers_of_two(9, one(1)), "2 to 8 bits"),
        (lambda: Masked(np.ones(4), FloatFormat.plain("float16")), "bool"),
        (lambda: Masked(np.ones((1, 4), bool), IntegerGrid(ROW, (None, 1), 8, True)), "one that fits"),
        (lambda: Masked(np.ones(4, bool), Masked(np.ones(4, bool), FloatFormat.plain("float16"))), "over another"),
        (lambda: IntegerGrid(one(1), (), 8, True).encode(NAN), "NaN"),
        (lambda: IntegerGrid(ROW, (None, 1), 8, True).round(np.ones((2, 4), np.float32)), r"shape \(2, 4\)"),
        (lambda: IntegerGrid(ROW, (None, 1), 8, True).round(np.ones(3, np.float32)), r"shape \(3,\)"),
        (lambda: from_notes({"kind": "integer"}), "damaged"),
        (lambda: from_notes([]), "damaged"),
        (lambda: from_notes({**FloatFormat.plain("float16").notes(), "more": 1}), "damaged"),
        (lambda: from_notes({**FloatFormat.plain("float16").notes(), "scale": 1.0}), "float32"),
        (lambda: from_notes({**FloatFormat.plain("float16").notes(), "dtype": {}}), "no float format|damaged"),
        (lambda: from_notes({**FloatFormat.plain("float16").notes(), "blocks": ["a"]}), "positive number|lengths"),
    ],
)
def test_what_is_no_format_is_refused_in_a_sentence(make: Any, said: str) -> None:
    with pytest.raises(SlimlineError, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)
