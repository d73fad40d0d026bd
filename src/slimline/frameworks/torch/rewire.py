"""Changes to the wiring of a native model: branches left out, activations silenced or truncated."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import fx, nn

from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import Array
from slimline.frameworks.torch.native import Native, shapes_of, tensors, to_tensors
from slimline.frameworks.torch.operators import aten
from slimline.graph.edits import Multiply, PoolInput, Subtract

Insert = Callable[[fx.Graph, fx.Node], fx.Node]
_FUNCTIONS = {
    "relu": (aten.relu.default, ()),
    "relu6": (aten.hardtanh.default, (0.0, 6.0)),
    "hardsigmoid": (aten.hardsigmoid.default, ()),
    "hardswish": (aten.hardswish.default, ()),
}


def rewire(native: Native, instead: Mapping[str, str], example: tuple[Array, ...]) -> Native:
    """A copy in which the readers of a value read another; it is run once on `example` to prove that it runs.

    Operators that only served the value are gone, and the tensors that only they read. Names stay.
    """
    result = copy.deepcopy(native)
    nodes = named(result, [*instead, *instead.values()])
    for old, new in instead.items():
        target, source = nodes[old], nodes[new]
        target.replace_all_uses_with(source)
    drop_dead(result, {nodes[old] for old in instead})
    result.graph.lint()
    result.recompile()
    with torch.no_grad():
        result(*to_tensors(example))
    return result


def tie(native: Native, instead: Mapping[str, str]) -> Native:
    """A copy in which the readers of a stored tensor read another; the tensor is gone."""
    result = copy.deepcopy(native)
    for node in result.graph.find_nodes(op="get_attr"):
        node.target = instead.get(str(node.target), node.target)
    for name in instead:
        owner, _, leaf = name.rpartition(".")
        delattr(result.get_submodule(owner), leaf)
    result.graph.lint()
    result.recompile()
    return result


def pool(native: Native, change: PoolInput, example: tuple[Array, ...]) -> Native:
    """A copy that reads a smaller image, which it makes itself; it is run once on `example` to prove that it runs."""
    result = copy.deepcopy(native)
    node = named(result, [change.input])[change.input]
    first = next(n for n in result.graph.nodes if n.op not in ("placeholder", "get_attr"))
    with result.graph.inserting_before(first):
        pooled = result.graph.call_function(aten.avg_pool2d.default, (node, [change.factor, change.factor]))
    node.replace_all_uses_with(pooled, delete_user_cb=lambda user: user is not pooled)
    result.graph.lint()
    result.recompile()
    try:
        with torch.no_grad():
            result(*to_tensors(example))
    except RuntimeError as reason:
        raise change.misfit(reason) from reason
    return result


def compute(native: Native, functions: Mapping[str, tuple[str, str]]) -> Native:
    """A copy in which values are a function of another value."""
    result = copy.deepcopy(native)
    nodes = named(result, [*functions, *(source for _, source in functions.values())])
    replaced: dict[str, fx.Node] = {}
    for name, (function, source) in functions.items():
        old, (operator, numbers) = nodes[name], _FUNCTIONS[function]
        with result.graph.inserting_before(old):
            new = result.graph.call_function(operator, (replaced.get(source, nodes[source]), *numbers))
        new.meta = {key: old.meta[key] for key in ("nn_module_stack",) if key in old.meta}
        old.replace_all_uses_with(new)
        replaced[name] = new
    drop_dead(result, {nodes[name] for name in functions})
    result.graph.lint()
    result.recompile()
    return result


def silence(native: Native, values: Iterable[str]) -> Native:
    """A copy in which these activations are zero."""

    def zero(graph: fx.Graph, node: fx.Node) -> fx.Node:
        return graph.call_function(aten.mul.Tensor, (node, 0.0))

    return _after(native, dict.fromkeys(values, zero))


def truncate(native: Native, thresholds: Mapping[str, float]) -> Native:
    """A copy in which of these activations all that is not above the threshold is zero."""

    def cut(threshold: float) -> Insert:
        return lambda graph, node: graph.call_function(aten.threshold.default, (node, float(threshold), 0.0))

    return _after(native, {name: cut(t) for name, t in thresholds.items()})


def subtract(native: Native, edit: Subtract, example: tuple[Array, ...]) -> Native:
    """A copy in which layers read their input less numbers that train, beside their weight and called ``threshold``."""
    result = copy.deepcopy(native)
    nodes = named(result, [*edit.numbers, *(source for source, _ in edit.numbers.values())])
    shapes = shapes_of(native, {source for source, _ in edit.numbers.values()}, example)
    for made, (source, numbers) in edit.numbers.items():
        node, rank = nodes[made], len(shapes[source])
        number = _beside(result, node, "threshold", numbers, rank - 1 - edit.axes.get(made, rank - 1))
        node.update_arg(0, _called(result, node, aten.sub.Tensor, nodes[source], number))
    return _proven(result, example)


def multiply(native: Native, edit: Multiply, example: tuple[Array, ...]) -> Native:
    """A copy in which layers read a value times numbers that train, beside the first one's weight and called
    ``factors``."""
    result = copy.deepcopy(native)
    nodes = named(result, [*edit.readers, *(made for readers in edit.readers.values() for made in readers)])
    shapes = shapes_of(native, set(edit.readers), example)
    order = {node: position for position, node in enumerate(result.graph.nodes)}
    for source, readers in edit.readers.items():
        first, *others = sorted((nodes[made] for made in readers), key=order.__getitem__)
        following = len(shapes[source]) - 1 - edit.axes[source]
        number = _beside(result, first, "factors", edit.numbers[source], following)
        product = _called(result, first, aten.mul.Tensor, nodes[source], number)
        for node in (first, *others):
            node.update_arg(0, product)
    return _proven(result, example)


def _beside(native: Native, layer: fx.Node, leaf: str, numbers: Array, following: int) -> fx.Node:
    """Numbers that train, stored beside the weight of a layer and called `leaf` or much like it, with as many more
    dimensions behind them."""
    weight = next(node for node in layer.all_input_nodes if node.op == "get_attr")
    path, _, name = str(weight.target).rpartition(".")
    owner = native.get_submodule(path)
    like = getattr(owner, name)
    while hasattr(owner, leaf):
        leaf += "_"
    owner.register_parameter(leaf, nn.Parameter(torch.tensor(numbers, dtype=like.dtype, device=like.device)))
    first = next(node for node in native.graph.nodes if node.op not in ("placeholder", "get_attr"))
    with native.graph.inserting_before(first):
        number = native.graph.get_attr(f"{path}.{leaf}".lstrip("."))
    number.meta = _place(layer)
    return _called(native, layer, aten.view.default, number, [-1, *[1] * following]) if following else number


def _called(native: Native, layer: fx.Node, operator: Callable[..., object], *args: object) -> fx.Node:
    """A new operator in front of a layer, as part of it."""
    with native.graph.inserting_before(layer):
        node = native.graph.call_function(operator, args)  # type: ignore[arg-type]
    node.meta = _place(layer)
    return node


def _place(layer: fx.Node) -> dict[str, object]:
    return {key: layer.meta[key] for key in ("nn_module_stack",) if key in layer.meta}


def _proven(native: Native, example: tuple[Array, ...]) -> Native:
    """An edited model, run once on `example` to prove that it runs."""
    native.graph.lint()
    native.recompile()
    with torch.no_grad():
        native(*to_tensors(example))
    return native


def _after(native: Native, inserts: Mapping[str, Insert]) -> Native:
    """A copy in which the readers of each value read what `inserts` makes of it."""
    result = copy.deepcopy(native)
    nodes = named(result, inserts)
    for name, insert in inserts.items():
        node = nodes[name]
        with result.graph.inserting_after(node):
            replacement = insert(result.graph, node)
        replacement.meta = {key: node.meta[key] for key in ("nn_module_stack",) if key in node.meta}
        for user in [user for user in node.users if user is not replacement]:
            user.replace_input_with(node, replacement)
    result.graph.lint()
    result.recompile()
    return result


def named(native: Native, names: Iterable[str]) -> dict[str, fx.Node]:
    """The nodes of a graph, if all of `names` are among them."""
    nodes = {node.name: node for node in native.graph.nodes}
    missing = [name for name in names if name not in nodes]
    if missing:
        raise SlimlineError(f"The model computes no value called {missing[0]!r}: read its graph again.")
    return nodes


def drop_dead(native: Native, dead: set[fx.Node]) -> None:
    """Erase these nodes, what only they read, and the tensors that nobody reads then."""
    for node in reversed(native.graph.nodes):
        served = bool(node.users) and all(user in dead for user in node.users)
        if node.op != "placeholder" and (node in dead or served):
            dead.add(node)
    owners = {str(node.target).rpartition(".")[0] for node in dead if node.op == "get_attr"}
    for node in reversed(native.graph.nodes):
        # A batch norm's count of batches is read by nobody, and goes with the rest of it.
        unread = node.op == "get_attr" and not node.users and str(node.target).rpartition(".")[0] in owners
        if node in dead or unread:
            native.graph.erase_node(node)
    remaining = {str(node.target) for node in native.graph.nodes if node.op == "get_attr"}
    for name in tensors(native):
        owner, _, leaf = name.rpartition(".")
        if owner in owners and name not in remaining:
            delattr(native.get_submodule(owner), leaf)
