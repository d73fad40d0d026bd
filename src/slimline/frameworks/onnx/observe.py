"""Hands named activations of a native model to an observer, one batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import Array
from slimline.frameworks.onnx.native import Native
from slimline.frameworks.onnx.run import Session, part


def observe(
    native: Native,
    batches: Iterable[tuple[Array, ...]],
    values: Sequence[str],
    see: Callable[[str, Array], None],
    sources: Sequence[str] | None = None,
) -> None:
    """Run what `values` need of `native` on every batch and call ``see(name, array)`` for each of them.

    With `sources`, the batches hold these values instead of the model's inputs.
    """
    known = native.names
    for name in (*values, *(sources or ())):
        if name not in known:
            raise SlimlineError(f"The model computes no value called {name!r}: read its graph again.")
    starts = [str(v.name) for v in native.model.graph.inputs] if sources is None else list(sources)
    computed = [name for name in dict.fromkeys(values) if name not in starts]
    session: Session | None = None
    for inputs in batches:
        held = dict(zip(starts, inputs, strict=True))
        for name in dict.fromkeys(values):
            if name in held:
                see(name, held[name])
        if not computed:
            continue
        if session is None:
            session = Session(part(native.model, computed, None if sources is None else held))
        for name, array in zip(computed, session(inputs, computed), strict=True):
            see(name, array)
