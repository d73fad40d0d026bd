"""Attention as the layers and bare functions that it is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras.src.ops.nn import Softmax  # bare operations get a stable name only through their class
from keras.src.ops.numpy import Add, Einsum, ExpandDims, LogicalAnd, Multiply, Repeat, Where

from slimline.frameworks.keras.functional import clone
from slimline.frameworks.keras.unfold import tensors_of

if TYPE_CHECKING:
    from slimline.frameworks.keras.parts import Parts


def is_plain(layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether an attention layer is the textbook one, with or without an `attention_mask`; any other is opened."""
    known = ("query", "value", "key", "attention_mask", "use_causal_mask", "training")
    extras = [v for name, v in kwargs.items() if name not in known]
    shapes = [t.shape for t in tensors_of(args, kwargs)]
    if kwargs.get("use_causal_mask") and any(len(s) != 3 or s[1] is None for s in shapes):
        return False
    special = layer._use_gate or layer._sliding_window is not None
    return len(args) <= 3 and not special and not any(e is not None and e is not False for e in extras)


def attention(
    parts: Parts,
    layer: Any,
    query: Any,
    value: Any,
    key: Any = None,
    attention_mask: Any = None,
    use_causal_mask: bool = False,
    **_: Any,
) -> Any:
    """Softmax(q kᵀ / √d) v over heads, from the layer's own projections and einsum equations."""
    key = value if key is None else key
    mask = _mask(parts, layer, (query.shape[1], value.shape[1]), attention_mask, use_causal_mask)

    def project(x: Any, inner: Any, name: str) -> Any:
        part = parts.make(layer, name, lambda name: clone(inner, name=name))
        return parts.weighted(inner, part, (x,), {})

    q, k = project(query, layer.query_dense, "query"), project(key, layer.key_dense, "key")
    v = project(value, layer.value_dense, "value")
    scale = parts.make(layer, "scale", lambda name: Multiply(name=name))
    scores = parts.make(layer, "scores", lambda name: Einsum(layer._dot_product_equation, name=name))
    softmax = parts.make(layer, "softmax", lambda name: clone(layer._softmax, name=name))
    combine = parts.make(layer, "combine", lambda name: Einsum(layer._combine_equation, name=name))
    attended = scores(k, scale(q, layer._inverse_sqrt_key_dim))
    if attention_mask is not None and not layer.dropout and len(query.shape) == 3:
        # By Keras' fast way, in which a query that may look at nothing looks at all alike.
        seen = parts.make(layer, "seen", lambda name: Where(name=name))
        weights = softmax(seen(mask, attended, _least(attended)))
    else:
        weights = softmax(attended) if mask is None else softmax(attended, mask=mask)
    if layer.dropout > 0:
        weights = project(weights, layer._dropout_layer, "dropout")
    return project(combine(weights, v), layer.output_dense, "attention_output")


def _mask(parts: Parts, layer: Any, lengths: tuple[int, int], mask: Any, causal: bool) -> Any:
    """What the softmax may look at, ``(batch, 1, queries, keys)``: what is given, and nothing that is to come if
    `causal`."""
    if causal:
        past = np.tril(np.ones((1, *lengths), bool))
        if isinstance(mask, keras.KerasTensor):
            mask = parts.make(layer, "causal", lambda name: LogicalAnd(name=name))(mask, past)
        else:
            mask = past if mask is None else past & np.asarray(mask, bool)
    if mask is None:
        return None
    axis = -2 * len(layer._attention_axes) - 1
    if isinstance(mask, keras.KerasTensor):
        for i in range(len(layer._attention_axes) * 2 + 2 - len(mask.shape)):
            mask = parts.make(layer, f"mask{i}", lambda name: ExpandDims(axis, name=name))(mask)
        return mask
    mask = np.asarray(mask, bool)
    while mask.ndim < len(layer._attention_axes) * 2 + 2:
        mask = np.expand_dims(mask, axis)
    return mask


def _least(scores: Any) -> float:
    """The score of what must not be looked at."""
    return -0.7 * float(np.finfo("float16" if scores.dtype == "float16" else "float32").max)


def can_be_parted(operation: Any, args: tuple[Any, ...]) -> bool:
    """Whether a ``dot_product_attention`` is one of tensors, whose lengths are known where it looks at the past."""
    tensors = [t for t in args[:3] if isinstance(t, keras.KerasTensor)]
    lengths = [t.shape[1] for t in tensors]
    return len(tensors) == 3 and not (operation.is_causal and None in lengths)


def dot_product(
    parts: Parts,
    operation: Any,
    again: str,
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    scale: Any = None,
) -> Any:
    """``dot_product_attention`` of ``(batch, length, heads, width)``; heads of keys and values are shared by several
    queries. (Keras believes that what it gives is as wide as the queries.)"""

    def part(kind: Any, what: str, *settings: Any, **more: Any) -> Any:
        return parts.make(
            operation, what + again.replace("@", ".call"), lambda name: kind(*settings, **more, name=name)
        )

    shared = query.shape[2] // key.shape[2]
    if shared > 1:
        key, value = (part(Repeat, what, shared, axis=2)(t) for what, t in (("keys", key), ("values", value)))
    scores = part(Einsum, "scores", "btnh,bsnh->bnts")(query, key)
    scores = part(Multiply, "scale")(scores, 1 / math.sqrt(query.shape[3]) if scale is None else scale)
    if bias is not None:
        scores = part(Add, "biased")(scores, bias)
    if operation.is_causal:
        past = np.tril(np.ones((1, 1, query.shape[1], key.shape[1]), bool))
        mask = past if mask is None else part(LogicalAnd, "causal")(mask, past)
    if mask is not None:
        scores = part(Where, "seen")(mask, scores, _least(scores))
    weights = part(Softmax, "softmax", axis=-1)(scores)
    return part(Einsum, "combine", "bnts,bsnh->btnh")(weights, value)
