"""Layers and models that a user wrote as classes, opened into the calls that their `call` makes.

Called on symbolic tensors, a layer gives a functional graph over the layers it holds, in which the weights of its own
are tensors, each from a `Weight`. One whose `call` leaves Keras, or does something else in training, stays whole.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import keras
from keras.src.backend import compute_output_spec, get_keras_mask, set_keras_mask  # they have no public name

from slimline.frameworks.keras.functional import Copies, calls, replay
from slimline.frameworks.keras.rebatch import freed, unused
from slimline.frameworks.keras.weight import Weight

log = logging.getLogger(__name__)
L = keras.layers

OPENED = (L.MultiHeadAttention, L.GroupQueryAttention, L.Attention, L.AdditiveAttention, L.ReversibleEmbedding)
"""Classes of Keras' own that are opened like a user's."""


@dataclass(frozen=True)
class Opened:
    """What a layer does in one call.

    Attributes
    ----------
    graph : functional model over the call's tensors (see `tensors_of`) and then the layer's own weights.
    outputs : the structure of its outputs; what is no tensor is None.
    own : weights that belong to no layer of Keras', by the names of the attributes that hold them.
    paths : of every layer inside (by id) the names that lead to it.
    """

    graph: keras.Model
    outputs: Any
    own: Mapping[str, Any]
    paths: Mapping[int, str]

    def pack(self, outputs: list[Any]) -> Any:
        """Tensors of the graph's outputs in their structure."""
        each = iter(outputs)
        return keras.tree.map_structure(lambda old: None if old is None else next(each), self.outputs)


def is_composite(layer: Any) -> bool:
    """Whether a layer may be opened: built, with a `call` of its user's, and no state but layers and weights."""
    if not isinstance(layer, L.Layer) or not layer.built or type(layer).call is L.Layer.call:
        return False
    if type(layer).__module__.split(".")[0] in ("keras", "slimline") and type(layer) not in OPENED:
        return False
    own = {id(v) for v in _own(layer)}
    mixed = bool(own) and layer.compute_dtype != layer.variable_dtype  # a weight is cast where a layer reads it
    return not mixed and own <= {id(v) for v in _attributes(layer).values()}


def _own(layer: Any) -> list[Any]:
    """The weights, and random states, that belong to no layer inside."""
    held = {id(v) for part in layer._flatten_layers(include_self=False) for v in part.variables}
    return [v for v in layer.variables if id(v) not in held]


def _attributes(layer: Any) -> dict[str, Any]:
    """The layer's variables by the attribute that holds them; one in a list by its place, too."""
    variables = {}
    for name, value in vars(layer).items():
        if isinstance(value, keras.Variable):
            variables[name] = value
        elif isinstance(value, list) and not name.startswith("_"):
            variables |= {f"{name}.{i}": v for i, v in enumerate(value) if isinstance(v, keras.Variable)}
    return variables


