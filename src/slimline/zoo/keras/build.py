"""Architectures of the zoo as functional Keras models."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ParamSpec

import slimline.frameworks.keras  # noqa: F401  chooses the backend before keras is imported  # isort: skip
import keras
from keras import ops

from slimline.frameworks.keras.weight import Weight
from slimline.zoo import blocks
from slimline.zoo.blocks import Architecture, Block

P = ParamSpec("P")
L = keras.layers


def build(architecture: Architecture) -> keras.Model:
    """A functional model of an architecture, of the size of input that it says.

    Images ``(batch, size, size, channels)`` float32, or tokens ``(batch, length)`` int32 and a float32 mask of this
    shape come in; ``(batch, classes)`` logits come out. Layers are called as in torch with ``_`` for ``.``.
    """
    source = architecture.input
    if isinstance(source, blocks.Image):
        inputs = x = keras.Input((source.size, source.size, source.channels), name="image")
        bias = None
    else:
        x = keras.Input((source.length,), name="tokens", dtype="int32")
        mask = keras.Input((source.length,), name="mask")
        inputs = [x, mask]
        bias = L.Reshape((1, 1, source.length), name="mask_keys")((1.0 - mask) * blocks.MASKED)
    for name, part in architecture.network.parts:
        x = _output(part, x, name, bias)
    return keras.Model(inputs, x, name=architecture.name)


def _output(block: Block, x: Any, name: str, bias: Any) -> Any:
    """What a block called `name` makes of a tensor; `bias` is added to the scores of attention."""
    match block:
        case blocks.Serial(parts):
            for key, part in parts:
                x = _output(part, x, f"{name}_{key}", bias)
            return x
        case blocks.Parallel(function, branches):
            outputs = [_output(branch, x, f"{name}_{key}", bias) for key, branch in branches]
            merge = {"sum": L.Add, "product": L.Multiply, "concat": L.Concatenate}[function]
            return merge(name=f"{name}_{function}")(outputs) if len(outputs) > 1 else outputs[0]
        case blocks.Attention():
            return _attention(block, x, name, bias)
        case blocks.Identity():
            return x
        case blocks.Conv(kernel=kernel, stride=stride):
            fits = stride == 1 and kernel == 2 * block.pad + 1
            if not fits:
                x = _padded(x, block.pad, name)
            return _conv(block, "same" if fits else "valid", name)(x)
        case blocks.Pool(function, kernel, stride, padding, ceil):
            places = x.shape[1] + 2 * padding - kernel
            x = _padded(x, padding, name, -places % stride if ceil else 0)
            pool = L.MaxPooling2D if function == "max" else L.AveragePooling2D
            return pool(kernel, stride, name=name)(x)
        case blocks.Activation():
            return _activation(block.function, name)(x)
        case blocks.Shuffle(groups):
            _, height, width, channels = x.shape
            x = ops.reshape(x, (-1, height, width, groups, channels // groups))
            return ops.reshape(ops.transpose(x, (0, 1, 2, 4, 3)), (-1, height, width, channels))
        case blocks.Channels(start, stop):
            return x[..., start:stop]
        case blocks.Places():
            return L.Reshape((-1, x.shape[-1]), name=name)(x)
        case blocks.ClassToken(width):
            token = ops.zeros_like(x[:, :1]) + _weight((1, 1, width), x, name)
            return L.Concatenate(axis=1, name=f"{name}_concat")([token, x])
        case blocks.Positions(length, width):
            return x + _weight((1, length, width), x, name)
        case blocks.First():
            return x[:, 0]
        case _:
            return _layer(block, name)(x)


def _layer(block: Block, name: str) -> Any:
    """What is one layer in Keras, too."""
    match block:
        case blocks.BatchNorm(_, epsilon, momentum):
            return L.BatchNormalization(momentum=1 - momentum, epsilon=epsilon, name=name)
        case blocks.LayerNorm(_, epsilon):
            return L.LayerNormalization(epsilon=epsilon, name=name)
        case blocks.GlobalPool(places):
            return L.GlobalAveragePooling2D(keepdims=places, name=name)
        case blocks.Linear(_, outputs):
            return L.Dense(outputs, name=name)
        case blocks.Dropout(rate):
            return L.Dropout(rate, name=name)
        case blocks.Embedding(count, width):
            return L.Embedding(count, width, keras.initializers.RandomNormal(stddev=blocks.DEVIATION), name=name)
    raise AssertionError(block)


def _conv(block: blocks.Conv, padding: str, name: str) -> Any:
    if block.depthwise:
        return L.DepthwiseConv2D(block.kernel, block.stride, padding, use_bias=block.bias, name=name)
    return L.Conv2D(
        block.outputs, block.kernel, block.stride, padding, groups=block.groups, use_bias=block.bias, name=name
    )


def _padded(x: Any, places: int, name: str, more: int = 0) -> Any:
    """An image with zeros on all sides, and `more` to the right and below."""
    if not places and not more:
        return x
    return L.ZeroPadding2D(((places, places + more), (places, places + more)), name=f"{name}_pad")(x)


def _activation(function: blocks.Function, name: str) -> Any:
    match function:
        case "relu":
            return L.ReLU(name=name)
        case "relu6":
            return L.ReLU(6.0, name=name)
        case "hard_swish":
            return L.Activation("hard_silu", name=name)
        case _:
            return L.Activation(function, name=name)


def _weight(shape: tuple[int, ...], anchor: Any, name: str) -> Any:
    layer = Weight(shape, name=name)
    tensor = layer(anchor)
    layer.value.assign(keras.random.normal(shape, stddev=blocks.DEVIATION))
    return tensor


def _attention(block: blocks.Attention, x: Any, name: str, bias: Any) -> Any:
    length, head_width = x.shape[1], block.width // block.heads
    project = {key: L.Dense(linear.outputs, name=f"{name}_{key}") for key, linear in block.projections}

    def heads(key: str, order: tuple[int, ...]) -> Any:
        return ops.transpose(ops.reshape(project[key](x), (-1, length, block.heads, head_width)), order)

    scores = ops.matmul(heads("query", (0, 2, 1, 3)), heads("key", (0, 2, 3, 1))) / math.sqrt(head_width)
    shares = L.Softmax(name=f"{name}_softmax")(scores if bias is None else scores + bias)
    y = ops.transpose(ops.matmul(shares, heads("value", (0, 2, 1, 3))), (0, 2, 1, 3))
    return project["out"](ops.reshape(y, (-1, length, block.width)))


def builds(describe: Callable[P, Architecture]) -> Callable[P, keras.Model]:
    """A factory of models, with the settings of the function that describes their architecture."""

    @functools.wraps(describe)
    def factory(*args: P.args, **kwargs: P.kwargs) -> keras.Model:
        return build(describe(*args, **kwargs))

    return factory
