"""Changes to the wiring of a canonical model: branches left out, activations silenced or truncated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import keras
from keras import layers as L
from keras.src.ops import numpy as numpy_ops

from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import Array
from slimline.frameworks.keras.functional import Call, calls, input_name, rebuild, variables
from slimline.frameworks.keras.rewrite import Copier, copier, parameters
from slimline.frameworks.keras.weight import Weight
from slimline.graph.edits import Multiply, PoolInput, Subtract

_FUNCTIONS: Mapping[str, Callable[[str, Any], Any]] = {
    "relu": lambda name, dtype: L.ReLU(name=name, dtype=dtype),
    "relu6": lambda name, dtype: L.ReLU(6.0, name=name, dtype=dtype),
    "hardsigmoid": lambda name, dtype: L.Activation("hard_sigmoid", name=name, dtype=dtype),
    "hardswish": lambda name, dtype: L.Activation("hard_silu", name=name, dtype=dtype),
}


def rewire(native: keras.Model, instead: Mapping[str, str]) -> keras.Model:
    """A copy in which the readers of a value read another; calls that no output needs any more are gone."""
    return _instead(native, instead, lambda call, name, tensor: tensor)


def tie(native: keras.Model, instead: Mapping[str, str]) -> keras.Model:
    """A copy in which a layer all of whose weights are to be those of another is that layer, called once more."""
    names = {id(variable): name for name, variable in variables(native).items()}
    holders = {name: call.operation for call in calls(native) for name in _weights(call, names)}
    shared: dict[int, Any] = {}
    for call in calls(native):
        own = _weights(call, names)
        if gone := [name for name in own if name in instead]:
            heads = {id(holders[instead[name]]): holders[instead[name]] for name in gone}
            (head,) = heads.values()
            if gone != own or _plan_of(head) != _plan_of(call.operation):
                raise SlimlineError(
                    f"Layer {call.operation.name!r} cannot be called in the place of {head.name!r}, as their settings "
                    "differ: leave one out by keep."
                )
            shared[id(call.operation)] = head
    copier = Copier(native, parameters(native))

    def visit(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        head = shared.get(id(call.operation))
        return copier.copy(call if head is None else replace(call, operation=head), args, kwargs)

    return rebuild(native, visit)


def _weights(call: Call, names: Mapping[int, str]) -> list[str]:
    """Names of the weights that a call's layer holds."""
    return [names[id(variable)] for variable in call.operation.weights] if call.is_layer else []


def _plan_of(layer: Any) -> dict[str, Any]:
    """What a layer is made of, but its name."""
    return {key: value for key, value in layer.get_config().items() if key != "name"}


