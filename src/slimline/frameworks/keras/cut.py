"""Layers that read less: channels selected in front of them, smaller kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras.src.ops import numpy as numpy_ops

from slimline.basics.errors import SlimlineError
from slimline.frameworks.keras.functional import Call, clone, rebuild
from slimline.frameworks.keras.resize import take
from slimline.frameworks.keras.rewrite import Copier, parameters
from slimline.graph.cuts import Cut
from slimline.graph.equation import Window

L = keras.layers


def cut(native: keras.Model, cuts: Sequence[Cut]) -> keras.Model:
    """A copy in which each layer reads only what its cut leaves."""
    by_name = {layer_cut.reader.node.name: layer_cut for layer_cut in cuts}
    values = parameters(native)
    values |= {c.reader.layer.weight: take(values[c.reader.layer.weight], c.retained) for c in cuts}
    copies = Copier(native, values)

    def visit(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer_cut = by_name.get(call.name)
        if layer_cut is None:
            return copies.copy(call, args, kwargs)
        x, *others = args
        changes: dict[str, Any] = {}
        if layer_cut.window is not None:
            changes, zeros = _shrunk(call.operation, layer_cut)
            x = padded(x, zeros, call.name)
        if layer_cut.selection is not None:
            axis, index = layer_cut.selection
            x = numpy_ops.Take(axis=axis, name=f"{call.name}.inputs")(x, index)
        return copies.run(call, clone(call.operation, **changes), (x, *others), kwargs, values)

    return rebuild(native, visit)


def _shrunk(layer: Any, layer_cut: Cut) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """The config of a layer with the smaller kernel, and the zeros that are to be put around its input."""
    assert layer_cut.window is not None
    kernel, zeros = tuple(n for _, n, _ in layer_cut.window), list(layer_cut.zeros)
    sized = all(n is not None for n in layer.input.shape[1:-1])
    if not sized and layer.padding == "same" and max(layer.strides) > 1:
        raise SlimlineError(
            f"{layer.name} pads by the size of its input, which is open: build the model for one size or keep it whole."
        )
    changes = {"kernel_size": kernel, "dilation_rate": layer_cut.dilation}
    same = Window(tuple(layer.strides), layer_cut.dilation, "ceil").zeros(layer_cut.reader.sizes, kernel)
    causal = [(d * (n - 1), 0) for d, n in zip(layer_cut.dilation, kernel, strict=True)]
    if not any(map(any, zeros)):
        return {**changes, "padding": "valid"}, []
    for padding, around in (("same", same), ("causal", causal)):
        if zeros == around and padding in (layer.padding, "same"):
            return {**changes, "padding": padding}, []
    return {**changes, "padding": "valid"}, zeros


def padded(x: Any, zeros: Sequence[tuple[int, int]], name: str) -> Any:
    """`x` with zeros before and after each dimension between batch and channels; negative ones crop."""
    for kind, sign, part in (("ZeroPadding", 1, "pad"), ("Cropping", -1, "crop")):
        widths = tuple((max(sign * before, 0), max(sign * after, 0)) for before, after in zeros)
        if any(map(any, widths)):
            layer_type = getattr(L, f"{kind}{len(widths)}D")
            x = layer_type(widths[0] if len(widths) == 1 else widths, name=f"{name}.{part}")(x)
    return x