def opened(layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Opened | None:
    """What a composite layer does with these arguments; None where its `call` cannot be followed, whether or not it
    knows the size of the batch."""
    tensors = tensors_of(args, kwargs)
    shapes = [tuple(t.shape) for t in tensors]
    expansion = _opened(layer, args, kwargs, shapes)
    if expansion is None and any(shape and shape[0] is None for shape in shapes):
        size = unused([*shapes, *(tuple(v.shape) for v in layer.variables)])
        sized = [(size, *shape[1:]) if shape and shape[0] is None else shape for shape in shapes]
        traced = _opened(layer, args, kwargs, sized)
        try:
            with _named(layer):
                expansion = None if traced is None else replace(traced, graph=freed(traced.graph, size))
        except Exception as reason:  # what is called again is the user's code
            log.info("%s stays whole: %s", layer.name, reason)
    if expansion is not None:
        _number(expansion.graph)
    return expansion


def _opened(layer: Any, args: Any, kwargs: Mapping[str, Any], shapes: list[tuple[int | None, ...]]) -> Opened | None:
    """The same for tensors of these shapes."""
    tensors = tensors_of(args, kwargs)
    fresh = {id(t): keras.Input(batch_shape=s, dtype=t.dtype) for t, s in zip(tensors, shapes, strict=True)}
    masks = [(fresh[id(t)], fresh[id(mask)]) for t in tensors if (mask := get_keras_mask(t)) is not None]
    args, kwargs = keras.tree.map_structure(lambda a: fresh.get(id(a), a), (args, dict(kwargs)))

    def run(**more: Any) -> Any:
        for tensor, mask in masks:  # attention takes them off
            set_keras_mask(tensor, mask)
        return layer.call(*args, **{**kwargs, **more})

    return _followed(layer, list(fresh.values()), run)


def _number(graph: keras.Model) -> None:
    """Names of a graph's own for its bare functions; Keras counts those of the whole process."""
    bare = [c.operation for c in calls(graph) if not c.is_input and not c.is_layer]
    for index, operation in enumerate(dict.fromkeys(bare)):
        operation.name = f"{type(operation).__name__.lower()}_{index}"


def followed(function: Callable[[Any], Any], x: Any) -> keras.Model | None:
    """A function of a tensor like `x` as a functional model; None where it cannot be followed."""
    symbol = keras.Input(batch_shape=tuple(x.shape), dtype=x.dtype)
    try:
        graph = keras.Model(symbol, function(symbol))
    except Exception as reason:  # a user's code may raise anything
        log.info("%s stays whole: %s", function, reason)
        return None
    _number(graph)
    return graph


def functional(model: keras.Model, example: tuple[Any, ...]) -> keras.Model | None:
    """A subclassed model as a functional one over the same layers, called as on `example`; None where it cannot be
    followed."""
    if not is_composite(model):
        return None
    inputs = [keras.Input(x.shape[1:], dtype=str(x.dtype), name=f"input_{i}") for i, x in enumerate(example)]
    traced = _followed(model, inputs, lambda **more: model.call(inputs if len(inputs) > 1 else inputs[0], **more))
    if traced is None:
        return None
    _number(traced.graph)
    if not traced.own:
        return traced.graph
    tensors = [*inputs, *own_weights(traced.own, inputs[0], "", Copies())]
    outputs = replay(traced.graph, tensors, lambda call, args, kwargs: call.operation(*args, **kwargs))
    return keras.Model(inputs, outputs, name=model.name)


def own_weights(own: Mapping[str, Any], anchor: Any, prefix: str, copies: Copies) -> list[Any]:
    """An opened layer's own weights as tensors of a graph that `anchor` belongs to, each made once."""
    tensors = []
    for attribute, variable in own.items():
        weight = copies.of((id(variable), "weight"), partial(Weight.of, variable, prefix + attribute))
        tensors.append(weight(anchor))
        weight.value.assign(variable)
    return tensors


def rests(layer: Any, tensor: Any) -> bool:
    """Whether a layer gives a tensor like `tensor` back as it is when it does not train, and in training one of its
    sizes, whatever they are: a stochastic depth or a noise of a user's own."""
    if layer.trainable_variables or type(layer).call is L.Layer.call:
        return False
    trains = "training" in inspect.signature(layer.call).parameters
    x = keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype)
    other = keras.KerasTensor((x.shape[0], *(n and n + 1 for n in x.shape[1:])), x.dtype)
    try:
        same = layer.call(x, **({"training": False} if trains else {})) is x
        return same and (
            not trains or compute_output_spec(partial(layer.call, training=True), other).shape == other.shape
        )
    except Exception as reason:  # a user's code may raise anything
        log.info("%s stays whole: %s", layer.name, reason)
        return False


def tensors_of(args: Any, kwargs: Any) -> list[Any]:
    """The tensors among the arguments of a call, each once, and then the masks that they carry."""
    tensors = [t for t in keras.tree.flatten((args, dict(kwargs))) if isinstance(t, keras.KerasTensor)]
    masks = [get_keras_mask(t) for t in tensors]
    return list({id(t): t for t in [*tensors, *masks] if t is not None}.values())


