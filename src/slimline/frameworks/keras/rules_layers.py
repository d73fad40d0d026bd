"""One rule per Keras layer: which neutral operator it is. Variables keep Keras' channels-last layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import keras
from keras.src.applications import convnext, inception_resnet_v2  # their layers have no public name

from slimline.frameworks.keras.functional import Call
from slimline.frameworks.keras.reader import NoRule, Reader
from slimline.frameworks.keras.rules_masks import masking, softmax
from slimline.graph import ops
from slimline.graph.equation import Window

Rule = Callable[[Reader, Call], None]
L = keras.layers

ELEMENTWISE_ACTIVATIONS = {
    "celu", "elu", "exponential", "gelu", "hard_shrink", "hard_sigmoid", "hard_silu", "hard_swish", "hard_tanh",
    "leaky_relu", "linear", "log_sigmoid", "mish", "relu", "relu6", "selu", "sigmoid", "silu", "soft_shrink",
    "softplus", "softsign", "sparse_plus", "squareplus", "swish", "tanh", "tanh_shrink", "threshold",
}  # fmt: skip


def spatial_axes(rank: int, data_format: str) -> tuple[int, ...]:
    """The dimensions between batch and channels."""
    return tuple(range(1, rank - 1) if data_format == "channels_last" else range(2, rank))


def last_channels(layer: Any) -> None:
    """Refuse ``channels_first``, which TensorFlow on a CPU cannot compute either."""
    if layer.data_format != "channels_last":
        raise NoRule("slimline reads only data_format='channels_last'")


def conv(transposed: bool = False, depthwise: bool = False) -> Rule:
    """Rule of a convolution."""

    def rule(reader: Reader, call: Call) -> None:
        layer = call.operation
        last_channels(layer)
        x, shape = reader.single(call)
        groups = 1 if transposed or depthwise else layer.groups
        window = None if transposed else _window(layer)
        attributes = ops.conv(
            len(shape) - 2, groups, transposed, channels_last=True, depthwise=depthwise, window=window
        )
        bias = reader.parameter(layer.bias) if layer.use_bias else None
        reader.node(call, "conv", [x, reader.parameter(layer.kernel), bias], attributes)

    return rule


def _window(layer: Any) -> Window:
    kernel, dilation = layer.kernel_size, layer.dilation_rate
    padding: Any = "ceil"
    if layer.padding != "same":
        causal = layer.padding == "causal"
        padding = tuple((d * (k - 1) if causal else 0, 0) for k, d in zip(kernel, dilation, strict=True))
    return Window(tuple(layer.strides), tuple(dilation), padding)


def dense(reader: Reader, call: Call) -> None:
    """`Dense` works on the last dimension of any rank."""
    layer = call.operation
    x, shape = reader.single(call)
    bias = reader.parameter(layer.bias) if layer.use_bias else None
    reader.node(call, "linear", [x, reader.parameter(layer.kernel), bias], ops.linear(len(shape), "i o"))


def einsum_dense(reader: Reader, call: Call) -> None:
    """`EinsumDense`; an ellipsis becomes letters of its own."""
    layer = call.operation
    x, shape = reader.single(call)
    left, right = layer.equation.replace(" ", "").split("->")
    operand, weight = left.split(",")
    free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in layer.equation]
    dots = "".join(free[: len(shape) - len(operand.replace("...", ""))])
    operand, right = operand.replace("...", dots), right.replace("...", dots)
    distinct = len(set(operand)) == len(operand) and len(set(weight)) == len(weight)
    if not distinct or "." in weight or layer.equation.rstrip().endswith("."):
        raise NoRule(f"slimline has no rule for the equation {layer.equation!r}")
    inputs = [x, reader.parameter(layer.kernel)]
    text = f"{operand},{weight}"
    if layer.bias is not None:
        sizes = tuple(layer.bias.shape)
        letters = right[len(right) - len(sizes) :]
        text += "," + "".join(c if c in layer.bias_axes else "1" for c in letters)
        inputs.append(reader.parameter(layer.bias))
    reader.node(call, "einsum", inputs, ops.einsum(f"{text}->{right}", weights=True))


def embedding(reader: Reader, call: Call) -> None:
    """`Embedding`."""
    indices, shape = reader.single(call)
    reader.node(call, "embedding", [indices, reader.parameter(call.operation.embeddings)], ops.embedding(len(shape)))


def batch_norm(reader: Reader, call: Call) -> None:
    """`BatchNormalization`: gamma and beta where it has them, then its two statistics."""
    layer = call.operation
    x, shape = reader.name(call.inputs[0]), reader.shape(call.inputs[0])
    stored = [layer.gamma if layer.scale else None, layer.beta if layer.center else None]
    vectors = [reader.parameter(v) for v in (*stored, layer.moving_mean, layer.moving_variance)]
    attributes, masks = ops.batch_norm(len(shape), layer.axis % len(shape), epsilon=layer.epsilon), call.inputs[1:]
    for mask in masks:  # of the steps that count in training
        equation = attributes["equation"]
        dims = tuple((f"a{d}",) for d in range(len(reader.shape(mask))))
        attributes = {**attributes, "equation": replace(equation, inputs=(*equation.inputs, dims))}
    reader.node(call, "batch_norm", [x, *vectors, *map(reader.name, masks)], attributes)


def layer_norm(reader: Reader, call: Call) -> None:
    """`LayerNormalization` over any axes."""
    layer = call.operation
    x, shape = reader.single(call)
    axes = sorted(a % len(shape) for a in keras.tree.flatten(layer.axis))
    vectors = [layer.gamma if layer.scale else None, layer.beta if layer.center else None]
    reader.node(call, "layer_norm", [x, *map(reader.parameter, vectors)], ops.layer_norm(len(shape), axes))


def rms_norm(reader: Reader, call: Call) -> None:
    """`RMSNormalization`, which has a scale and no shift."""
    layer = call.operation
    x, shape = reader.single(call)
    axes = sorted(a % len(shape) for a in keras.tree.flatten(layer.axis))
    reader.node(call, "layer_norm", [x, reader.parameter(layer.scale)], ops.layer_norm(len(shape), axes, 1, "rms"))


def group_norm(reader: Reader, call: Call) -> None:
    """`GroupNormalization`; ``groups=-1`` is one group per channel."""
    layer = call.operation
    x, shape = reader.single(call)
    axis = layer.axis % len(shape)
    groups = shape[axis] if layer.groups == -1 else layer.groups
    vectors = [layer.gamma if layer.scale else None, layer.beta if layer.center else None]
    reader.node(call, "group_norm", [x, *map(reader.parameter, vectors)], ops.group_norm(len(shape), groups, axis))


def elementwise(function: str) -> Rule:
    """Rule of a layer that works element by element on one or more tensors of equal rank."""

    def rule(reader: Reader, call: Call) -> None:
        shapes = [reader.shape(t) for t in call.inputs]
        # Keras' merging layers align tensors of different ranks at the batch, not at the last dimension.
        if len({len(s) for s in shapes}) > 1:
            raise NoRule("slimline has no rule for it with inputs of different ranks")
        attributes = ops.elementwise(shapes, function)
        reader.node(call, "elementwise", [reader.name(t) for t in call.inputs], attributes)

    return rule


def activation(reader: Reader, call: Call) -> None:
    """`Activation` with one of Keras' own functions."""
    function = call.operation.activation
    name = getattr(function, "__name__", type(function).__name__)
    if getattr(keras.activations, name, None) is not function:
        raise NoRule(f"slimline does not know the function {name!r}")
    x, shape = reader.single(call)
    if name in ("softmax", "log_softmax"):
        reader.node(call, "softmax", [x], ops.softmax(len(shape), len(shape) - 1))
    elif name in ELEMENTWISE_ACTIVATIONS:
        plain = {"swish": "silu", "hard_swish": "hard_silu", "linear": "identity"}.get(name, name)
        reader.node(call, "elementwise", [x], ops.elementwise([shape], plain))
    else:
        raise NoRule("slimline has no rule for it")


