"""MXFP4 and NVFP4: every code, every scale, and what files and archives hold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import slimline as sl
from slimline.files.slim.arrays import encode, read, written
from slimline.methods.formats import BlockFloat, FloatFormat, from_notes
from slimline.methods.scales import BLOCK_FLOATS, least_squares, rounding_error, widest
from slimline.model.packing import _grid
from slimline.runtimes.base import runtime
from slimline.steps.weight_quantization.quantize import check_target

RNG = np.random.default_rng(0)
E2M1 = FloatFormat.plain("float4_e2m1fn")
POWERS = 2.0 ** np.arange(-127, 128)
PATTERNS = np.arange(1, 0x7F, dtype=np.uint8)
SCALES = {"float8_e8m0": POWERS, "float8_e4m3fn": PATTERNS.view(ml_dtypes.float8_e4m3fn).astype(np.float64)}
NAMES = list(BLOCK_FLOATS)


def test_every_code_is_that_of_the_standard() -> None:
    codes = np.arange(16, dtype=np.uint8)
    np.testing.assert_array_equal(E2M1.decode(codes), codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32))
    np.testing.assert_array_equal(E2M1.encode(E2M1.decode(codes)), codes)


def test_rounding_is_to_the_nearest_and_ties_are_even() -> None:
    numbers = np.arange(8, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    x = np.concatenate(
        [np.arange(-800, 801) / 100, (numbers[1:] + numbers[:-1]) / 2, -(numbers[1:] + numbers[:-1]) / 2]
    )
    distance = np.abs(np.abs(x)[:, None] - numbers)
    nearest = distance == distance.min(axis=1, keepdims=True)
    even = np.where(nearest, np.arange(8) % 2, 2).argmin(axis=1)
    expected = np.copysign(numbers[even], x)
    for dtype in (np.float32, np.float64):
        np.testing.assert_array_equal(E2M1.round(x.astype(dtype)), expected)
    looked_up = E2M1.codebook[np.searchsorted(E2M1.bounds, x.astype(np.float32), side="left")]
    np.testing.assert_array_equal(looked_up, expected)  # as frameworks without the type do


weights = st.integers(0, 10_000).map(
    lambda seed: (np.random.default_rng(seed).normal(size=(3, 70)) * 10.0 ** (seed % 9 - 4)).astype(np.float32)
)


@settings(max_examples=20, deadline=None)
@given(weights, st.sampled_from(NAMES))
def test_scales_are_the_least_that_hold_a_block(weight: np.ndarray, dtype: str) -> None:
    _, scales, size = BLOCK_FLOATS[dtype]
    each = widest(weight, dtype, (1, size))
    assert isinstance(each, BlockFloat)
    numbers = SCALES[scales] * float(each.unit)
    for row in range(3):
        for block in range(math.ceil(70 / size)):
            least = np.abs(weight[row, block * size : (block + 1) * size]).max() / 6
            assert each.scale[row, block] == np.float32(numbers[numbers >= least * (1 - 1e-6)].min())
    if scales == "float8_e4m3fn":
        assert each.multiples.max() == 448  # the largest number of the type is used
    np.testing.assert_array_equal(each.multiples * each.unit, each.scale)


@settings(max_examples=20, deadline=None)
@given(weights, st.sampled_from(NAMES))
def test_fitted_scales_are_never_worse_and_numbers_stay(weight: np.ndarray, dtype: str) -> None:
    each = widest(weight, dtype, (1, BLOCK_FLOATS[dtype][2]))
    fitted = least_squares(weight, each)
    assert (rounding_error(weight, fitted) <= rounding_error(weight, each)).all()
    rounded = fitted.round(weight)
    np.testing.assert_array_equal(fitted.round(rounded), rounded)
    np.testing.assert_array_equal(fitted.decode(fitted.encode(rounded)), rounded)
    assert not np.signbit(rounded[rounded == 0]).any()
    assert from_notes(fitted.notes()) == fitted != each or np.array_equal(fitted.scale, each.scale)


def test_the_scale_of_the_standard_is_among_those_tried() -> None:
    weight = RNG.normal(size=(40, 32)).astype(np.float32)
    largest = np.abs(weight).max(axis=1, keepdims=True)
    standard = BlockFloat(2.0 ** (np.floor(np.log2(largest)) - 2).astype(np.float32), (1, 32), *_types("mxfp4"))
    fitted = least_squares(weight, widest(weight, "mxfp4", (1, 32)))
    assert (rounding_error(weight, fitted) <= rounding_error(weight, standard)).all()


def _types(dtype: str) -> tuple[str, str, np.ndarray]:
    numbers, scales, _ = BLOCK_FLOATS[dtype]
    return numbers, scales, np.ones((), np.float32)


@pytest.mark.parametrize(
    ("scale", "scales", "unit", "said"),
    [
        (3.0, "float8_e8m0", 1.0, "no number of float8_e8m0"),
        (449.0, "float8_e4m3fn", 1.0, "no number of float8_e4m3fn"),
        (1.0, "float8_e5m2", 1.0, "no type of scales"),
        (1.0, "float8_e8m0", 0.0, "no positive number"),
    ],
)
def test_scales_that_are_no_numbers_of_their_type_are_refused(scale: Any, scales: str, unit: Any, said: str) -> None:
    with np.errstate(all="ignore"), pytest.raises(sl.SlimlineError, match=said):
        BlockFloat(np.full((1, 1), scale, np.float32), (1, 32), "float4_e2m1fn", scales, np.asarray(unit, np.float32))


def test_bits_and_words() -> None:
    weight = RNG.normal(size=(64, 512)).astype(np.float32)
    bits = {"mxfp4": 4.25, "nvfp4": 4.5 + 32 / weight.size}
    said = {
        "mxfp4": "float4_e2m1fn, scaled by float8_e8m0 in blocks of 1×32",
        "nvfp4": "float4_e2m1fn, scaled by float8_e4m3fn in blocks of 1×16",
    }
    for dtype in NAMES:
        each = widest(weight, dtype, (1, BLOCK_FLOATS[dtype][2]))
        assert each.bits_per_value(weight.shape) == bits[dtype]
        assert each.describe() == said[dtype]


class Net(nn.Sequential):
    """A convolution over rows and linear layers wide enough for files to be weights."""

    def __init__(self) -> None:
        super().__init__(nn.Conv1d(8, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 14, 256), nn.ReLU())
        self.append(nn.Linear(256, 10))


X = RNG.normal(size=(64, 8, 16)).astype(np.float32)
DATA = sl.Data(calibration=X)


@pytest.fixture(scope="module")
def model() -> sl.Model:
    torch.manual_seed(0)
    return sl.load(Net().eval(), X[:2])


@pytest.mark.parametrize(("dtype", "framework"), [("mxfp4", "torch"), ("nvfp4", "onnx")])
def test_targets_hold_four_bits_and_answer_as_the_model(
    model: sl.Model, dtype: str, framework: str, tmp_path: Path
) -> None:
    exported = sl.export(model, "onnxruntime", tmp_path / "net.onnx")
    source = model if framework == "torch" else sl.load(exported, X[:2])
    small = sl.apply(source, sl.WeightQuantization(dtype=dtype, rounding="gptq"), DATA, progress=False)
    simulated = small.predict(X)
    for target, part in (("onnxruntime", 0.2), ("openvino", 0.25)):
        if runtime(target).available():
            continue
        path = sl.export(small, target, tmp_path / target)
        np.testing.assert_allclose(runtime(target).load(path).run((X,)), simulated, atol=1e-5)
        held = sum(each.stat().st_size for each in runtime(target).files(path) if each.exists())
        assert held < part * exported.stat().st_size
        if target == "onnxruntime":
            kinds = {tensor.data_type for tensor in onnx.load(path).graph.initializer}
            scales = onnx.TensorProto.BFLOAT16 if dtype == "mxfp4" else onnx.TensorProto.FLOAT8E4M3FN
            assert {onnx.TensorProto.UINT4, scales} <= kinds
    saved = small.save(tmp_path / f"small{small.adapter.suffix}")
    np.testing.assert_array_equal(sl.load(saved).predict(X), simulated)


def test_a_saved_torch_model_still_rounds_so(model: sl.Model, tmp_path: Path) -> None:
    small = sl.apply(model, sl.WeightQuantization(dtype="nvfp4"), progress=False)
    again = sl.load(small.save(tmp_path / "small.pt2"))
    assert again.quantization.weights == small.quantization.weights
    np.testing.assert_array_equal(again.predict(X), small.predict(X))


def test_keras(tmp_path: Path) -> None:
    import slimline.frameworks.keras  # noqa: F401, I001  chooses the backend before keras is imported
    import keras

    keras.utils.set_random_seed(0)
    x = X.reshape(64, -1)
    net = sl.load(keras.Sequential([keras.Input((128,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(10)]))
    small = sl.apply(net, sl.WeightQuantization(dtype="mxfp4"), target="onnxruntime", progress=False)
    for name, each in small.quantization.weights.items():
        assert each.blocks == (32, 1)
        np.testing.assert_array_equal(each.round(small.parameters()[name]), small.parameters()[name])
    assert np.abs(small.predict(x) - net.predict(x)).max() < 0.2 * np.abs(net.predict(x)).max()
    saved = sl.load(small.save(tmp_path / "small.keras"))
    np.testing.assert_array_equal(saved.predict(x), small.predict(x))


@pytest.mark.parametrize("dtype", NAMES)
def test_archives_hold_what_the_weights_are_worth(model: sl.Model, dtype: str, tmp_path: Path) -> None:
    size = BLOCK_FLOATS[dtype][2]
    for blocks, shape in (((1, size), (96, 128)), ((size, 1), (128, 96)), ((1, size // 8, None), (96, 64, 8))):
        weight = RNG.normal(size=shape).astype(np.float32)
        each = least_squares(weight, widest(weight, dtype, blocks))
        content = each.round(weight).tobytes()
        code = encode(content, shape, 4, [_grid(each, shape)])
        assert code is not None
        assert 8 * code.bytes / weight.size <= each.bits_per_value(shape) + 0.25  # and the list of its scales
        assert read(written([code]), [(len(content), 4)]) == [content]
    small = sl.apply(model, sl.WeightQuantization(dtype=dtype), progress=False)
    packed = sl.pack(small, tmp_path / "small.slim")
    np.testing.assert_array_equal(sl.load(packed.path).predict(X), small.predict(X))
    four = sl.apply(model, sl.WeightQuantization(dtype="fp8_e4m3"), progress=False)
    assert packed.packed_bytes < sl.pack(four, tmp_path / "eight.slim").packed_bytes


def test_what_cannot_be_is_refused(model: sl.Model) -> None:
    with pytest.raises(
        sl.SlimlineError, match=r"litert cannot store .*float4_e2m1fn.*onnxruntime or openvino, which can"
    ):
        check_target(sl.WeightQuantization(dtype="mxfp4"), "litert", model)
    with pytest.raises(sl.SlimlineError, match="nvfp4 has blocks of 16: leave group_size 32 out"):
        sl.WeightQuantization(dtype="nvfp4", group_size=32)
    with pytest.raises(sl.SlimlineError, match="mxfp4 has blocks of 32"):
        sl.WeightQuantization(overrides={"fc": {"dtype": "mxfp4", "group_size": 64}})
    with pytest.raises(sl.SlimlineError, match="rounding hqq is for integers, and mxfp4 is none"):
        sl.WeightQuantization(dtype="mxfp4", rounding="hqq")
