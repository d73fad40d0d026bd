"""Carries a plan out on a canonical Keras model: every operation is rebuilt from its config, smaller.

`apply` slices weights and counts sizes anew. `mask` zeroes the same slices in a model of the old shapes;
an operation that averages, normalises or contracts over positions that go, or divides by them, runs on those that stay,
and its result is put back among zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras.src.ops import numpy as numpy_ops

from slimline.basics.errors import SlimlineError, unknown
from slimline.frameworks.keras import resize
from slimline.frameworks.keras.functional import (
    SEED_STATE,
    Call,
    Copies,
    Visit,
    calls,
    clone,
    is_constant,
    rebuild,
    stored,
    variables,
)
from slimline.frameworks.keras.parts import transfer
from slimline.graph.ir import Node
from slimline.graph.removal import Removal

Array = np.ndarray
DIVIDING = ("div", "floor_divide", "mod", "fmod", "power", "reciprocal", "rsqrt", "log", "log2", "log10")
"""Element-wise functions that make no number of a zero."""


def parameters(native: keras.Model) -> dict[str, Array]:
    """Every variable and constant under its name in the graph."""
    arrays = {name: keras.ops.convert_to_numpy(v) for name, v in stored(native).items()}
    for call in calls(native):
        arrays.update(call.constants)
    return arrays


def replace(native: keras.Model, new: Mapping[str, Array]) -> keras.Model:
    """A copy of the model with the arrays `new` in place of its own of the same names and shapes."""
    now = parameters(native)
    for name, array in new.items():
        if name not in now:
            raise unknown("parameter", name, now)
        if array.shape != now[name].shape:
            raise SlimlineError(f"Parameter {name!r} has shape {now[name].shape}, its replacement {array.shape}.")
    now.update(new)
    copier = Copier(native, now)
    return rebuild(native, copier.copy)


def copier(native: keras.Model) -> Visit:
    """A visit that copies every call, weights included."""
    return Copier(native, parameters(native)).copy


def apply(native: keras.Model, plan: Removal, example: tuple[Array, ...]) -> keras.Model:
    """A smaller model from which all that the plan names is removed."""
    surgeon = _Surgeon(native, plan)
    return rebuild(native, surgeon.prune)


def mask(native: keras.Model, plan: Removal) -> keras.Model:
    """A model of the old shapes that computes what `apply`'s does; what goes is zero."""
    surgeon = _Surgeon(native, plan)
    return rebuild(native, surgeon.mask)


class Copier:
    """Copies calls, with `values` in the copies' variables and constants."""

    def __init__(self, native: keras.Model, values: Mapping[str, Array]) -> None:
        self.values = values
        self.copies = Copies()
        self.variables = {id(v): name for name, v in variables(native).items()}

    def copy(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A visit that changes no shape."""
        operation = self.copies.of(id(call.operation), lambda: clone(call.operation))
        names = iter(call.constants)
        args, kwargs = keras.tree.map_structure(
            lambda a: self.values[next(names)] if is_constant(a) else a, (args, kwargs)
        )
        return self.run(call, operation, args, kwargs, self.values)

    def run(self, call: Call, operation: Any, args: Any, kwargs: Any, values: Mapping[str, Array]) -> Any:
        """Call the copy of an operation and fill in its variables."""
        outputs = operation(*args, **kwargs)
        if call.is_layer:
            old = [(self.variables[id(v)], v) for v in call.operation.variables]
            transfer([v if name.endswith(SEED_STATE) else values[name] for name, v in old], operation)
        return outputs


class _Surgeon:
    """The visits of `apply` and `mask`."""

    def __init__(self, native: keras.Model, plan: Removal) -> None:
        now = parameters(native)
        self.small = {name: resize.take(array, plan.retained(name)) for name, array in now.items()}
        self.zeroed = Copier(native, {name: resize.zero(array, plan.retained(name)) for name, array in now.items()})
        self.pruned = Copies()
        self.sizes = resize.Sizes(plan, resize.value_names(calls(native), native), self.zeroed.variables)
        self.shrinking = {
            n.name.partition("/")[0] for n in plan.graph.nodes if plan.statistics(n.name) or _divides(n, plan)
        }

    def prune(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a smaller copy of the operation on pruned tensors."""
        operation = self.pruned.of(id(call.operation), lambda: clone(call.operation, **resize.config(call, self.sizes)))
        args, kwargs = resize.arguments(call, args, kwargs, self.sizes)
        return self.zeroed.run(call, operation, args, kwargs, self.small)

    def mask(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a copy with zeros; where positions that go would enter statistics, only on what stays."""
        if call.name not in self.shrinking:
            return self.zeroed.copy(call, args, kwargs)
        name = call.name.replace("@", ".call")
        old = iter(call.inputs)

        def gather(argument: Any) -> Any:
            if not isinstance(argument, keras.KerasTensor):
                return argument
            tensor = next(old)
            for axis, index in enumerate(self.sizes.retained(tensor)):
                if index is not None:
                    position = len(gathered)
                    gathered.append(index)
                    argument = numpy_ops.Take(axis=axis, name=f"{name}.stay{position}")(argument, index)
            return argument

        gathered: list[Array] = []
        args, kwargs = keras.tree.map_structure(gather, (args, kwargs))
        outputs = keras.tree.flatten(self.prune(call, args, kwargs))
        return [
            self._put_back(output, tensor, f"{name}.back{i}")
            for i, (output, tensor) in enumerate(zip(outputs, call.outputs, strict=True))
        ]

    def _put_back(self, x: Any, tensor: Any, name: str) -> Any:
        """The kept positions at their old places, zeros at the others."""
        sizes = self.sizes.before(tensor)
        for axis, index in enumerate(self.sizes.retained(tensor)):
            if index is None:
                continue
            widths = tuple((0, int(d == axis)) for d in range(len(sizes)))
            padded = numpy_ops.Pad(widths, name=f"{name}.zero{axis}")(x)
            places = np.full(sizes[axis], len(index))
            places[index] = np.arange(len(index))
            x = numpy_ops.Take(axis=axis, name=f"{name}.place{axis}")(padded, places)
        return x


def _divides(node: Node, plan: Removal) -> bool:
    """Whether an operation would divide by the zeros that a mask puts in."""
    dividing = node.kind == "elementwise" and node.attributes["function"] in DIVIDING
    return dividing and any(indices is not None for name in node.inputs if name for indices in plan.retained(name))