def relu(reader: Reader, call: Call) -> None:
    """`ReLU` with an optional ceiling, slope and threshold."""
    layer = call.operation
    x, shape = reader.single(call)
    plain = not layer.negative_slope and not layer.threshold
    known = {None: "relu", 6: "relu6"}
    bent = "leaky_relu" if layer.negative_slope else "threshold"
    function = known.get(layer.max_value, "clip") if plain else bent
    reader.node(call, "elementwise", [x], ops.elementwise([shape], function))


def prelu(reader: Reader, call: Call) -> None:
    """`PReLU`: slopes are stored per position, with size 1 on shared axes."""
    alpha = call.operation.alpha
    x, shape = reader.single(call)
    attributes = ops.elementwise([shape, tuple(alpha.shape)], "prelu")
    reader.node(call, "elementwise", [x, reader.parameter(alpha)], attributes)


def unit_norm(reader: Reader, call: Call) -> None:
    """`UnitNormalization`: length 1 over some axes."""
    x, shape = reader.single(call)
    reader.node(call, "normalize", [x], ops.normalize(len(shape), keras.tree.flatten(call.operation.axis)))


def layer_scale(reader: Reader, call: Call) -> None:
    """ConvNeXt's `LayerScale`: a stored factor per position of the last axis."""
    gamma = call.operation.gamma
    x, shape = reader.single(call)
    attributes = ops.elementwise([shape, tuple(gamma.shape)], "mul")
    reader.node(call, "elementwise", [x, reader.parameter(gamma)], attributes)


