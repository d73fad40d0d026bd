"""Layers that give way to others."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers as L

from slimline.basics.errors import SlimlineError
from slimline.frameworks.keras.cut import padded
from slimline.frameworks.keras.functional import Call, calls, clone, input_name, rebuild, variables
from slimline.frameworks.keras.resize import unbuilt
from slimline.frameworks.keras.rewrite import Copier, copier, parameters
from slimline.graph.edits import Project, Replace
from slimline.graph.equation import Window
from slimline.graph.operators import Convolution, Einsum, Linear, Mean, Operator, Rectifier, Table


def replace(native: keras.Model, change: Replace) -> keras.Model:
    """A copy in which operators compute what a layer did. They are trained where the layer was."""
    same = [call for call in calls(native) if call.name.partition("@")[0] == change.output.partition("@")[0]]
    if len(same) != 1 or change.output not in same[0].names:
        raise SlimlineError(f"{change.layer} is no layer that is called once: only such can be replaced.")
    names = {id(t): input_name(t) for t in native.inputs}
    for call in calls(native):
        names |= {id(t): name for name, t in zip(call.names, call.outputs, strict=True)}
    if len(same[0].inputs) != 1 or change.input not in names.values():
        raise SlimlineError(f"{change.layer} does not read {change.input!r} alone: read the model's graph again.")
    copy = copier(native)
    tensors: dict[str, Any] = {}

    def visit(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        operands = [a for a in keras.tree.flatten((args, kwargs)) if isinstance(a, keras.KerasTensor)]
        tensors.update((names[id(old)], new) for old, new in zip(call.inputs, operands, strict=True))
        if call.name != same[0].name:
            return copy(call, args, kwargs)
        x = tensors[change.input]
        try:
            for position, operator in enumerate(change.operators):
                x = _call(x, operator, f"{change.layer}.{position}", call.operation)
        except ValueError as reason:
            raise change.misfit() from reason
        change.check_shape(tuple(call.outputs[0].shape), tuple(x.shape))
        return x

    return rebuild(native, visit)


def project(native: keras.Model, change: Project) -> keras.Model:
    """A copy in which a recurrent layer reads a product. The product's weight is trained where the layer's are."""
    ((name, array),) = change.kernels.items()  # directions are layers of their own
    kernel, linear = variables(native)[name], Linear(change.weight)
    copy = Copier(native, {**parameters(native), name: array})

    def visit(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not call.is_layer or all(kernel is not v for v in call.operation.variables):
            return copy.copy(call, args, kwargs)
        x, *others = args or (kwargs.pop("sequences"),)
        product = _call(x, linear, f"{change.layer}.0", call.operation)
        layer = clone(call.operation, **unbuilt(call.operation))
        return copy.run(call, layer, (product, *others), kwargs, copy.values)

    return rebuild(native, visit)


def _call(x: Any, operator: Operator, name: str, like: Any) -> Any:
    """Run a new layer with the operator's weights, of the dtypes of the layer `like`."""
    if isinstance(operator, Rectifier):
        return L.ReLU(name=name, dtype=like.dtype_policy)(x)
    if isinstance(operator, Mean):
        return getattr(L, f"GlobalAveragePooling{operator.places}D")(name=name, dtype=like.dtype_policy)(x)
    if isinstance(operator, Table):
        rows, width = operator.shape
        table = L.Embedding(rows, width, mask_zero=like.mask_zero, name=name, dtype=like.dtype_policy)
        return _held(table, x, [operator.weight], like)
    shared = {"name": name, "use_bias": operator.bias is not None, "dtype": like.dtype_policy}
    if isinstance(operator, Einsum):
        axes = operator.bias_axes or None
        own = {"name": name, "dtype": like.dtype_policy, "bias_axes": axes}
        layer, kernel = L.EinsumDense(operator.equation, operator.sizes(x.shape)[1:], **own), operator.weight
    elif isinstance(operator, Convolution):
        layer, kernel, x = _convolution(x, operator, shared)
    else:
        layer, kernel = L.Dense(operator.outputs, **shared), operator.weight.T
    return _held(layer, x, [kernel] + [operator.bias] * (operator.bias is not None), like)


def _held(layer: Any, x: Any, weights: list[Any], like: Any) -> Any:
    """What a layer with these weights gives, which are trained where those of `like` are."""
    result = layer(x)
    layer.set_weights(weights)
    if not like.trainable_variables:
        for variable in layer.trainable_variables:
            variable.trainable = False
    return result


def _convolution(x: Any, operator: Convolution, shared: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The layer, its kernel as Keras has it, and what it reads."""
    window, rank = operator.looks, len(operator.kernel)
    sizes = tuple(x.shape[1:-1])
    padding, zeros = _padding(window, sizes, operator.kernel)
    x = padded(x, zeros, shared["name"])
    shared = {**shared, "strides": window.stride, "dilation_rate": window.dilation, "padding": padding}
    kernel = np.moveaxis(operator.weight, (0, 1), (-1, -2))  # (*kernel, inputs / groups, outputs)
    inputs = int(x.shape[-1])
    if operator.groups == inputs > 1 and rank < 3 and len(set(window.stride)) == 1:  # TensorFlow has no other strides
        shared["strides"] = window.stride[0]
        depthwise = kernel.reshape(*operator.kernel, inputs, operator.outputs // inputs)
        layer = getattr(L, f"DepthwiseConv{rank}D")(
            operator.kernel, depth_multiplier=operator.outputs // inputs, **shared
        )
        return layer, depthwise, x
    layer = getattr(L, f"Conv{rank}D")(operator.outputs, operator.kernel, groups=operator.groups, **shared)
    return layer, kernel, x


def _padding(
    window: Window, sizes: tuple[int | None, ...], kernel: tuple[int, ...]
) -> tuple[str, list[tuple[int, int]]]:
    """Keras' word for a padding, and the zeros that have to be put around the input beside."""
    if window.padding == "ceil":
        return "same", []
    zeros = window.zeros((0,) * len(kernel), kernel)
    if not any(map(any, zeros)):
        return "valid", []
    known = [n for n in sizes if n is not None]
    if len(known) == len(sizes) and zeros == Window(window.stride, window.dilation, "ceil").zeros(known, kernel):
        return "same", []
    return "valid", zeros