def with_masks(layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a call, with the masks that Keras takes from its tensors: of one tensor ``mask``, of
    several ``NAME_mask``, where `call` has such an argument that is not given."""
    signature = inspect.signature(layer.call)
    arguments = signature.bind(*args, **kwargs).arguments
    tensors = {
        name: value
        for name, value in arguments.items()
        if (flat := keras.tree.flatten(value))
        and all(t is None or isinstance(t, keras.KerasTensor) for t in flat)
        and any(t is not None for t in flat)
    }
    masks = {}
    for name, value in tensors.items():
        parameter = "mask" if len(tensors) == 1 else f"{name}_mask"
        mask = keras.tree.map_structure(lambda t: None if t is None else get_keras_mask(t), value)
        missing = parameter in signature.parameters and arguments.get(parameter) is None
        if missing and any(m is not None for m in keras.tree.flatten(mask)):
            masks[parameter] = mask
    return {**kwargs, **masks}


def masked_as(layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], outputs: Any) -> Any:
    """The outputs of an opened layer, with the masks that the layer gives them."""
    if layer.supports_masking:
        first = args[0] if args else next(iter(kwargs.values()))
        before = kwargs.get("mask")
        before = keras.tree.map_structure(get_keras_mask, first) if before is None else before
        layer._set_mask_metadata(first, outputs, before)
    return outputs


def _followed(layer: Any, inputs: list[Any], run: Callable[..., Any]) -> Opened | None:
    """The graph of a `run` of the layer's `call` on `inputs`, once and the same with ``training=True``."""
    paths = _paths(layer)
    inside = [layer, *(part for part in layer._flatten_layers(include_self=False) if is_composite(part))]
    own: dict[str, Any] = {}
    for part in inside:
        ids = {id(v) for v in _own(part)}
        prefix = f"{paths[id(part)]}." if part is not layer else ""
        own |= {prefix + name.lstrip("_"): v for name, v in _attributes(part).items() if id(v) in ids}
    weights = [keras.Input(batch_shape=tuple(v.shape), dtype=v.dtype) for v in own.values()]
    tensors = dict(zip(map(id, own.values()), weights, strict=True))
    graphs = []
    try:
        for training in (None, True):
            more = {"training": training} if "training" in inspect.signature(layer.call).parameters else {}
            with ExitStack() as stack:
                stack.enter_context(_named(layer))
                for part in inside:
                    stack.enter_context(_replaced(part, tensors))
                    if part is not layer:
                        stack.enter_context(_inlined(part, training))
                outputs = run(**(more if training else {}))
                results = [t for t in keras.tree.flatten(outputs) if t is not None]
                graphs.append((keras.Model([*inputs, *weights], results, name=layer.name), outputs))
        (inner, outputs), (trained, _) = graphs
        if _operations(trained) != _operations(inner):
            raise NotImplementedError("it does something else in training")
        if any(_open(c.operation) for c in calls(inner) if not c.is_layer):
            raise NotImplementedError("it asks for sizes that are open")
    except Exception as reason:  # a user's code may raise anything: the layer stays whole, and the plan says so
        log.info("%s stays whole: %s", layer.name, reason)
        return None
    return Opened(inner, outputs, own, paths)


def _paths(layer: Any, prefix: str = "") -> dict[int, str]:
    """The names that lead to the layers inside a layer, joined by dots."""
    paths: dict[int, str] = {}
    for part in layer._layers:
        paths.setdefault(id(part), prefix + part.name)
        paths = _paths(part, f"{prefix}{part.name}.") | paths
    return paths


def _operations(model: keras.Model) -> list[Any]:
    return [type(c.operation) for c in calls(model)]


def _open(operation: Any) -> bool:
    """Whether a bare operation was given a size that is not known."""
    shapes = [vars(operation).get(name) for name in ("shape", "newshape", "repeats")]
    return any(n is None for shape in shapes if isinstance(shape, (tuple, list)) for n in shape)


@contextmanager
def _named(layer: Any) -> Iterator[None]:
    """The layers inside a layer, called by what leads to them, for a while: their own names may repeat. And they know
    the shapes that they make, of which an `EinsumDense` tells only what its config says."""
    inside = {id(part): part for part in layer._flatten_layers(include_self=False)}
    before = {key: part.name for key, part in inside.items()}
    for key, path in _paths(layer).items():
        vars(inside[key])["name"] = path

    def spec(self: Any, *args: Any, **kwargs: Any) -> Any:
        return compute_output_spec(self.call, *args, **kwargs)

    with ExitStack() as stack:
        for part in inside.values():
            if type(part) is L.EinsumDense:
                stack.enter_context(_with_methods(part, compute_output_spec=spec))
        try:
            yield
        finally:
            for key, name in before.items():
                vars(inside[key])["name"] = name


def _inlined(layer: Any, training: bool | None) -> AbstractContextManager[None]:
    """A composite layer that does what it does when it is called, instead of becoming one operation.

    Keras asks a layer that it calls on symbolic tensors for its output's shape, and takes nothing but tensors from it.
    """
    kind = type(layer)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            arguments = with_masks(self, args, kwargs)
            if training and "training" in inspect.signature(self.call).parameters:
                arguments.setdefault("training", True)
            return masked_as(self, args, arguments, self.call(*args, **arguments))
        except Exception as reason:  # the user's code: this layer stays whole, those around it need not
            log.info("%s stays whole: %s", self.name, reason)
            return kind.__call__(self, *args, **kwargs)

    return _with_methods(layer, __call__=call)


@contextmanager
def _with_methods(layer: Any, **methods: Any) -> Iterator[None]:
    """A layer of its class with other `methods`, for a while."""
    kind = type(layer)
    changed = type(kind.__name__, (kind,), {**methods, "__module__": kind.__module__})
    object.__setattr__(layer, "__class__", changed)
    try:
        yield
    finally:
        object.__setattr__(layer, "__class__", kind)


@contextmanager
def _replaced(layer: Any, tensors: Mapping[int, Any]) -> Iterator[None]:
    """The layer's attributes with tensors in place of variables (by id), for a while."""

    def changed(value: Any) -> Any:
        if isinstance(value, list):
            return [tensors.get(id(v), v) for v in value]
        return tensors.get(id(value), value)

    names = {name.partition(".")[0] for name, v in _attributes(layer).items() if id(v) in tensors}
    before = {name: vars(layer)[name] for name in names}
    vars(layer).update({name: changed(value) for name, value in before.items()})  # past Keras' tracking of attributes
    try:
        yield
    finally:
        vars(layer).update(before)
