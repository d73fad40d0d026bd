"""Bare functions: which axes pass through them, and which do not."""

from __future__ import annotations

import numpy as np
import pytest

from tests.frameworks.keras.blocks import agree, frozen, images, model_of, pruned, series, tokens

import keras  # isort: skip
from keras import layers as L  # isort: skip
from keras import ops  # isort: skip

RNG = np.random.default_rng(0)


def weights(*shape):
    return np.random.default_rng(1).normal(0, 0.3, shape).astype("float32")


class Standardised(L.Layer):
    """A convolution whose kernel is normalised before it is used."""

    def build(self, shape) -> None:
        self.kernel = self.add_weight(shape=(3, 3, shape[-1], 24), initializer="normal", name="kernel")

    def call(self, x):
        mean, variance = ops.moments(self.kernel, axes=[0, 1, 2], keepdims=True)
        return ops.conv(ops.sigmoid(x), (self.kernel - mean) / ops.sqrt(variance + 1e-3), padding="same")


class Normed(L.Layer):
    """Layer, root-mean-square and batch normalisation by weights of its own."""

    def build(self, shape) -> None:
        names = ("gamma", "beta", "scale", "mean", "variance")
        for name in names:
            setattr(self, name, self.add_weight(shape=(shape[-1],), initializer="ones", name=name))

    def call(self, x):
        y = ops.layer_normalization(x, self.gamma, self.beta) + ops.rms_normalization(x, self.scale)
        return ops.batch_normalization(y, self.mean, self.variance, axis=-1, offset=self.beta, scale=self.scale)


EXACT = {
    "a stored matrix": lambda: tokens(lambda y: ops.matmul(y, weights(16, 20))),
    "a dot": lambda: tokens(lambda y: ops.dot(y, weights(16, 20))),
    "einsum with dots": lambda: tokens(lambda y: ops.einsum("...i,io->...o", y, weights(16, 20))),
    "einsum, weight first": lambda: tokens(lambda y: ops.einsum("oi,bti->bto", weights(20, 16), y)),
    "a contraction": lambda: tokens(lambda y: ops.tensordot(y, weights(16, 3, 5), axes=1)[..., 0]),
    "contracted pairs": lambda: tokens(lambda y: ops.tensordot(y, weights(5, 16), axes=[[2], [1]])),
    "convolution": lambda: images(lambda y: ops.conv(y, weights(3, 3, 16, 24), strides=2, padding="same")),
    "depthwise": lambda: images(lambda y: ops.depthwise_conv(y, weights(3, 3, 16, 2))),
    "a computed kernel": lambda: images(lambda y: Standardised(name="standard")(y)),
    "norms": lambda: tokens(lambda y: Normed(name="normed")(L.Dense(16)(y))),
    "depth to space": lambda: images(lambda y: ops.nn.depth_to_space(L.Conv2D(48, 1)(y), 2)),
    "space to depth": lambda: images(lambda y: ops.nn.space_to_depth(y, 2)),
    "patches": lambda: images(lambda y: ops.image.extract_patches(y, (2, 2))),
    "blocks of a slice": lambda: tokens(lambda y: ops.slice(y, (0, 0, 4), (-1, 8, 12))),
    "backwards": lambda: tokens(lambda y: y[..., ::-1] * 2 + 1),
    "statistics": lambda: tokens(
        lambda y: y / (1 + ops.max(y, -1, keepdims=True) - ops.median(y, -1, keepdims=True))
        + ops.prod(ops.tanh(y), -1, keepdims=True)
    ),
    "all lengths": lambda: images(lambda y: y / (1 + ops.norm(y, axis=(1, 3), keepdims=True))),
    "divided by what goes": lambda: series(
        lambda y: ops.mean(ops.log(ops.abs(y)) + y / L.Dense(16)(y) + 2 / ops.square(y), axis=1)
    ),
    "truth": lambda: tokens(lambda y: ops.where(np.arange(16) % 3 > 0, y, -y)),
    "rows of a table": lambda: tokens(
        lambda y: y + ops.take(weights(5, 16), ops.cast(ops.argmax(y[..., :4], axis=-1), "int32"), axis=0)
    ),
    "a table of rows": lambda: tokens(lambda y: ops.take(y, np.arange(8).reshape(4, 2), axis=1)[:, :, 0]),
    "softmax of several": lambda: images(lambda y: y * L.Softmax(axis=(1, 2))(y)),
    "sparsemax": lambda: tokens(lambda y: ops.sparsemax(y)),
    "pooled to a size": lambda: images(lambda y: L.AdaptiveAveragePooling2D(2)(y) + L.AdaptiveMaxPooling2D(2)(y)),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_a_function_is_pruned_exactly(name):
    source = EXACT[name]()
    model = model_of(source)
    agree(source, model)
    assert not any(node.kind == "unknown" for node in model.graph.nodes)
    pruned(model, 0.15)


STAYS = {
    "sort": (lambda y: ops.sort(y, axis=-1), "place on this axis matters"),
    "argmax": (lambda y: ops.one_hot(ops.argmax(y, axis=-1), 16), "is the result"),
    "top": (lambda y: ops.top_k(y, 3)[0], "TopK"),
    "triangle": (lambda y: ops.tril(y), "the diagonal counts"),
    "places of a table": (lambda y: ops.take(y, [[0, 1], [2, 3]], axis=-1)[..., 0], "chosen by a table"),
    "an inverse": (lambda y: ops.linalg.pinv(y), "no rule"),
    "code": (lambda y: L.Lambda(lambda v: v * 2, name="code")(y), "Lambda in code"),
    "numbers of its own": (lambda y: L.Rescaling(list(range(1, 17)))(y), "number of its config"),
}


@pytest.mark.parametrize("name", STAYS)
def test_an_axis_on_which_places_matter_stays(name):
    body, reason = STAYS[name]
    x = keras.Input((8, 16))
    y = body(L.Dense(16, name="embed")(x))
    model = model_of(keras.Model(x, L.Dense(5)(L.Flatten()(y))))
    assert reason in frozen(model)["embed (o)"]