def pool(native: keras.Model, change: PoolInput) -> keras.Model:
    """A copy that reads a smaller image, which it makes itself."""
    _check(native, [change.input])
    (image,) = [tensor for tensor in native.inputs if input_name(tensor) == change.input]
    layer = L.AveragePooling2D(change.factor, name=f"{change.input}.smaller", dtype=image.dtype)
    copy = copier(native)
    smaller: list[Any] = []

    def visit(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        old = iter(call.inputs)

        def read(argument: Any) -> Any:
            if not isinstance(argument, keras.KerasTensor) or next(old) is not image:
                return argument
            if not smaller:
                smaller.append(layer(argument))
            return smaller[0]

        return copy(call, *keras.tree.map_structure(read, (args, kwargs)))

    try:
        return rebuild(native, visit)
    except (ValueError, SlimlineError) as reason:
        raise change.misfit(reason) from reason


def compute(native: keras.Model, functions: Mapping[str, tuple[str, str]]) -> keras.Model:
    """A copy in which values are a function of another value."""

    def apply(call: Call, name: str, tensor: Any) -> Any:
        function, _ = functions[name]
        dtype = call.operation.dtype_policy if call.is_layer else None
        return _FUNCTIONS[function](f"{_plain(name)}.{function}", dtype)(tensor)

    return _instead(native, {name: source for name, (_, source) in functions.items()}, apply)


def _instead(native: keras.Model, instead: Mapping[str, str], make: Callable[[Call, str, Any], Any]) -> keras.Model:
    """A copy in which the readers of a value (key) read what `make` gives for its call, its name, and the tensor of
    another value."""
    _check(native, [*instead, *instead.values()])
    replacements = set(instead.values())
    copy = copier(native)
    inputs = {input_name(t): t for t in native.inputs}
    tensors: dict[str, Any] = {}

    def visit(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for tensor, argument in zip(call.inputs, _tensors(args, kwargs), strict=True):
            if (name := names.get(id(tensor))) in replacements:
                tensors[name] = argument
        outputs = keras.tree.flatten(copy(call, args, kwargs))
        tensors.update(zip(call.names, outputs, strict=True))
        outputs = [
            make(call, name, tensors[instead[name]]) if name in instead else t
            for name, t in zip(call.names, outputs, strict=True)
        ]
        tensors.update(zip(call.names, outputs, strict=True))
        return outputs

    names = {id(t): name for name, t in inputs.items()}
    return rebuild(native, visit)


def silence(native: keras.Model, values: Iterable[str]) -> keras.Model:
    """A copy in which these activations are zero."""
    return _after(native, dict.fromkeys(values, lambda name: L.Rescaling(0.0, name=f"{name}.silenced")))


def truncate(native: keras.Model, thresholds: Mapping[str, float]) -> keras.Model:
    """A copy in which of these activations all that is not above the threshold is zero."""

    def cut(threshold: float) -> Callable[[str], Any]:
        return lambda name: L.ReLU(threshold=float(threshold), name=f"{name}.truncated")

    return _after(native, {name: cut(t) for name, t in thresholds.items()})


def subtract(native: keras.Model, edit: Subtract) -> keras.Model:
    """A copy in which layers read their input less a `Weight`, called ``threshold`` of the layer."""
    _check(native, [*edit.numbers, *(source for source, _ in edit.numbers.values())])
    copy, numbers = copier(native), _Numbers(native)

    def visit(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        made = next((name for name in call.names if name in edit.numbers), None)
        if made is None:
            return copy(call, args, kwargs)
        x, *others = args
        last = len(x.shape) - 1
        name, threshold = numbers.before(call, x, "threshold", edit.numbers[made][1], edit.axes.get(made, last))
        return copy(call, (numpy_ops.Subtract(name=f"{name}.difference")(x, threshold), *others), kwargs)

    return rebuild(native, visit)


def multiply(native: keras.Model, edit: Multiply) -> keras.Model:
    """A copy in which layers read a value times a `Weight`, called ``factors`` of the layer that reads it first."""
    _check(native, [*edit.readers, *(made for readers in edit.readers.values() for made in readers)])
    copy, numbers = copier(native), _Numbers(native)
    source_of = {made: source for source, readers in edit.readers.items() for made in readers}
    products: dict[str, Any] = {}

    def visit(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        source = next((source_of[name] for name in call.names if name in source_of), None)
        if source is None:
            return copy(call, args, kwargs)
        x, *others = args
        if source not in products:
            name, factors = numbers.before(call, x, "factors", edit.numbers[source], edit.axes[source])
            products[source] = numpy_ops.Multiply(name=f"{name}.product")(x, factors)
        return copy(call, (products[source], *others), kwargs)

    return rebuild(native, visit)


class _Numbers:
    """Puts weights before layers of a model that is copied, under names that it has not yet."""

    def __init__(self, native: keras.Model) -> None:
        self.taken = {call.operation.name for call in calls(native)}

    def before(self, call: Call, x: Any, leaf: str, numbers: Array, axis: int) -> tuple[str, Any]:
        """Numbers along an axis of what a layer reads, as a tensor that broadcasts against it, and the name of their
        `Weight`, which is that of the layer and `leaf` or much like it."""
        name = f"{_plain(call.name)}.{leaf}"
        while name in self.taken:
            name += "_"
        weight = Weight((len(numbers),), name=name, dtype=call.operation.dtype_policy)
        value = weight(x)
        weight.set_weights([numbers])
        following = len(x.shape) - 1 - axis
        if following:
            value = numpy_ops.Reshape((-1, *[1] * following), name=f"{name}.shaped")(value)
        return name, value


def _after(native: keras.Model, layers: Mapping[str, Callable[[str], Any]]) -> keras.Model:
    """A copy in which the readers of each value read what a layer, made of its name, makes of it."""
    _check(native, layers)
    copy = copier(native)

    def visit(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        outputs = keras.tree.flatten(copy(call, args, kwargs))
        return [
            layers[name](_plain(name))(t) if name in layers else t for name, t in zip(call.names, outputs, strict=True)
        ]

    return rebuild(native, visit)


def _plain(name: str) -> str:
    """The name of a value as one that a layer takes."""
    return name.replace("@", ".call").replace(":", ".output")


def _check(native: keras.Model, names: Iterable[str]) -> None:
    known = {input_name(t) for t in native.inputs} | {name for call in calls(native) for name in call.names}
    for name in names:
        if name not in known:
            raise SlimlineError(f"The model computes no value called {name!r}: read its graph again.")


def _tensors(args: Any, kwargs: Any) -> list[Any]:
    return [a for a in keras.tree.flatten((args, kwargs)) if isinstance(a, keras.KerasTensor)]
