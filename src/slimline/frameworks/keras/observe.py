"""Shows the activations of a Keras model to whoever calibrates or measures it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.frameworks.keras.functional import Call, calls

Array = np.ndarray


def observe(
    native: keras.Model,
    batches: Iterable[tuple[Array, ...]],
    values: Sequence[str],
    see: Callable[[str, Array], None],
    sources: Sequence[str] | None = None,
) -> None:
    """Run the model in inference mode and hand every named value to `see`, batch by batch.

    Parameters
    ----------
    batches : the model's inputs, each ``(batch, …)``; every batch is run once and nothing is kept.
    values : names of the graph's values, model inputs among them; each keeps its shape and dtype.
    sources : values that the batches hold instead of the model's inputs; only what follows them is run.
    """
    tensors = named_tensors(native)
    missing = [name for name in (*values, *(sources or ())) if name not in tensors]
    if missing:
        raise SlimlineError(
            f"Value {missing[0]!r} exists only inside a Keras layer: leave that layer in float with "
            f"keep=[{missing[0].rpartition('/')[0]!r}]."
        )
    if sources is not None:
        own = between(native, {id(tensors[name]) for name in sources}, {id(tensors[name]) for name in values})
        for batch in batches:
            computed = {
                id(tensors[name]): keras.ops.convert_to_tensor(x) for name, x in zip(sources, batch, strict=True)
            }
            _run(own, computed)
            for name in values:
                see(name, keras.ops.convert_to_numpy(computed[id(tensors[name])]))
        return
    probe = keras.Model(native.inputs, [tensors[name] for name in values])
    for batch in batches:
        outputs = probe(list(batch), training=False)
        for name, output in zip(values, keras.tree.flatten(outputs), strict=True):
            see(name, keras.ops.convert_to_numpy(output))


def between(native: keras.Model, sources: set[int], values: set[int]) -> list[Call]:
    """The calls that make `values` of `sources` (ids of tensors), in order; Keras cannot cut a model out there."""
    needed, selected = values - sources, []
    for call in reversed(calls(native)):
        if needed & {id(t) for t in call.outputs}:
            selected.append(call)
            needed |= {id(t) for t in call.inputs} - sources
    return selected[::-1]


def _run(between: Sequence[Call], computed: dict[int, Any]) -> None:
    """Add the outputs of the calls to the tensors that were `computed`."""
    for call in between:
        args, kwargs = keras.tree.map_structure(lambda a: computed.get(id(a), a), (call.args, dict(call.kwargs)))
        outputs = keras.tree.flatten(call.operation(*args, **kwargs))
        computed.update((id(old), new) for old, new in zip(call.outputs, outputs, strict=True))


def named_tensors(native: keras.Model) -> dict[str, Any]:
    """The `KerasTensor` of every value, by its name in the neutral graph."""
    return {name: tensor for call in calls(native) for name, tensor in zip(call.names, call.outputs, strict=True)}
