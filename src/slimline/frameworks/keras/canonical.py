"""Brings a user's model into the one form that all passes read: flat, functional, one idea per layer.

Nested models and layers that a user composed of others are unfolded (``encoder.conv1``), a layer's own activation
becomes a layer behind it
(``conv1.activation``), `MultiHeadAttention` and `SeparableConv` become the layers they are made of
(``mha.query``, ``sep.pointwise``). What is computed stays the same and plain Keras can load the result;
but every weight then belongs to a layer with one equation, and every activation is a tensor that can be
seen, pruned and quantized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import keras
from keras.src.backend import compute_output_spec, set_keras_mask  # they have no public name
from keras.src.ops import nn  # bare operations get a stable name only through their class
from keras.src.ops.numpy import Flip, Reshape

from slimline.frameworks.keras.attention import attention, can_be_parted, dot_product, is_plain
from slimline.frameworks.keras.functional import Call, Copies, calls, clone, dense, is_functional, rebuild, replay
from slimline.frameworks.keras.parts import Parts, transfer
from slimline.frameworks.keras.unfold import (
    followed,
    is_composite,
    masked_as,
    opened,
    own_weights,
    tensors_of,
    with_masks,
)

L = keras.layers

# Exact classes: a user's subclass may compute something else.
WITH_ACTIVATION = {
    L.Dense, L.EinsumDense, L.Conv1D, L.Conv2D, L.Conv3D, L.Conv1DTranspose, L.Conv2DTranspose, L.Conv3DTranspose,
    L.DepthwiseConv1D, L.DepthwiseConv2D, L.SeparableConv1D, L.SeparableConv2D,
}  # fmt: skip
ACTIVATION = ".activation"


def canonical(model: keras.Model, shapes: Sequence[tuple[int | None, ...]] | None = None) -> keras.Model:
    """A copy of a functional or Sequential model, weights included, in canonical form; idempotent.

    Its inputs have their own `shapes`, or these.
    """
    copies = Copies()
    native = rebuild(model, partial(_visit, copies=copies, prefix=""), shapes)
    # Masks that Keras computed on the way; it counts the names of the whole process.
    bare = {id(c.operation): c.operation for c in calls(native) if not c.is_input and not c.is_layer}
    for index, key in enumerate(key for key in bare if not copies.holds(bare[key])):
        bare[key].name = f"mask.{index}"
    return native


def _visit(
    call: Call,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    copies: Copies,
    prefix: str,
    paths: Mapping[int, str] = {},
) -> Any:
    again = call.name.removeprefix(call.operation.name)
    name = prefix + paths.get(id(call.operation), call.operation.name)
    return _convert(call.operation, args, kwargs, copies, name, again)


def _convert(
    operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], copies: Copies, name: str, again: str
) -> Any:
    """Call the counterparts of an operation, called `name`, for the first time or `again` (``@1``, ``@2`` …)."""
    if is_functional(operation) and not any(v is not None for v in kwargs.values()):
        inner = partial(_visit, copies=copies, prefix=f"{name}.")
        outputs = replay(operation, keras.tree.flatten(args), inner)
        return keras.tree.pack_sequence_as(_structure(operation), outputs)
    if not isinstance(operation, L.Layer):
        return _function(operation, args, kwargs, Parts(name, copies), again)
    kwargs = with_masks(operation, args, kwargs)
    outputs = _layer(operation, args, kwargs, Parts(name, copies), again)
    if isinstance(operation, L.MultiHeadAttention):  # it takes the masks off the tensors that it has read
        for tensor in tensors_of(args, {}):
            set_keras_mask(tensor, None)
    return outputs


def _function(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parts: Parts, again: str) -> Any:
    """Call the counterpart of a bare function."""
    if type(operation) is nn.DotProductAttention and can_be_parted(operation, args):
        return dot_product(parts, operation, again, *args, **kwargs)
    return parts.copy(operation, parts.name)(*args, **kwargs)


def _layer(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parts: Parts, again: str) -> Any:
    """Call the counterparts of a layer."""
    name, copies = parts.name, parts.copies
    if type(operation) is L.MultiHeadAttention and is_plain(operation, args, kwargs):
        return masked_as(operation, args, kwargs, attention(parts, operation, *args, **kwargs))
    if is_composite(operation):
        expanded = copies.of((id(operation), again, "opened"), lambda: opened(operation, args, kwargs))
        if expanded is not None:
            # Of a shared layer every call has bare functions of its own.
            prefix = f"{name}{_plain(again)}."
            inner = partial(_visit, copies=copies, prefix=prefix, paths=expanded.paths)
            tensors = tensors_of(args, kwargs)
            tensors += own_weights(expanded.own, tensors[0], f"{name}.", copies)
            outputs = replay(expanded.graph, tensors, inner)
            return masked_as(operation, args, kwargs, expanded.pack(outputs))
    if type(operation) in (L.TimeDistributed, L.SpectralNormalization) and _transparent(operation):
        return _weighted_or_active(parts, operation.layer, name, args[:1], {}, again)
    if type(operation) is L.TimeDistributed and _unmasked(operation, kwargs) and args[0].shape[1] is not None:
        return masked_as(operation, args, kwargs, _at_every_step(parts, operation, args[0], again))
    if type(operation) is L.Bidirectional and not operation.stateful:
        return masked_as(operation, args, kwargs, _both_ways(parts, operation, again, *args, **kwargs))
    if type(operation) in (L.SeparableConv1D, L.SeparableConv2D):
        return _activate(parts, operation, _separable(parts, operation, *args), again=again)
    if type(operation) is L.Activation and not _known(operation.activation):
        return _activate(parts, operation, args[0], name, again)
    return _weighted_or_active(parts, operation, name, args, kwargs, again)


def _weighted_or_active(
    parts: Parts, layer: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], again: str = ""
) -> Any:
    """A copy of the layer called `name`, its own activation behind it."""
    if type(layer) not in WITH_ACTIVATION:
        return parts.weighted(layer, parts.copy(layer, name), args, kwargs)
    changes = {"activation": "linear", **_sized(layer, args)}
    y = parts.weighted(layer, parts.copy(layer, name, **changes), args, kwargs)
    return _activate(parts, layer, y, again=again)


def _sized(layer: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    """The output shape of an `EinsumDense` whose input is of known size: its config may leave out what it can see."""
    if type(layer) is not L.EinsumDense or None in args[0].shape[1:]:
        return {}
    declared = keras.tree.flatten(layer.get_config()["output_shape"])
    after = compute_output_spec(layer.call, *map(dense, args)).shape[-len(declared) :]
    return {"output_shape": tuple(n if w is None else w for w, n in zip(declared, after, strict=True))}


def _transparent(wrapper: Any) -> bool:
    """Whether a wrapper computes what its layer alone does: one that works on the last dimension of any rank, for every
    time step; or any whose spectral norm, at inference, is in its weights already."""
    return type(wrapper) is L.SpectralNormalization or type(wrapper.layer) is L.Dense


def _unmasked(wrapper: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether the layer of a `TimeDistributed` is told of no mask."""
    return kwargs.get("mask") is None or not wrapper.layer._call_has_mask_arg