def dropout(reader: Reader, call: Call) -> None:
    """`Dropout`; a noise shape that counts positions would have to shrink with them."""
    if any(n not in (None, 1) for n in call.operation.noise_shape or ()):
        raise NoRule("its noise_shape counts positions")
    elementwise("identity")(reader, call)


def rescaling(reader: Reader, call: Call) -> None:
    """`Rescaling` by numbers; vectors are part of its config and stay whole."""
    layer = call.operation
    if any(hasattr(v, "__len__") for v in (layer.scale, layer.offset)):
        raise NoRule("it scales each channel by a number of its config")
    elementwise("rescale")(reader, call)


def normalization(reader: Reader, call: Call) -> None:
    """`Normalization` of the last axis by statistics that it stores."""
    layer = call.operation
    x, shape = reader.single(call)
    if layer.input_mean is not None or layer._keep_axis != (len(shape) - 1,):
        raise NoRule("slimline has a rule only for adapted statistics of the last axis")
    vectors = [reader.parameter(layer.adapt_mean), reader.parameter(layer.adapt_variance)]
    size = (shape[-1],)
    reader.node(call, "elementwise", [x, *vectors], ops.elementwise([shape, size, size], "normalize"))


def concatenate(reader: Reader, call: Call) -> None:
    """`Concatenate`."""
    rank = len(reader.shape(call.inputs[0]))
    axis = call.operation.axis % rank
    reader.node(call, "concat", [reader.name(t) for t in call.inputs], ops.concat(axis))


def dot(reader: Reader, call: Call) -> None:
    """`Dot`: contraction of one axis of each of two tensors, batch by batch."""
    layer = call.operation
    if layer.normalize or len(call.inputs) != 2:
        raise NoRule("slimline has no rule for it with normalize=True")
    ranks = [len(reader.shape(t)) for t in call.inputs]
    axes = [layer.axes] * 2 if isinstance(layer.axes, int) else list(layer.axes)
    letters = iter("cdefghijklmnopqrstuvwxyz")
    operands = [["a", *(next(letters) for _ in range(1, rank))] for rank in ranks]
    remaining = []
    for names, rank, axis in zip(operands, ranks, axes, strict=True):
        names[axis % rank] = "b"
        remaining += [n for n in names[1:] if n != "b"]
    text = f"{','.join(map(''.join, operands))}->a{''.join(remaining) or '1'}"
    reader.node(call, "einsum", [reader.name(t) for t in call.inputs], ops.einsum(text))


def reshape(reader: Reader, call: Call) -> None:
    """`Reshape`, `Flatten`."""
    x, shape = reader.single(call)
    reader.node(call, "reshape", [x], ops.reshape(shape, reader.shape(call.outputs[0])))


def permute(reader: Reader, call: Call) -> None:
    """`Permute`."""
    x, _ = reader.single(call)
    reader.node(call, "permute", [x], ops.permute((0, *call.operation.dims)))


def repeat_vector(reader: Reader, call: Call) -> None:
    """`RepeatVector`: ``(b, f) -> (b, 1, f) -> (b, n, f)``."""
    x, (batch, features) = reader.single(call)
    one, many = (batch, 1, features), reader.shape(call.outputs[0])
    steps = [("reshape", ops.reshape((batch, features), one), one), ("expand", ops.expand(one, many), many)]
    reader.chain(call, x, steps)


def pad(sign: int) -> Rule:
    """Rule of zero padding (`sign` 1) and cropping (-1) of the spatial dimensions."""

    def rule(reader: Reader, call: Call) -> None:
        layer = call.operation
        x, shape = reader.single(call)
        amounts = layer.padding if sign > 0 else layer.cropping
        pairs = [(a, a) if isinstance(a, int) else tuple(a) for a in amounts]
        if len(shape) == 3:
            pairs = [tuple(amounts)]
        axes = spatial_axes(len(shape), getattr(layer, "data_format", "channels_last"))
        widths = [(0, 0)] * len(shape)
        for axis, (before, after) in zip(axes, pairs, strict=True):
            widths[axis] = (sign * before, sign * after)
        reader.node(call, "pad", [x], ops.pad(widths))

    return rule


