"""Takes a user's Keras model in: checks it, brings it into canonical form and proves that nothing changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from slimline.basics.arrays import Example, in_order
from slimline.basics.errors import NoExample, SlimlineError, raised
from slimline.frameworks.keras.canonical import ACTIVATION, canonical
from slimline.frameworks.keras.functional import freeze_like, input_name, is_functional, stored
from slimline.frameworks.keras.unfold import functional

Array = np.ndarray
TOLERANCE = 1e-3


def load(source: Any, example: Example | None) -> tuple[keras.Model, tuple[Array, ...]]:
    """The canonical copy of a functional or Sequential model, and example inputs.

    Parameters
    ----------
    source : never changed.
    example : one array ``(batch, …)`` per input, in their order or by their names; None makes a batch of 2
        from the input shapes.

    Raises
    ------
    SlimlineError : a subclassed or unbuilt model, NaN in weights, inputs of the wrong shape, a layer that
        its config does not rebuild.
    """
    if isinstance(example, dict):
        names = [input_name(tensor) for tensor in source.inputs] if is_functional(source) else ()
        example = in_order(example, names, "The example")
    if not is_functional(source):
        followed = functional(source, tuple(map(np.asarray, example))) if _subclassed(source) and example else None
        if followed is None:
            raise SlimlineError(_refusal(source))
        source = followed
    for name, variable in stored(source).items():
        values = keras.ops.convert_to_numpy(variable)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise SlimlineError(f"Weight {name!r} holds NaN or infinite values: load a checkpoint that is finite.")
    example = example_inputs(source) if example is None else checked(source, example)
    native = freeze_like(_canonical(source, example), source)
    native.output_names = output_names(source)
    _prove(source, native, example)
    return native, example


def output_names(source: keras.Model) -> list[str]:
    """Names of the outputs of a functional or Sequential model: keys where it answers in a dict, else its layers'."""
    graph = source._functional if isinstance(source, keras.Sequential) else source
    paths = [".".join(map(str, path)) for path, _ in keras.tree.flatten_with_path(graph._outputs_struct)]
    if all(part.isdigit() for path in paths for part in path.split(".") if part):
        paths = [tensor._keras_history.operation.name.removesuffix(ACTIVATION) for tensor in graph.outputs]
    return [f"{name}.{i}" if paths.count(name) > 1 else name for i, name in enumerate(paths)]


def _canonical(source: keras.Model, example: tuple[Array, ...]) -> keras.Model:
    """The canonical copy, its inputs of the source's sizes; of the example's where those are open and layers of the
    user's can only be followed with sizes that are known."""
    fixed = [(t.shape[0], *x.shape[1:]) for t, x in zip(source.inputs, example, strict=True)]
    if fixed == [tuple(t.shape) for t in source.inputs]:
        return canonical(source)
    try:
        native = canonical(source)
    except SlimlineError:
        return canonical(source, fixed)
    return min(native, canonical(source, fixed), key=_whole_layers) if _whole_layers(native) else native


def _whole_layers(native: keras.Model) -> int:
    """How many layers of a canonical model are classes of its user's."""
    return sum(type(layer).__module__.split(".")[0] not in ("keras", "slimline") for layer in native.layers)


def _subclassed(source: Any) -> bool:
    return isinstance(source, keras.Model) and not isinstance(source, keras.Sequential)


def _refusal(source: Any) -> str:
    if isinstance(source, keras.Sequential):
        return (
            f"The Sequential model {source.name!r} has not been built: "
            "start it with keras.Input(shape), or call build(input_shape) first."
        )
    return (
        f"{type(source).__name__} is a subclassed keras.Model, whose graph cannot be read: call it once and give "
        "example_inputs, and if it has weights of its own beside those of its layers, build it with the functional API."
    )


def example_inputs(model: keras.Model, shapes: Sequence[tuple[Sequence[int], str]] | None = None) -> tuple[Array, ...]:
    """Fixed normal numbers of `shapes` (shape and dtype per input), by default a batch of 2 of the model's own.

    Ones where integers are wanted: token 0 is often padding, and the mean over nothing but padding is no number.
    """
    random = np.random.default_rng(0)
    if shapes is None:
        shapes = [((t.shape[0] or 2, *t.shape[1:]), t.dtype) for t in model.inputs]
    arrays = []
    for tensor, (shape, dtype) in zip(model.inputs, shapes, strict=True):
        if None in shape:
            raise NoExample(
                f"Input {input_name(tensor)!r} has unknown sizes {tuple(tensor.shape)}: give example inputs."
            )
        floating = "float" in dtype
        numbers = random.standard_normal(tuple(shape)) if floating else np.ones(tuple(shape))
        arrays.append(numbers.astype("float32" if dtype == "bfloat16" else dtype))
    return tuple(arrays)


def checked(model: keras.Model, example: tuple[Array, ...]) -> tuple[Array, ...]:
    """`example` as arrays of the dtypes the model takes, if they fit its inputs."""
    if len(example) != len(model.inputs):
        raise SlimlineError(f"The model takes {len(model.inputs)} inputs, the example has {len(example)}.")
    fitted = []
    for tensor, value in zip(model.inputs, example, strict=True):
        array = np.asarray(value)
        expected = tuple(tensor.shape)
        fits = len(expected) == array.ndim and all(w in (None, n) for w, n in zip(expected, array.shape, strict=True))
        if not fits:
            raise SlimlineError(
                f"Input {input_name(tensor)!r} has shape {expected}, the example {array.shape}: "
                "give arrays (batch, …) of the model's sizes."
            )
        if array.dtype != tensor.dtype and (array.dtype.kind not in "biuf" or np.dtype(tensor.dtype).kind != "f"):
            raise SlimlineError(
                f"Input {input_name(tensor)!r} is {tensor.dtype}, the example {array.dtype}: convert it first."
            )
        fitted.append(array.astype(tensor.dtype, copy=False))
    return tuple(fitted)


def _prove(source: Any, native: keras.Model, example: tuple[Array, ...]) -> None:
    """Refuse a model whose canonical copy computes something else: a layer hides state from its config."""
    graph = source._functional if isinstance(source, keras.Sequential) else source
    arguments = keras.tree.pack_sequence_as(graph._inputs_struct, list(example))
    try:
        before = keras.tree.flatten(source(arguments, training=False))
    except Exception as reason:  # layers raise many types
        raise SlimlineError(
            f"Model {source.name!r} cannot be called with its example inputs ({raised(reason)}): check the model and "
            "its inputs."
        ) from reason
    after = keras.tree.flatten(native(list(example) if len(example) > 1 else example[0], training=False))
    for old, new in zip(before, after, strict=True):
        a, b = (np.asarray(keras.ops.convert_to_numpy(t), np.float64) for t in (old, new))
        largest = float(np.abs(a[np.isfinite(a)]).max(initial=0))
        if not np.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * max(1.0, largest), equal_nan=True):
            raise SlimlineError(
                f"A copy of model {source.name!r} made from its configs computes something else: "
                "one of its layers keeps state that get_config does not tell."
            )
