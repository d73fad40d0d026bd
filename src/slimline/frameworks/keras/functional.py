"""A functional Keras model as a list of calls, and how to build another model from that list.

Every pass over a Keras model (reading, pruning, masking, fake quantization) is a replay of its calls.
Everything here is the public structure of Keras 3's functional graph, apart from `_nodes_by_depth`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import keras
import numpy as np

from slimline.basics.errors import SlimlineError, first_line
from slimline.frameworks.keras.rounding import Formatted
from slimline.frameworks.keras.weight import Weight

_STORED = ("float", "bfloat", "bool")

SEED_STATE = "seed_generator_state"
"""Last part of the path of the random state that dropout layers store among their variables."""


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an operation (a layer, or a bare ``keras.ops`` function) in a functional model.

    Attributes
    ----------
    name : the operation's name; ``name@1``, ``name@2`` … for further calls of a shared layer.
    operation : the `keras.Operation`.
    args, kwargs : what it was called with, `KerasTensor` among plain values.
    inputs : the `KerasTensor` among them, in order.
    outputs : the `KerasTensor` it gave, flat.
    """

    name: str
    operation: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]

    @property
    def is_input(self) -> bool:
        """Whether this is an input of the model and not a computation."""
        return isinstance(self.operation, keras.layers.InputLayer)

    @property
    def is_layer(self) -> bool:
        """Whether the operation is a layer (with a config and variables) and not a bare function."""
        return isinstance(self.operation, keras.layers.Layer)

    @property
    def is_weight(self) -> bool:
        """Whether the output is a parameter itself and not computed."""
        return isinstance(self.operation, Weight)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the output values: the call's own, with ``:0``, ``:1`` … where there are several; a parameter's."""
        if self.is_weight:
            return (f"{self.operation.name}/value",)
        if len(self.outputs) == 1:
            return (self.name,)
        return tuple(f"{self.name}:{i}" for i in range(len(self.outputs)))

    @cached_property
    def constants(self) -> dict[str, np.ndarray]:
        """Arrays among the arguments that are stored tensors, by name (``add/constant``)."""
        constants = [a for a in keras.tree.flatten((self.args, dict(self.kwargs))) if is_constant(a)]
        return {self.constant_name(i): keras.ops.convert_to_numpy(a) for i, a in enumerate(constants)}

    def constant_name(self, index: int) -> str:
        """Name of the `index`-th array among the arguments."""
        return f"{self.name}/constant" + (str(index) if index else "")


def is_array(argument: Any) -> bool:
    """Whether a call's argument is an array with axes of its own (scalars have none)."""
    if isinstance(argument, keras.KerasTensor) or not hasattr(argument, "shape") or not hasattr(argument, "dtype"):
        return False
    return len(argument.shape) > 0


def is_constant(argument: Any) -> bool:
    """Whether a call's argument is a stored tensor: an array of floating-point numbers, or of truth values. (Integers
    count positions.)"""
    return is_array(argument) and keras.backend.standardize_dtype(argument.dtype).strip("0123456789") in _STORED


def is_functional(model: Any) -> bool:
    """Whether `model` knows its graph: a functional model, or a Sequential one that has been built."""
    if isinstance(model, keras.Sequential):
        return getattr(model, "_functional", None) is not None
    return isinstance(model, keras.Model) and hasattr(model, "_nodes_by_depth")


def calls(model: keras.Model) -> list[Call]:
    """The calls of a functional or built Sequential model in topological order, its inputs among them."""
    graph = model._functional if isinstance(model, keras.Sequential) else model
    nodes = [n for depth in sorted(graph._nodes_by_depth, reverse=True) for n in graph._nodes_by_depth[depth]]
    by_operation: dict[int, list[Any]] = {}
    for node in nodes:
        by_operation.setdefault(id(node.operation), []).append(node)
    orders: dict[int, int] = {}
    earlier: dict[int, Any] = {}
    for same in by_operation.values():
        if len(same) > 1:
            same.sort(key=same[0].operation._inbound_nodes.index)
        orders.update((id(node), order) for order, node in enumerate(same))
        earlier.update((id(node), before) for before, node in pairwise(same))
    ordered = []
    for node in _in_calling_order(nodes, earlier):
        order = orders[id(node)]
        arguments = node.arguments
        ordered.append(
            Call(
                name=node.operation.name + (f"@{order}" if order else ""),
                operation=node.operation,
                args=tuple(arguments.args),
                kwargs=dict(arguments.kwargs),
                inputs=tuple(arguments.keras_tensors),
                outputs=tuple(node.output_tensors),
            )
        )
    return ordered


