"""A part of a network by itself: what computes some activations from others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import keras

from slimline.basics.errors import SlimlineError
from slimline.frameworks.keras.functional import Call, Copies, clone, freeze_like
from slimline.frameworks.keras.observe import between, named_tensors
from slimline.frameworks.keras.parts import transfer

L = keras.layers


def extract(native: keras.Model, inputs: Sequence[str], outputs: Sequence[str]) -> keras.Model:
    """The part of a canonical model that computes `outputs` from `inputs`, see `slimline.graph.edits.Extract`.

    Raises
    ------
    SlimlineError : a value inside of a layer, or of a layer that is called in several places.
    """
    tensors, copies = named_tensors(native), Copies()
    _refuse(n for n in (*inputs, *outputs) if n not in tensors)
    own = between(native, {id(tensors[n]) for n in inputs}, {id(tensors[n]) for n in outputs})
    _refuse(n for n in (*inputs, *(n for call in own for n in call.names)) if "@" in n)
    starts = [keras.Input(batch_shape=tensors[n].shape, dtype=tensors[n].dtype, name=n) for n in inputs]
    new = {id(tensors[n]): start for n, start in zip(inputs, starts, strict=True)}
    for call in own:
        args, kwargs = keras.tree.map_structure(lambda a: new.get(id(a), a), (call.args, dict(call.kwargs)))
        copy = copies.of(id(call.operation), lambda call=call: _settled(call))  # type: ignore[misc]
        made = keras.tree.flatten(copy(*args, **kwargs))
        if call.is_layer and not _drops(call.operation):
            transfer(call.operation.variables, copy)
        new.update((id(old), tensor) for old, tensor in zip(call.outputs, made, strict=True))
    ends = [new[id(tensors[n])] for n in outputs]
    part = keras.Model(starts if len(starts) > 1 else starts[0], ends if len(ends) > 1 else ends[0])
    freeze_like(part, native)
    part.output_names = list(outputs)
    return part


def _refuse(values: Iterable[str]) -> None:
    for name in values:
        raise SlimlineError(
            f"The network cannot be divided at {name!r}, which is within a layer or of one that is called in several "
            "places: give each place a layer of its own, or train without reconstruct."
        )


def _settled(call: Call) -> Any:
    """A copy of an operation that drops nothing, and whose statistics stay."""
    operation = call.operation
    copy = clone(operation, **({"rate": 0.0} if _drops(operation) else {}))
    if isinstance(operation, L.BatchNormalization):
        copy.trainable = False
    return copy


def _drops(operation: Any) -> bool:
    """Whether it drops numbers by chance, and holds nothing but a random state."""
    return hasattr(operation, "rate") and hasattr(operation, "seed_generator")