def pool(function: str) -> Rule:
    """Rule of local pooling and of resizing."""

    def rule(reader: Reader, call: Call) -> None:
        x, shape = reader.single(call)
        axes = spatial_axes(len(shape), getattr(call.operation, "data_format", "channels_last"))
        reader.node(call, "pool", [x], ops.pool(len(shape), axes, function))

    return rule


def global_pool(function: str) -> Rule:
    """Rule of pooling over all positions."""

    def rule(reader: Reader, call: Call) -> None:
        layer = call.operation
        x, shape = reader.name(call.inputs[0]), reader.shape(call.inputs[0])
        axes = spatial_axes(len(shape), layer.data_format)
        attributes, inputs = ops.reduce(len(shape), axes, layer.keepdims, function), [x]
        if len(call.inputs) > 1:  # which steps count
            equation = attributes["equation"]
            steps = (("a0",), (f"a{axes[0]}",))
            attributes = {**attributes, "equation": replace(equation, inputs=(*equation.inputs, steps))}
            inputs.append(reader.name(call.inputs[1]))
        reader.node(call, "reduce", inputs, attributes)

    return rule


def _each(names: str, rule: Rule) -> dict[type, Rule]:
    return {getattr(L, name): rule for name in names.split()}


LAYERS: Mapping[type, Rule] = {
    **_each("Conv1D Conv2D Conv3D", conv()),
    **_each("Conv1DTranspose Conv2DTranspose Conv3DTranspose", conv(transposed=True)),
    **_each("DepthwiseConv1D DepthwiseConv2D", conv(depthwise=True)),
    **_each("Dense", dense),
    **_each("EinsumDense", einsum_dense),
    **_each("Embedding", embedding),
    **_each("BatchNormalization", batch_norm),
    **_each("LayerNormalization", layer_norm),
    **_each("RMSNormalization", rms_norm),
    **_each("GroupNormalization", group_norm),
    **_each("UnitNormalization", unit_norm),
    **_each("Add", elementwise("add")),
    **_each("Subtract", elementwise("sub")),
    **_each("Multiply", elementwise("mul")),
    **_each("Average", elementwise("average")),
    **_each("Maximum", elementwise("max")),
    **_each("Minimum", elementwise("min")),
    **_each("LeakyReLU", elementwise("leaky_relu")),
    **_each("ELU", elementwise("elu")),
    **_each("Activation", activation),
    **_each("ReLU", relu),
    **_each("PReLU", prelu),
    **_each("Softmax", softmax),
    **_each("Masking", masking),
    **_each("Rescaling", rescaling),
    **_each("Normalization", normalization),
    **_each(
        "SpatialDropout1D SpatialDropout2D SpatialDropout3D GaussianDropout GaussianNoise ActivityRegularization "
        "Identity",
        elementwise("identity"),
    ),
    **_each("Dropout AlphaDropout", dropout),
    convnext.StochasticDepth: elementwise("identity"),
    convnext.LayerScale: layer_scale,
    inception_resnet_v2.CustomScaleLayer: elementwise("add_scaled"),
    **_each("Concatenate", concatenate),
    **_each("Dot", dot),
    **_each("Reshape Flatten", reshape),
    **_each("Permute", permute),
    **_each("RepeatVector", repeat_vector),
    **_each("ZeroPadding1D ZeroPadding2D ZeroPadding3D", pad(1)),
    **_each("Cropping1D Cropping2D Cropping3D", pad(-1)),
    **_each("UpSampling1D UpSampling2D UpSampling3D Resizing", pool("resize")),
    **_each("AdaptiveMaxPooling1D AdaptiveMaxPooling2D AdaptiveMaxPooling3D", pool("max")),
    **_each("AdaptiveAveragePooling1D AdaptiveAveragePooling2D AdaptiveAveragePooling3D", pool("mean")),
    **_each("MaxPooling1D MaxPooling2D MaxPooling3D", pool("max")),
    **_each("AveragePooling1D AveragePooling2D AveragePooling3D", pool("mean")),
    **_each("GlobalMaxPooling1D GlobalMaxPooling2D GlobalMaxPooling3D", global_pool("max")),
    **_each("GlobalAveragePooling1D GlobalAveragePooling2D GlobalAveragePooling3D", global_pool("mean")),
}