def _at_every_step(parts: Parts, wrapper: Any, x: Any, again: str) -> Any:
    """The layer of a `TimeDistributed` on all steps at once, as samples of one batch."""
    shape = (-1, *x.shape[2:])
    folded = parts.make(wrapper, f"fold{again}", lambda name: Reshape(shape, name=_plain(name)))(x)
    y = _convert(wrapper.layer, (folded,), {}, parts.copies, f"{parts.name}.{wrapper.layer.name}", again)
    back = (-1, x.shape[1], *y.shape[1:])
    return parts.make(wrapper, f"unfold{again}", lambda name: Reshape(back, name=_plain(name)))(y)


def _both_ways(
    parts: Parts, layer: Any, again: str, sequences: Any, initial_state: Any = None, mask: Any = None, **more: Any
) -> Any:
    """The two layers of a `Bidirectional`, the second one's steps turned round, and what merges them."""
    states = [None, None]
    if initial_state is not None:
        half = len(initial_state) // 2
        states = [initial_state[:half], initial_state[half:]]
    results = []
    for inner, state in zip((layer.forward_layer, layer.backward_layer), states, strict=True):
        arguments = {**more, "mask": mask, **({} if state is None else {"initial_state": list(state)})}
        results.append(_convert(inner, (sequences,), arguments, parts.copies, f"{parts.name}.{inner.name}", again))
    last: list[Any] = []
    if layer.return_state:
        last = [state for result in results for state in result[1:]]
        results = [result[0] for result in results]
    forward, backward = results
    if layer.return_sequences:
        backward = parts.make(layer, f"turned{again}", lambda name: Flip(axis=1, name=_plain(name)))(backward)
    merges = {"concat": L.Concatenate, "sum": L.Add, "mul": L.Multiply, "ave": L.Average}
    if layer.merge_mode is None:
        return (forward, backward, *last)
    merged = parts.make(layer, "merged", lambda name: merges[layer.merge_mode](name=name))([forward, backward])
    return (merged, *last) if last else merged


