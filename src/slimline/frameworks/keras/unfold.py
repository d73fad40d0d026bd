"""Layers and models that a user wrote as classes, opened into the calls that their `call` makes.

A class whose weights all belong to layers it holds is only a function of these: called on a symbolic tensor it gives a
functional graph. One with weights of its own, or whose `call` leaves Keras, stays whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import keras

from slimline.frameworks.keras.functional import Call, calls

log = logging.getLogger(__name__)


def is_composite(layer: Any) -> bool:
    """Whether a layer is the user's own class, built, and all of its weights are those of layers that it holds."""
    if not isinstance(layer, keras.layers.Layer) or type(layer).__module__.split(".")[0] == "keras":
        return False
    if type(layer).call is keras.layers.Layer.call or not layer.built:
        return False
    inner = list(layer._flatten_layers(include_self=False))
    held = {id(v) for part in inner for v in part.variables}
    return bool(inner) and all(id(v) in held for v in layer.variables)


def opened(layer: Any, call: Call) -> tuple[keras.Model, Any] | None:
    """What a composite layer does in a call, as a functional model over the call's inputs, and its outputs' structure;
    None where its `call` cannot be followed."""
    fresh = {id(t): keras.Input(batch_shape=tuple(t.shape), dtype=t.dtype) for t in call.inputs}
    args, kwargs = keras.tree.map_structure(lambda a: fresh.get(id(a), a), (call.args, dict(call.kwargs)))
    return _followed(layer, list(fresh.values()), lambda: layer.call(*args, **kwargs))


def functional(model: keras.Model, example: tuple[Any, ...]) -> keras.Model | None:
    """A subclassed model as a functional one over the same layers, called as on `example`; None where it has weights of
    its own, or cannot be followed."""
    if not is_composite(model):
        return None
    inputs = [keras.Input(x.shape[1:], dtype=str(x.dtype), name=f"input_{i}") for i, x in enumerate(example)]
    found = _followed(model, inputs, lambda: model.call(inputs if len(inputs) > 1 else inputs[0]))
    return None if found is None else found[0]


def _followed(layer: Any, inputs: list[Any], run: Callable[[], Any]) -> tuple[keras.Model, Any] | None:
    try:
        outputs = run()
        inner = keras.Model(inputs, keras.tree.flatten(outputs), name=layer.name)
    except Exception as reason:  # a user's code may raise anything: the layer stays whole, and the plan says so
        log.info("%s stays whole: %s", layer.name, reason)
        return None
    bare = [c.operation for c in calls(inner) if not c.is_input and not c.is_layer]
    for index, operation in enumerate(dict.fromkeys(bare)):  # Keras counts those of the whole process
        operation.name = f"{type(operation).__name__.lower()}_{index}"
    return inner, outputs
