"""Small Keras models of many families, with nothing in them trivially zero; `keras.applications` among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import slimline.frameworks.keras  # noqa: F401  # isort: skip
import keras
from keras import layers as L
from keras import ops

Zoo = dict[str, Callable[[], keras.Model]]


def shaken(model: keras.Model, seed: int = 0) -> keras.Model:
    """Random batch-norm statistics, scales and shifts instead of zeros and ones."""
    random = np.random.default_rng(seed)
    for variable in model.variables:
        kind = variable.path.rpartition("/")[2]
        shape = tuple(variable.shape)
        if kind in ("gamma", "moving_variance", "variance", "scale") or "scale" in variable.path:
            variable.assign(random.uniform(0.5, 1.5, shape))
        elif kind in ("beta", "bias", "moving_mean", "alpha"):
            variable.assign(random.normal(0, 0.1, shape))
    return model


def sequential() -> keras.Model:
    return keras.Sequential(
        [
            L.Input((12, 12, 3)),
            L.Conv2D(12, 3, activation="relu", name="first"),
            L.BatchNormalization(),
            L.MaxPooling2D(),
            L.Conv2D(16, 3, padding="same", name="second"),
            L.PReLU(shared_axes=[1, 2]),
            L.Dropout(0.2),
            L.Flatten(),
            L.Dense(20, activation="tanh"),
            L.Dense(5, activation="softmax"),
        ],
        name="sequential",
    )


def nested() -> keras.Model:
    inner_input = keras.Input((8, 8, 12))
    y = L.Conv2D(12, 3, padding="same", activation="relu", name="conv")(inner_input)
    inner = keras.Model(inner_input, [inner_input + y, y], name="inner")
    head = keras.Sequential([L.Input((12,)), L.Dense(16, activation="gelu"), L.Dense(6)], name="head")
    x = keras.Input((8, 8, 3))
    a, b = inner(L.Conv2D(12, 3, padding="same", name="stem")(x))
    c, d = inner(a)
    y = ops.mean(c * b + d, axis=(1, 2))
    return keras.Model(x, head(y), name="nested")


def shared() -> keras.Model:
    left, right = keras.Input((10,), name="left"), keras.Input((10,), name="right")
    one, two = L.Dense(12, activation="relu", name="one"), L.Dense(8, name="two")
    a, b = two(one(left)), two(one(right))
    merged = L.Concatenate()([a, L.Subtract()([a, b]), L.Dot(axes=-1)([a, b])])
    return keras.Model([left, right], L.Dense(3)(merged), name="shared")


def vit() -> keras.Model:
    image = keras.Input((16, 16, 3))
    x = L.Conv2D(24, 4, 4, name="patches")(image)
    x = L.Reshape((-1, 24))(x)
    x = x + np.random.default_rng(0).normal(0, 0.2, (1, 16, 24)).astype("float32")
    for i in range(2):
        y = L.LayerNormalization(name=f"norm{i}a")(x)
        y = L.MultiHeadAttention(4, 6, value_dim=5 + i, dropout=0.1, name=f"attention{i}")(y, y)
        x = x + y
        y = L.LayerNormalization(name=f"norm{i}b")(x)
        y = L.Dense(48, activation="gelu", name=f"mlp{i}a")(y)
        x = L.Add()([x, L.Dense(24, name=f"mlp{i}b")(y)])
    x = L.LayerNormalization()(x)[:, 0]
    return keras.Model(image, L.Dense(5)(x), name="vit")


def group_norm() -> keras.Model:
    image = keras.Input((8, 8, 3))
    x = L.Conv2D(24, 3, padding="same")(image)
    x = L.GroupNormalization(4)(x)
    x = L.ReLU(6)(x)
    y = L.Conv2D(24, 3, padding="same", groups=4, name="grouped")(x)
    y = L.GroupNormalization(-1)(y)
    x = L.Average()([x, y])
    x = L.Conv2D(16, 1)(x)
    x = L.RMSNormalization()(x)
    x = L.LayerNormalization(axis=(1, 2, 3))(x)
    x = L.GlobalMaxPooling2D()(x)
    return keras.Model(image, L.Dense(4)(x), name="group_norm")


def depthwise() -> keras.Model:
    image = keras.Input((12, 12, 3))
    x = L.Conv2D(8, 3, padding="same")(image)
    x = L.DepthwiseConv2D(3, depth_multiplier=2, padding="same", activation="relu", name="depthwise")(x)
    x = L.BatchNormalization(scale=False)(x)
    x = L.SeparableConv2D(12, 3, activation="relu6", name="separable")(x)
    squeeze = L.GlobalAveragePooling2D(keepdims=True)(x)
    squeeze = L.Conv2D(4, 1, activation="relu")(squeeze)
    x = L.Multiply()([x, L.Conv2D(12, 1, activation="sigmoid")(squeeze)])
    x = L.Cropping2D(1)(L.ZeroPadding2D(2)(x))
    return keras.Model(image, L.Dense(4)(L.Flatten()(x)), name="depthwise")


def unet() -> keras.Model:
    image = keras.Input((16, 16, 2))
    a = L.Conv2D(8, 3, padding="same", activation="relu", name="down1")(image)
    b = L.Conv2D(12, 3, padding="same", activation="elu", name="down2")(L.AveragePooling2D(2)(a))
    c = L.Conv2D(16, 3, padding="same", activation="silu", name="middle")(L.MaxPooling2D()(b))
    y = L.Conv2DTranspose(12, 2, 2, name="up2")(c)
    y = L.Conv2D(12, 3, padding="same", activation="relu")(L.Concatenate()([b, y]))
    y = L.UpSampling2D(interpolation="bilinear")(y)
    y = L.Conv2D(8, 3, padding="same")(ops.concatenate([a, y], axis=-1))
    return keras.Model(image, L.Conv2D(2, 1)(y), name="unet")


def lstm() -> keras.Model:
    words = keras.Input((7,), dtype="int32")
    x = L.Embedding(30, 12)(words)
    x = L.Conv1D(16, 3, padding="causal", activation="relu", name="conv")(x)
    x = L.Bidirectional(L.LSTM(6, return_sequences=True))(x)
    x = L.GRU(8)(x)
    return keras.Model(words, L.Dense(3)(L.Dense(10, activation="relu", name="hidden")(x)), name="lstm")


def shuffled() -> keras.Model:
    """Splits, channel shuffle, padded shortcuts, indexing, transposes: what only bare operations say."""
    image = keras.Input((8, 8, 3))
    x = L.Conv2D(16, 3, padding="same", name="stem")(image)
    a, b = ops.split(x, 2, axis=-1)
    b = L.Conv2D(8, 3, padding="same", activation="relu", name="branch")(b)
    x = ops.concatenate([a, b], axis=-1)
    x = ops.reshape(ops.transpose(ops.reshape(x, (-1, 8, 8, 2, 8)), (0, 1, 2, 4, 3)), (-1, 8, 8, 16))
    y = L.Conv2D(24, 3, padding="same", name="wide")(x)
    x = ops.pad(x, ((0, 0), (0, 0), (0, 0), (4, 4))) + y
    gate, value = x[..., :12], ops.take(x, np.arange(23, 11, -1), axis=-1)
    x = ops.sigmoid(gate) * value
    every = x[:, 1:, :, ::2]
    x = ops.stack([ops.max(every, axis=(1, 2)), ops.std(every, axis=(1, 2))], axis=1)
    x = ops.matmul(x, ops.swapaxes(x, 1, 2))
    return keras.Model(image, L.Dense(3)(L.Flatten()(x)), name="shuffled")


def attention_ops() -> keras.Model:
    """Attention from bare operations, with a mean over the width."""
    tokens = keras.Input((6, 10))
    q, k, v = (ops.reshape(L.Dense(24, name=name)(tokens), (-1, 6, 4, 6)) for name in ("query", "key", "value"))
    x = ops.reshape(ops.dot_product_attention(q, k, v), (-1, 6, 24))
    scores = ops.softmax(ops.einsum("btnd,bsnd->bnts", q, k) * 0.3, axis=-1)
    y = ops.reshape(ops.einsum("bnts,bsnd->btnd", scores, v), (-1, 6, 24))
    x = L.EinsumDense("...x,xy->...y", output_shape=20, bias_axes="y", name="mix")(x + y)
    x = x - ops.mean(x, axis=-1, keepdims=True)
    x = x / ops.sqrt(ops.mean(ops.square(x), axis=-1, keepdims=True) + 1e-3)
    return keras.Model(tokens, L.Dense(3)(x), name="attention_ops")


def scaled() -> keras.Model:
    """ConvNeXt's block, with the layers that `keras.applications` keeps to itself."""
    from keras.src.applications.convnext import LayerScale, StochasticDepth

    image = keras.Input((8, 8, 3))
    x = L.Conv2D(12, 2, 2, name="stem")(image)
    for i in range(2):
        y = L.DepthwiseConv2D(3, padding="same", name=f"depthwise{i}")(x)
        y = L.Dense(24, activation="gelu", name=f"wide{i}")(L.LayerNormalization(name=f"norm{i}")(y))
        y = LayerScale(1e-6, 12, name=f"scale{i}")(L.Dense(12, name=f"narrow{i}")(y))
        x = x + StochasticDepth(0.1, name=f"depth{i}")(y)
    return keras.Model(image, L.Dense(4, name="head")(L.GlobalAveragePooling2D()(x)), name="scaled")


def residual() -> keras.Model:
    from slimline.zoo.keras import residual_cnn

    return residual_cnn((8, 12, 16), blocks=1, size=16)


def _application(name: str, size: int, **options: Any) -> Callable[[], keras.Model]:
    def build() -> keras.Model:
        keras.utils.set_random_seed(0)
        return getattr(keras.applications, name)(weights=None, input_shape=(size, size, 3), classes=10, **options)

    return build


SMALL: Zoo = {
    f.__name__: f
    for f in (
        sequential, nested, shared, vit, group_norm, depthwise, unet, lstm, shuffled, attention_ops, residual, scaled,
    )
}  # fmt: skip
APPLICATIONS: Zoo = {
    "VGG16": _application("VGG16", 32),
    "ResNet50": _application("ResNet50", 32),
    "ResNet50V2": _application("ResNet50V2", 32),
    "MobileNetV2": _application("MobileNetV2", 32, alpha=0.35),
    "DenseNet121": _application("DenseNet121", 32),
    "EfficientNetB0": _application("EfficientNetB0", 32),
}