def _plain(name: str) -> str:
    """A name that operations take."""
    return name.replace("@", ".call")


def _structure(model: keras.Model) -> Any:
    graph = model._functional if isinstance(model, keras.Sequential) else model
    return graph._outputs_struct


def _policy(layer: Any) -> Any:
    """A dtype policy of its own: a shared one would be saved as shared and loaded as separate."""
    return keras.dtype_policies.deserialize(keras.dtype_policies.serialize(layer.dtype_policy))


def _known(function: Any) -> bool:
    """Whether an activation is one of Keras' own, or a layer."""
    own = getattr(keras.activations, getattr(function, "__name__", ""), None) is function
    return own or isinstance(function, keras.layers.Layer)


def _activate(parts: Parts, layer: Any, y: Any, name: str = "", again: str = "") -> Any:
    function = layer.activation
    if function is None or function is keras.activations.linear:
        return y
    if not _known(function):  # a user's own, which is what it calls
        name = name or f"{parts.name}{ACTIVATION}"
        graph = parts.copies.of((id(layer), again, "followed"), lambda: followed(function, y))
        if graph is not None:
            inner = partial(_visit, copies=parts.copies, prefix=f"{name}{_plain(again)}.")
            return replay(graph, [y], inner)[0]
        if type(layer) is L.Activation:
            return parts.copy(layer, name)(y)

    def build(name: str) -> Any:
        if isinstance(function, keras.layers.Layer):
            return clone(function, name=name)
        return L.Activation(function, name=name, dtype=_policy(layer))

    activation = parts.make(layer, ACTIVATION[1:], build)
    if isinstance(function, keras.layers.Layer):
        return parts.weighted(function, activation, (y,), {})
    return activation(y)


def _separable(parts: Parts, layer: Any, x: Any) -> Any:
    flat = type(layer) is L.SeparableConv1D
    depthwise_class, pointwise_class = (L.DepthwiseConv1D, L.Conv1D) if flat else (L.DepthwiseConv2D, L.Conv2D)

    def make(part: str, kind: type, *sizes: Any, **settings: Any) -> Any:
        common = {"data_format": layer.data_format, "dtype": _policy(layer), "trainable": layer.trainable}
        return parts.make(layer, part, lambda name: kind(*sizes, name=name, **common, **settings))

    depthwise = make(
        "depthwise",
        depthwise_class,
        layer.kernel_size,
        strides=layer.strides,
        padding=layer.padding,
        depth_multiplier=layer.depth_multiplier,
        dilation_rate=layer.dilation_rate,
        use_bias=False,
        depthwise_regularizer=layer.depthwise_regularizer,
        depthwise_constraint=layer.depthwise_constraint,
    )
    pointwise = make(
        "pointwise",
        pointwise_class,
        layer.filters,
        1,
        use_bias=layer.use_bias,
        kernel_regularizer=layer.pointwise_regularizer,
        bias_regularizer=layer.bias_regularizer,
        kernel_constraint=layer.pointwise_constraint,
        bias_constraint=layer.bias_constraint,
    )
    y = pointwise(depthwise(x))
    transfer([layer.depthwise_kernel], depthwise)
    transfer([v for v in (layer.pointwise_kernel, layer.bias) if v is not None], pointwise)
    return y
