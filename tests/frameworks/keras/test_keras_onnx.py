"""Keras models as ONNX: every family of layers answers in ONNX Runtime what Keras itself answers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import slimline as sl
from slimline.frameworks.keras.load import load
from slimline.frameworks.keras.onnx import to_onnx
from slimline.runtimes.base import runtime
from slimline.runtimes.forms.onnx import rewrite, serialized
from tests.frameworks.keras.blocks import images, model_of, series, tokens, words
from tests.zoo_keras import shaken

import keras  # isort: skip
from keras import layers as L  # isort: skip
from keras import ops  # isort: skip


def written(source: keras.Model) -> bytes:
    """The model as an ONNX file."""
    native, example = load(source, None)
    return serialized(to_onnx(native, example, False), rewrite)


def numbers(source: keras.Model, rows: int = 3) -> list[np.ndarray]:
    """Inputs for the model; integers begin with padding, or end in it."""
    random = np.random.default_rng(1)
    arrays = []
    for tensor in source.inputs:
        shape = (rows, *tensor.shape[1:])
        floats = random.normal(size=shape) if "float" in tensor.dtype else random.integers(1, 9, shape)
        if "float" not in tensor.dtype:
            floats[0, -3:], floats[-1, :2] = 0, 0
        arrays.append(floats.astype(tensor.dtype))
    return arrays


def same(source: keras.Model) -> list[str]:
    """Compare the file of a model with Keras; the kinds of its operators."""
    content = written(source)
    session = onnxruntime.InferenceSession(content)
    inputs = numbers(source)
    theirs = session.run(None, {i.name: x for i, x in zip(session.get_inputs(), inputs, strict=True)})
    mine = keras.tree.flatten(source(inputs if len(inputs) > 1 else inputs[0], training=False))
    for their, own in zip(theirs, mine, strict=True):
        answer = keras.ops.convert_to_numpy(own)
        assert their.dtype == answer.dtype
        np.testing.assert_allclose(their, answer, rtol=1e-4, atol=2e-5 * max(1.0, float(np.abs(answer).max())))
    return [node.op_type for node in onnx.load_from_string(content).graph.node]


def several(shape: tuple[int, ...], *bodies: Callable[[object], object], dtype: str = "float32") -> keras.Model:
    """One output for each body, all of one input."""
    x = keras.Input(shape, dtype=dtype)
    return shaken(keras.Model(x, [body(x) for body in bodies]))


ACTIVATIONS = [
    "celu", "elu", "exponential", "gelu", "hard_shrink", "hard_sigmoid", "hard_silu", "hard_swish", "hard_tanh",
    "leaky_relu", "linear", "log_sigmoid", "log_softmax", "mish", "relu", "relu6", "selu", "sigmoid", "silu",
    "soft_shrink", "softmax", "softplus", "softsign", "sparse_plus", "sparse_sigmoid", "squareplus", "swish", "tanh",
    "tanh_shrink",
]  # fmt: skip
FAMILIES: dict[str, Callable[[], keras.Model]] = {
    "activations": lambda: several((4, 6), *(L.Activation(name) for name in ACTIVATIONS)),
    "activations of their own": lambda: several(
        (4, 4, 6), L.ReLU(), L.ReLU(6), L.ReLU(2.5), L.ReLU(2.0, 0.2, 0.5), L.ReLU(None, 0.2, 0.5), L.LeakyReLU(0.3),
        L.ELU(0.7), L.PReLU(), L.PReLU(shared_axes=[1, 2]), L.Softmax(), L.Softmax(axis=1), L.Softmax(axis=(1, 2)),
        lambda x: ops.gelu(x, approximate=True), lambda x: ops.threshold(x, 0.3, 2.0),
    ),
    "convolutions of series": lambda: several(
        (11, 4), L.Conv1D(6, 3), L.Conv1D(6, 4, strides=2, padding="same"), L.Conv1D(6, 3, padding="causal"),
        L.Conv1D(6, 3, dilation_rate=2, padding="causal"), L.Conv1D(8, 3, groups=2, padding="same"),
        L.DepthwiseConv1D(3, depth_multiplier=2), L.SeparableConv1D(6, 3, padding="same", activation="relu"),
        L.Conv1DTranspose(5, 3, strides=2, padding="same"), L.Conv1DTranspose(5, 3, strides=2, output_padding=1),
    ),
    "convolutions of images": lambda: several(
        (9, 8, 4), L.Conv2D(6, (3, 2), strides=(2, 1), padding="same"), L.Conv2D(8, 3, groups=4, dilation_rate=2),
        L.DepthwiseConv2D(3, strides=2, depth_multiplier=3, padding="same", activation="gelu"),
        L.SeparableConv2D(6, 3, depth_multiplier=2), L.Conv2DTranspose(5, 3, strides=2, padding="same"),
        L.Conv2DTranspose(5, (2, 4), strides=(3, 2)),
        L.Conv2DTranspose(5, 3, strides=2, padding="same", output_padding=1),
    ),
    "convolutions of films": lambda: several(
        (5, 6, 7, 2), L.Conv3D(4, (2, 3, 3), strides=(1, 2, 2), padding="same"), L.Conv3D(4, 2, groups=2),
        L.Conv3DTranspose(3, 2, strides=2), L.MaxPooling3D(2), L.AveragePooling3D(2, padding="same"),
        L.GlobalAveragePooling3D(), L.ZeroPadding3D((1, 0, 2)), L.Cropping3D(((1, 1), (0, 2), (2, 0))),
        L.UpSampling3D((2, 1, 2)),
    ),
    "linear layers": lambda: several(
        (5, 6), L.Dense(7, activation="swish"), L.Dense(7, use_bias=False), lambda x: L.Dense(3)(L.Flatten()(x)),
        L.EinsumDense("abc,cd->abd", (None, 7), bias_axes="d"),
        L.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de"),
        L.EinsumDense("abc,bcd->ad", 4), L.EinsumDense("...x,xy->...y", 4), L.EinsumDense("abc,bcd->abd", (5, 4)),
        lambda x: L.Dot(axes=(1, 1))([x, L.Dense(4)(x)]), lambda x: L.Dot(axes=2)([x, x]),
        L.TimeDistributed(L.Dense(3)),
    ),
    "norms": lambda: several(
        (4, 4, 6), L.BatchNormalization(), L.BatchNormalization(axis=1, scale=False), L.LayerNormalization(),
        L.LayerNormalization(axis=(1, 2, 3)), L.LayerNormalization(axis=1), L.LayerNormalization(axis=(1, 3)),
        L.LayerNormalization(scale=False, center=False), L.RMSNormalization(), L.GroupNormalization(3),
        L.GroupNormalization(-1), L.UnitNormalization(), L.UnitNormalization(axis=(1, 2)),
        L.SpectralNormalization(L.Conv2D(3, 2)), lambda x: ops.normalize(x, axis=1),
        L.Normalization(mean=[0, 1, 2, 3, 4, 5], variance=[1, 2, 3, 4, 5, 6]), L.Normalization(mean=1.0, variance=4.0),
        L.Rescaling(0.5, 1.0), L.Rescaling([1.0, 2, 3, 4, 5, 6], -1.0),
    ),
    "pools": lambda: several(
        (9, 7, 3), L.MaxPooling2D(), L.MaxPooling2D(3, 2, "same"), L.AveragePooling2D((2, 3), padding="same"),
        L.AveragePooling2D(3, 2), L.GlobalMaxPooling2D(), L.GlobalAveragePooling2D(keepdims=True),
        L.AdaptiveAveragePooling2D((4, 3)), L.AdaptiveMaxPooling2D((4, 3)),
        lambda x: ops.max_pool(x, 2, padding="same"),
        lambda x: L.MaxPooling1D(2)(x[:, :, 0]), lambda x: L.AveragePooling1D(3, 2, "same")(x[:, 0]),
        lambda x: L.GlobalMaxPooling1D()(x[:, 0]),
    ),
    "moves": lambda: several(
        (6, 8, 4), L.ZeroPadding2D(((1, 2), (0, 3))), L.Cropping2D(((1, 2), (0, 3))), L.UpSampling2D((2, 3)),
        L.UpSampling2D(2, interpolation="bilinear"), L.UpSampling2D(2, interpolation="bicubic"), L.Resizing(9, 5),
        L.Resizing(4, 11, interpolation="nearest"), L.Resizing(9, 5, interpolation="bicubic"),
        lambda x: ops.image.resize(x, (3, 4)), L.Reshape((8, -1)), L.Permute((3, 1, 2)), L.Flatten(),
        lambda x: L.RepeatVector(3)(x[:, 0, 0]), lambda x: L.Concatenate(axis=1)([x, x[:, :2]]),
        lambda x: L.UpSampling1D(2)(x[:, 0]), lambda x: L.ZeroPadding1D(2)(x[:, 0]),
        lambda x: L.Cropping1D((1, 2))(x[:, 0]),
        lambda x: x[:, ::-1, 1:-1:2, None, -1], lambda x: ops.pad(x, ((0, 0), (1, 1), (2, 0), (0, 1)), "reflect"),
        lambda x: ops.repeat(ops.tile(x, (1, 2, 1, 1)), 2, axis=2), lambda x: ops.flip(x, 1),
        lambda x: ops.moveaxis(ops.swapaxes(x, 1, 2), 3, 1), lambda x: ops.concatenate(ops.unstack(x, axis=2), -1),
        lambda x: ops.squeeze(x[:, :1], 1), lambda x: ops.glu(x, axis=2),
        lambda x: ops.cumsum(ops.tril(x), axis=1), lambda x: ops.top_k(x, 2)[0], lambda x: ops.nn.depth_to_space(x, 2),
        lambda x: ops.nn.space_to_depth(x, 2), lambda x: ops.image.extract_patches(x, 3, strides=2, padding="same"),
    ),
    "arithmetic": lambda: several(
        (5, 6), lambda x: L.Average()([x, x * 2, x + 1]), lambda x: L.Maximum()([x, -x]),
        lambda x: L.Minimum()([x, -x]),
        lambda x: L.Subtract()([x, ops.square(x)]), lambda x: L.Multiply()([x, x]), lambda x: x**3 // 0.7 + x % 0.3,
        lambda x: ops.where(x > 0.2, ops.log1p(ops.abs(x)), ops.expm1(x)), lambda x: ops.cast(x * 3, "int32") > 1,
        lambda x: ops.logical_and(x > 0, ops.logical_not(x >= 0.5)), lambda x: ops.std(x, axis=1, keepdims=True),
        lambda x: ops.var(x, axis=-1), lambda x: ops.any(x > 1.5, axis=-1), lambda x: ops.all(x > -1.5, axis=-1),
        lambda x: ops.argmax(x, axis=-1), lambda x: ops.logsumexp(x, axis=1), lambda x: ops.clip(x, -0.5, 0.5),
        lambda x: ops.rsqrt(ops.abs(x) + 1), lambda x: ops.log2(ops.abs(x) + 1) - ops.log10(ops.abs(x) + 1),
        lambda x: ops.erf(x) + ops.arctan(x) * ops.sinh(x), lambda x: ops.prod(x, axis=1),
        lambda x: ops.ones_like(x) + x,
        lambda x: x / np.arange(1, 7, dtype="float32"), lambda x: 1.0 - ops.not_equal(x, 0),
    ),
    "recurrent": lambda: several(
        (4, 5), L.LSTM(6), L.LSTM(6, return_sequences=True, go_backwards=True), L.GRU(6), L.GRU(6, reset_after=False),
        L.GRU(6, activation="elu"), L.LSTM(6, activation="linear"),
        L.SimpleRNN(6, activation="relu"), L.LSTM(6, use_bias=False, recurrent_activation="hard_sigmoid"),
        L.Bidirectional(L.LSTM(6, return_sequences=True)), L.Bidirectional(L.GRU(6), merge_mode="sum"),
        L.RNN([L.LSTMCell(6), L.GRUCell(4)], return_sequences=True),
        lambda x: ops.concatenate(L.GRU(6, return_state=True)(x, initial_state=L.Dense(6)(x[:, 0])), -1),
    ),
    "what counts": lambda: words(
        lambda y: ops.concatenate(
            [
                L.LSTM(6)(y), L.GlobalAveragePooling1D()(y),
                L.GlobalMaxPooling1D()(L.Bidirectional(L.GRU(4, return_sequences=True))(y)),
                L.GlobalAveragePooling1D()(L.MultiHeadAttention(2, 8)(y, y, use_causal_mask=True)),
                L.SimpleRNN(5)(L.Masking(0.0)(ops.relu(y - 1.5))),
            ],
            axis=-1,
        )
    ),
    "attention": lambda: series(
        lambda y: ops.concatenate(
            [
                L.GlobalAveragePooling1D()(each)
                for each in (
                    L.MultiHeadAttention(4, 3, value_dim=5)(y, y), L.GroupQueryAttention(4, 6, 2)(y, y),
                    L.Attention()([y, y]), L.AdditiveAttention()([y, y]),
                    ops.reshape(ops.dot_product_attention(*[ops.reshape(y, (-1, 8, 4, 4))] * 3), (-1, 8, 16)),
                )
            ],
            axis=-1,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_answers_as_keras_does(name: str) -> None:
    same(shaken(FAMILIES[name]()))


@settings(max_examples=15, deadline=None)
@given(
    st.tuples(st.integers(4, 9), st.integers(4, 9)),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.sampled_from(["same", "valid"]),
    st.sampled_from(["conv", "grouped", "depthwise", "transposed", "max", "mean"]),
)
def test_the_geometry_of_windows_is_tensorflows(
    size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int], padding: str,
    kind: str,
) -> None:  # fmt: skip
    assume(max(stride) == 1 or max(dilation) == 1)
    assume(kind != "transposed" or max(dilation) == 1)
    assume(kind != "depthwise" or stride[0] == stride[1])  # TensorFlow computes no other
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation if kind not in ("max", "mean") else (1, 1), strict=True)]
    assume(padding == "same" or all(r <= n for r, n in zip(reach, size, strict=True)))
    more = {"strides": stride, "padding": padding}
    layer = {
        "conv": lambda: L.Conv2D(3, kernel, dilation_rate=dilation, **more),
        "grouped": lambda: L.Conv2D(6, kernel, groups=2, dilation_rate=dilation, **more),
        "depthwise": lambda: L.DepthwiseConv2D(kernel, depth_multiplier=2, dilation_rate=dilation, **more),
        "transposed": lambda: L.Conv2DTranspose(3, kernel, dilation_rate=dilation, **more),
        "max": lambda: L.MaxPooling2D(kernel, **more),
        "mean": lambda: L.AveragePooling2D(kernel, **more),
    }[kind]()
    x = keras.Input((*size, 4))
    same(shaken(keras.Model(x, layer(x))))


def test_no_transposition_is_left_between_convolutions() -> None:
    x = i = keras.Input((8, 8, 3), name="image")
    x = L.Conv2D(8, 3, padding="same", activation="relu")(x)
    y = L.BatchNormalization()(L.DepthwiseConv2D(3, padding="same")(L.ReLU(6)(L.Conv2D(8, 1)(x))))
    gate = L.Conv2D(8, 1, activation="sigmoid")(L.Reshape((1, 1, 8))(L.GlobalAveragePooling2D()(y)))
    x = L.Concatenate()([L.Add()([x, y * gate]), L.MaxPooling2D(3, 1, "same")(x)])
    x = ops.transpose(ops.transpose(x, (0, 3, 1, 2)), (0, 2, 3, 1))
    x = L.UpSampling2D()(L.ZeroPadding2D(1)(x))
    net = keras.Model(i, L.Dense(3)(L.GlobalAveragePooling2D()(L.Conv2D(4, 3)(x))))
    kinds = Counter(same(shaken(net)))
    assert kinds["Transpose"] == 1 and kinds["Conv"] == 5
    assert "BatchNormalization" not in kinds


def test_names_order_layout_and_batch_are_those_of_keras(tmp_path: Path) -> None:
    b, a = keras.Input((3,), name="zebra"), keras.Input((4, 4, 2), name="ant")
    outputs = {"late": L.Dense(2)(b), "early": L.Conv2D(3, 2)(a), "ant": a}
    model = sl.load(keras.Model([b, a], outputs))
    session = onnxruntime.InferenceSession(sl.export(model, "onnxruntime", tmp_path))
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("zebra", ["batch", 3]), ("ant", ["batch", 4, 4, 2])]
    assert [o.name for o in session.get_outputs()] == ["ant.output", "early", "late"]
    assert session.get_outputs()[1].shape == ["batch", 3, 3, 3]
    first = sl.export(model, "onnxruntime", tmp_path / "again")
    assert first.read_bytes() == next(tmp_path.glob("*.onnx")).read_bytes()


def test_sizes_that_are_open_stay_open(tmp_path: Path) -> None:
    x = i = keras.Input((None, None, 3))
    x = L.Conv2D(4, 3, strides=2, padding="same", activation="relu")(x)
    x = L.GroupNormalization(2)(L.MaxPooling2D(padding="same")(x))
    net = shaken(keras.Model(i, [L.Dense(3)(x), L.GlobalAveragePooling2D()(x)]))
    model = sl.load(net, (np.zeros((2, 8, 8, 3), np.float32),))
    session = onnxruntime.InferenceSession(sl.export(model, "onnxruntime", tmp_path))
    image = np.random.default_rng(0).normal(size=(1, 11, 6, 3)).astype("float32")
    for theirs, mine in zip(session.run(None, {session.get_inputs()[0].name: image}), net(image), strict=True):
        np.testing.assert_allclose(theirs, mine, atol=1e-5)


REFUSED = {
    "sparsemax": (lambda: tokens(ops.sparsemax), "Sparsemax"),
    "convolutional": (lambda: several((3, 6, 6, 2), L.ConvLSTM2D(3, 2)), "ConvLSTM2D"),
    "a kernel that is computed": (
        lambda: images(lambda y: ops.conv(y, ops.reshape(ops.mean(y, (0, 1, 2)), (1, 1, 16, 1)))), "computed",
    ),
    "half": (lambda: several((4,), L.Dense(3, dtype="float16")), "float"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_covered_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    build, reason = REFUSED[name]
    with pytest.raises(sl.SlimlineError, match=reason) as refusal:
        sl.export(model_of(build()), "onnxruntime", tmp_path)
    assert "\n" not in str(refusal.value) and not list(tmp_path.iterdir())


def small() -> keras.Model:
    """A convolutional network with a residual, a depthwise and two fully connected layers."""
    keras.utils.set_random_seed(0)
    x = i = keras.Input((12, 12, 3), name="image")
    x = L.Conv2D(16, 3, padding="same", activation="relu", name="stem")(x)
    y = L.ReLU()(L.BatchNormalization()(L.Conv2D(16, 3, padding="same", use_bias=False, name="first")(x)))
    y = L.Activation("silu")(L.DepthwiseConv2D(3, padding="same", name="depthwise")(y))
    x = L.ReLU()(L.Add(name="sum")([x, L.Conv2D(16, 1, name="second")(y)]))
    x = L.Conv2D(24, 3, strides=2, padding="same", activation="relu", name="third")(L.MaxPooling2D()(x))
    x = L.Dense(32, activation="relu", name="hidden")(L.GlobalAveragePooling2D()(x))
    return keras.Model(i, L.Dense(10, name="head")(x))


@pytest.fixture(scope="module")
def rounded() -> sl.Model:
    """The small network on the grids of ONNX Runtime."""
    images = np.random.default_rng(0).normal(size=(64, 12, 12, 3)).astype("float32")
    step = sl.StaticQuantization(undo=False)
    return sl.apply(sl.load(shaken(small())), step, sl.Data(calibration=images), target="onnxruntime")


LAYERS_OF_SMALL = ("stem", "first", "depthwise", "second", "sum/Add", "third", "hidden", "head")


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_integers_are_those_of_the_simulation(rounded: sl.Model, target: str, tmp_path: Path) -> None:
    path = sl.export(rounded, target, tmp_path)
    kinds = runtime(target).integer_layers(path)
    layers = LAYERS_OF_SMALL if target == "onnxruntime" else [n for n in LAYERS_OF_SMALL if "/" not in n]
    assert {name: kinds.get(name) for name in layers} == dict.fromkeys(layers, "integer")
    x = np.random.default_rng(2).normal(size=(256, 12, 12, 3)).astype("float32")
    theirs, mine = runtime(target).load(path).run((x,)), rounded.outputs(x)[0]
    assert (theirs.argmax(1) == mine.argmax(1)).mean() > (0.99 if target == "onnxruntime" else 0.97)
    if target == "onnxruntime":
        held = {t.name: t for t in onnx.load(path).graph.initializer}
        kernels = [t for t in held.values() if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 4]
        assert len(kernels) == 5
        scales = {len(onnx.numpy_helper.to_array(t)) for t in held.values() if t.data_type == 1 and len(t.dims) == 1}
        assert {16, 24} <= scales  # one for each output channel


def films() -> keras.Model:
    """Convolutions over three dimensions."""
    x = keras.Input((4, 6, 6, 4))
    y = L.Conv3D(8, 2, name="second")(L.Conv3D(16, 2, activation="relu", name="first")(x))
    return keras.Model(x, L.Dense(5, name="head")(L.GlobalAveragePooling3D()(y)))


def steps() -> keras.Model:
    """Convolutions over one."""
    x = keras.Input((16, 8))
    y = L.SeparableConv1D(16, 3, strides=2, padding="same", activation="relu", name="first")(x)
    y = L.Conv1D(16, 3, padding="causal", name="second")(L.DepthwiseConv1D(3, dilation_rate=2, name="dilated")(y))
    return keras.Model(x, L.Dense(5, name="head")(L.GlobalAveragePooling1D()(y)))


@pytest.mark.parametrize(
    ("build", "layers"),
    [
        (films, {"first", "second", "head"}),
        (steps, {"first.depthwise", "first.pointwise", "dilated", "second", "head"}),
    ],
)
def test_convolutions_over_one_and_three_dimensions_are_integer(
    build: Callable[[], keras.Model], layers: set[str], tmp_path: Path
) -> None:
    model = sl.load(shaken(build()))
    x = np.random.default_rng(0).normal(size=(32, *model.example[0].shape[1:])).astype("float32")
    data, step = sl.Data(calibration=x), sl.StaticQuantization(undo=False)
    small = sl.apply(model, step, data, target="onnxruntime")
    path = sl.export(small, "onnxruntime", tmp_path)
    kinds = runtime("onnxruntime").integer_layers(path)
    assert {name: kinds.get(name) for name in layers} == dict.fromkeys(layers, "integer")
    theirs, mine = runtime("onnxruntime").load(path).run((x,)), small.outputs(x)[0]
    assert np.abs(theirs - mine).max() < 0.03 * np.abs(mine).max()
    assert np.abs(model.outputs(x)[0] - mine).max() < 0.2 * np.abs(mine).max()
    if build is films:  # and LiteRT has no such kernel
        other = sl.apply(model, step, data, target="litert").quantization
        assert other is not None and other.layers == ("head",)
        assert "more than 2 dimensions" in other.float_layers["first"]


def test_a_model_for_litert_is_not_mistaken(tmp_path: Path) -> None:
    data = sl.Data(calibration=np.zeros((4, 12, 12, 3), np.float32))
    step = sl.StaticQuantization(undo=False)
    model = sl.apply(sl.load(small()), step, data, target="litert")
    with pytest.raises(sl.SlimlineError, match="IntegerActivation"):
        sl.export(model, "onnxruntime", tmp_path)


OTHER_BACKEND = """
import sys
import numpy as np
import keras
import slimline as sl
x = keras.Input((4,))
y = keras.layers.Dense(3)(keras.layers.Dense(8, activation="relu")(x))
model = sl.load(keras.Model(x, y))
small = sl.apply(model, sl.ChannelPruning(ratio=0.5, criterion="l2"))
sl.export(small, "onnxruntime", sys.argv[1])
for step, target in ((sl.ChannelPruning(ratio=0.5, criterion="taylor"), "onnxruntime"), (None, "litert")):
    try:
        sl.apply(model, step) if step else sl.export(small, target, sys.argv[1])
    except sl.SlimlineError as error:
        print(error)
"""


@pytest.mark.slow  # both TensorFlow and torch are imported anew
def test_a_model_on_another_backend_is_written_and_not_trained(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    command = [sys.executable, "-c", OTHER_BACKEND, str(tmp_path)]
    run = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "KERAS_BACKEND": "torch"}, check=False
    )
    assert run.returncode == 0, run.stderr
    assert [p.suffix for p in tmp_path.iterdir()] == [".onnx"]
    training, conversion = run.stdout.splitlines()
    assert "needs gradients, but Keras models on another backend than TensorFlow have none here" in training
    assert "KERAS_BACKEND=tensorflow" in conversion
