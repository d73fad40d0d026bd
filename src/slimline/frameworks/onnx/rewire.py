"""Changes to the wiring of a native model: branches left out, activations silenced or truncated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import onnx_ir as ir

from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import Array
from slimline.frameworks.onnx.cut import reading
from slimline.frameworks.onnx.native import Editor, Native
from slimline.frameworks.onnx.operators import layer
from slimline.frameworks.onnx.rewrite import place_of
from slimline.frameworks.onnx.run import outline
from slimline.graph.edits import Multiply, PoolInput


def rewire(native: Native, instead: Mapping[str, str], example: tuple[Array, ...]) -> Native:
    """A copy in which the readers of a value read another; it is run once on `example` to prove that it runs.

    Operators that only served the value are gone, and the tensors that only they read. Names stay.
    """
    editor = Editor(native)
    values = editor.named([*instead, *instead.values()])
    for old, new in instead.items():
        editor.redirect(values[old], values[new])
    result = editor.done()
    result.session(example)
    return result


def tie(native: Native, instead: Mapping[str, str]) -> Native:
    """A copy in which the readers of a stored tensor read another; the tensor is gone."""
    editor = Editor(native)
    values = editor.named([*instead, *instead.values()])
    for old, new in instead.items():
        editor.redirect(values[old], values[new])
    return editor.done()


def pool(native: Native, change: PoolInput, example: tuple[Array, ...]) -> Native:
    """A copy that reads a smaller image, which it makes itself; it is run once on `example` to prove that it runs."""
    editor = Editor(native)
    value = editor.named([change.input])[change.input]
    sides = {"kernel_shape": [change.factor] * 2, "strides": [change.factor] * 2}
    pooled = editor.insert(editor.first(), "AveragePool", [value], sides)
    own = pooled.producer()
    assert own is not None
    editor.redirect(value, pooled, keep=[own])
    result = editor.done()
    try:
        result.session(example)
    except SlimlineError as reason:
        raise change.misfit(reason) from reason
    return result


def compute(native: Native, functions: Mapping[str, tuple[str, str]], example: tuple[Array, ...]) -> Native:
    """A copy in which values are a function of another value; they keep their names."""
    editor = Editor(native)
    kinds = _kinds(native, example)
    for name, (function, source) in functions.items():
        ends = editor.named([name, source])
        old = ends[name].producer()
        if old is None:
            raise SlimlineError(f"{name} is an input of the model, which nothing computes: name another value.")
        place_of(editor, old, _call(editor, old, ends[source], function, kinds[source]))
    return editor.done()


def _call(editor: Editor, before: ir.Node, value: ir.Value, function: str, kind: str) -> ir.Value:
    if function == "relu6":
        ends = [editor.constant(np.array(n, kind), f"{value.name}_{end}") for end, n in (("low", 0), ("high", 6))]
        return editor.insert(before, "Clip", [value, *ends])
    if function == "relu":
        return editor.insert(before, "Relu", [value])
    if function == "hardswish" and editor.opset >= 14:
        return editor.insert(before, "HardSwish", [value])
    gate = editor.insert(before, "HardSigmoid", [value], {"alpha": 1 / 6, "beta": 0.5})
    return gate if function == "hardsigmoid" else editor.insert(before, "Mul", [value, gate])


def silence(native: Native, values: Iterable[str], example: tuple[Array, ...]) -> Native:
    """A copy in which these activations are zero."""
    kinds = _kinds(native, example)

    def zero(editor: Editor, value: ir.Value, after: ir.Node) -> ir.Value:
        number = editor.constant(np.array(0, kinds[str(value.name)]), f"{value.name}_zero")
        return editor.append(after, "Mul", [value, number])

    return _after(native, dict.fromkeys(values, zero))


def truncate(native: Native, thresholds: Mapping[str, float]) -> Native:
    """A copy in which of these activations all that is not above the threshold is zero."""

    def cut(threshold: float) -> Insert:
        return lambda editor, value, after: editor.append(
            after, "ThresholdedRelu", [value], {"alpha": float(threshold)}
        )

    return _after(native, {name: cut(t) for name, t in thresholds.items()})


def multiply(native: Native, edit: Multiply, example: tuple[Array, ...]) -> Native:
    """A copy in which layers read a value times stored numbers, called ``factors`` of the first layer; it is run once
    on `example` to prove that it runs."""
    editor = Editor(native)
    sources = editor.named(edit.readers)
    outlines = _outlines(native, example)
    order = {node: position for position, node in enumerate(editor.graph)}
    for name, made in edit.readers.items():
        first, *others = sorted((reading(editor, output) for output in made), key=order.__getitem__)
        rank, kind = outlines[name]
        numbers = edit.numbers[name].astype(kind).reshape(-1, *[1] * (rank - 1 - edit.axes[name]))
        factors = editor.constant(numbers, f"{layer(first)}.factors")
        product = editor.insert(first, "Mul", [sources[name], factors])
        for node in (first, *others):
            node.replace_input_with(0, product)
    result = editor.done()
    result.session(example)
    return result


Insert = Callable[[Editor, ir.Value, ir.Node], ir.Value]


def _kinds(native: Native, example: tuple[Array, ...]) -> dict[str, str]:
    return {name: kind for name, (_, kind) in _outlines(native, example).items()}


def _outlines(native: Native, example: tuple[Array, ...]) -> dict[str, tuple[int, str]]:
    """Dimensions and dtype of every value, inputs too."""
    computed = {name: (len(value.shape), value.dtype) for name, value in outline(native.model, example).items()}
    inputs = zip(native.model.graph.inputs, example, strict=True)
    return computed | {str(value.name): (x.ndim, x.dtype.name) for value, x in inputs}


def _after(native: Native, inserts: Mapping[str, Insert]) -> Native:
    """A copy in which the readers of each value read what `inserts` makes of it."""
    editor = Editor(native)
    for name, value in editor.named(inserts).items():
        source = value.producer()
        inserted = inserts[name](editor, value, editor.first() if source is None else source)
        own = inserted.producer()
        assert own is not None
        if source is None:  # an input of the model: what reads it comes later
            editor.graph.remove(own)
            editor.graph.insert_before(editor.first(), own)
        editor.redirect(value, inserted, keep=[own])
    return editor.done()