def _in_calling_order(nodes: Sequence[Any], earlier: Mapping[int, Any]) -> list[Any]:
    """Nodes in an order in which every one follows those that it reads and the `earlier` call of its operation.

    Keras sorts by depth, which may turn the calls of a shared layer around; a copy made in that order would number them
    anew, and formats and plans name them by these numbers.
    """
    known = {id(node) for node in nodes}
    done: dict[int, Any] = {}
    for node in nodes:
        stack = [node]
        while stack:
            last = stack[-1]
            before = [*last.parent_nodes, *([earlier[id(last)]] if id(last) in earlier else [])]
            missing = [n for n in before if id(n) in known and id(n) not in done]
            if missing:
                stack.extend(missing)
            else:
                done.setdefault(id(stack.pop()), last)
    return list(done.values())


Visit = Callable[[Call, tuple[Any, ...], dict[str, Any]], Any]
"""Calls the counterpart of a call's operation on the new tensors and gives its (nested) outputs."""


def replay(model: keras.Model, inputs: Sequence[Any], visit: Visit) -> list[Any]:
    """Run the calls of `model` on `inputs`, each by `visit`; the new tensors of the model's outputs."""
    tensors = {id(old): new for old, new in zip(model.inputs, inputs, strict=True)}
    for call in calls(model):
        if call.is_input:
            continue
        args, kwargs = keras.tree.map_structure(lambda a: tensors.get(id(a), a), (call.args, dict(call.kwargs)))
        outputs = [t for t in keras.tree.flatten(visit(call, args, kwargs)) if t is not None]
        tensors.update((id(old), new) for old, new in zip(call.outputs, outputs, strict=True))
    return [tensors[id(t)] for t in model.outputs]


def rebuild(model: keras.Model, visit: Visit, shapes: Sequence[tuple[int | None, ...]] | None = None) -> keras.Model:
    """A new functional model with flat inputs (of other `shapes`) and outputs, made by replaying `model`."""
    shapes = [tuple(t.shape) for t in model.inputs] if shapes is None else shapes
    inputs = [
        keras.Input(batch_shape=shape, dtype=t.dtype, name=input_name(t))
        for t, shape in zip(model.inputs, shapes, strict=True)
    ]
    with warnings.catch_warnings():  # masks are arguments, where they are wanted
        warnings.filterwarnings("ignore", message="Layer .* was passed an input with a mask attached")
        outputs = replay(model, inputs, visit)
    return keras.Model(_single(inputs), _single(outputs), name=model.name)


def final_activations(model: keras.Model) -> list[str]:
    """What each output ends in: ``softmax``, ``sigmoid`` or anything else."""
    producers = {id(out): call.operation for call in calls(model) for out in call.outputs}
    activations = []
    for out in model.outputs:
        last = producers[id(out)]
        activation = getattr(last, "activation", None)
        softmax = isinstance(last, keras.layers.Softmax) or activation is keras.activations.softmax
        activations.append("softmax" if softmax else getattr(activation, "__name__", ""))
    return activations


def dense(tensor: Any) -> keras.KerasTensor:
    """A symbolic tensor like this one to trace with: Keras takes the product of a tensor and a number for sparse."""
    return keras.KerasTensor(tensor.shape, tensor.dtype)


def input_name(tensor: Any) -> str:
    """Name of the input layer behind an input tensor of a model."""
    name: str = tensor._keras_history.operation.name
    return name


def _single(items: list[Any]) -> Any:
    return items[0] if len(items) == 1 else items


class Copies:
    """Makes one copy of each operation, so that a layer called twice stays one layer."""

    def __init__(self) -> None:
        self._copies: dict[Any, Any] = {}

    def of(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gave the first time it was asked for under `key`."""
        if key not in self._copies:
            self._copies[key] = make()
        return self._copies[key]

    def holds(self, candidate: Any) -> bool:
        """Whether it is one of the copies."""
        return any(copy is candidate for copy in self._copies.values())


def clone(operation: Any, **changes: Any) -> Any:
    """A new operation of the same class from the config of `operation`, with `changes`; weights are not copied."""
    try:
        config = {**operation.get_config(), **changes}
        if isinstance(operation, keras.layers.Lambda):  # its code is in this process already
            return type(operation).from_config(config, safe_mode=False)
        copy = type(operation).from_config(config)
        if isinstance(operation, Formatted):
            copy.adopt(operation)
        return copy
    except (AttributeError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        kind = type(operation).__name__
        raise SlimlineError(
            f"Layer {operation.name!r} ({kind}) cannot be copied from its config: give {kind} a get_config "
            f"that returns its constructor's arguments ({first_line(error)})."
        ) from error


_COUNTED = re.compile(r"^variable_\d+$")


def variables(model: keras.Model) -> dict[str, Any]:
    """Every variable of a model by its path, the random state of dropout included.

    What a layer holds inside another (``dense/kernel`` in a `TimeDistributed` called ``timed``) is named under
    the outer one: ``timed/dense/kernel``. Names that still repeat become ``owner@1/kernel``. A weight that its layer
    gave no name is called ``variable``, without the number by which Keras counts those of the whole process. Cells that
    are stacked are named without the stack, whose name is there or not as the layer was built.
    """
    named: dict[str, Any] = {}
    seen: set[int] = set()
    for layer in model.layers:
        for variable in layer.variables:
            if id(variable) in seen:
                continue
            seen.add(id(variable))
            owner, _, last = variable.path.rpartition("/")
            last = _COUNTED.sub("variable", last)
            if isinstance(cell := getattr(layer, "cell", None), keras.layers.StackedRNNCells):
                owner = owner.replace(f"{layer.name}/{cell.name}/", f"{layer.name}/", 1)
            if last == SEED_STATE:  # a generator's own name counts all that the process has made
                owner = layer.name
            elif owner != layer.name and not owner.startswith(f"{layer.name}/"):
                owner = f"{layer.name}/{owner}" if owner else layer.name
            name, count = f"{owner}/{last}", 1
            while name in named:
                name, count = f"{owner}@{count}/{last}", count + 1
            named[name] = variable
    return named


def weights(model: keras.Model) -> dict[str, Any]:
    """The variables that were trained, frozen ones too, by name: all but statistics and random states."""
    trained = {id(v) for layer in model._flatten_layers(include_self=False) for v in layer._trainable_variables}
    return {name: v for name, v in variables(model).items() if id(v) in trained}


def frozen(model: keras.Model) -> set[str]:
    """Names of the weights that training leaves as they are."""
    learning = {id(v) for v in model.trainable_variables}
    return {name for name, v in weights(model).items() if id(v) not in learning}


def freeze(model: keras.Model, names: Iterable[str]) -> None:
    """Freeze these weights of a model of one's own, those that it has."""
    held = weights(model)
    for name in set(names) & held.keys():
        held[name].trainable = False


def freeze_like(model: keras.Model, source: keras.Model) -> keras.Model:
    """Freeze in a copy what is frozen in its source, by name."""
    freeze(model, frozen(source))
    return model


def like(model: keras.Model, source: keras.Model) -> keras.Model:
    """Freeze in a copy what is frozen in its source, and call its outputs as they are called there."""
    model.output_names = list(source.output_names)
    return freeze_like(model, source)


def stored(model: keras.Model) -> dict[str, Any]:
    """The variables that are parameters: all but the random state of dropout."""
    return {name: v for name, v in variables(model).items() if not name.endswith(SEED_STATE)}


def finalize(layer: Any) -> None:
    """Let a layer recompute what it keeps beside its variables (a `Normalization`'s mean and variance)."""
    if isinstance(layer, keras.layers.Normalization) and layer.input_mean is None:
        layer.finalize_state()
