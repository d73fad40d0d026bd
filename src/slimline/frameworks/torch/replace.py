"""Layers that give way to others."""

from __future__ import annotations

import copy

import torch
from torch import fx, nn

from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import Array
from slimline.frameworks.torch.native import Native, set_tensors, shapes_of
from slimline.frameworks.torch.operators import aten
from slimline.frameworks.torch.rewire import drop_dead, named
from slimline.graph.edits import Project, Replace
from slimline.graph.operators import Convolution, Einsum, Linear, Mean, Rectifier, Table

Weighted = Linear | Convolution | Einsum | Table
_CONVOLUTIONS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}


def replace(native: Native, change: Replace, example: tuple[Array, ...]) -> Native:
    """A copy in which operators compute what a layer did, of the same shape on `example`.

    They are trained where the layer was. Tensors that only the layer read are gone.
    """
    result = copy.deepcopy(native)
    nodes = named(result, [change.input, change.output])
    old, value = nodes[change.output], nodes[change.input]
    read = [n for n in old.all_input_nodes if n.op == "get_attr"]
    if any(set(n.users) != {old} for n in read):
        raise SlimlineError(f"{change.layer} shares its weights with other layers: it cannot be replaced alone.")
    weights = [result.get_parameter(str(n.target)) for n in read if str(n.target) in dict(result.named_parameters())]
    if not weights:
        raise SlimlineError(f"{change.layer} has no weights of its own: only layers that have some can be replaced.")
    with result.graph.inserting_before(old):
        for position, operator in enumerate(change.operators):
            part = f"{change.layer}.{position}"
            if isinstance(operator, Rectifier):
                value = result.graph.call_function(aten.relu.default, (value,))
            elif isinstance(operator, Mean):
                value = result.graph.call_function(aten.mean.dim, (value, list(range(2, 2 + operator.places))))
            else:
                _hold(result, part, operator, weights[0])
                value = _call(result.graph, value, part, operator, old)
            value.meta = {"nn_module_stack": _stack(old, part)}
    old.replace_all_uses_with(value)
    drop_dead(result, {old})
    result.graph.lint()
    result.recompile()
    before = shapes_of(native, {change.output}, example)[change.output]
    try:
        after = shapes_of(result, {value.name}, example)[value.name]
    except RuntimeError as reason:
        raise change.misfit() from reason
    change.check_shape(before, after)
    return result


def project(native: Native, change: Project) -> Native:
    """A copy in which a recurrent layer reads a product. The product's weight is trained where the layer's is."""
    result = copy.deepcopy(native)
    (old,) = {user for n in result.graph.nodes if str(n.target) in change.kernels for user in n.users}
    like = result.get_parameter(next(iter(change.kernels)))
    set_tensors(result, ((name, torch.tensor(array).to(like)) for name, array in change.kernels.items()))
    part, operator = f"{change.layer}.0", Linear(change.weight)
    _hold(result, part, operator, like)
    x = old.args[0]
    assert isinstance(x, fx.Node)
    with result.graph.inserting_before(old):
        value = _call(result.graph, x, part, operator, old)
    value.meta = {"nn_module_stack": _stack(old, part)}
    old.update_arg(0, value)
    result.graph.lint()
    result.recompile()
    return result


def _hold(native: Native, name: str, operator: Weighted, like: nn.Parameter) -> None:
    """Give the model the tensors of an operator, trained as `like` is; where they are."""
    owner: nn.Module = native
    for step in name.split("."):
        if step not in owner._modules:
            owner.add_module(step, nn.Module())
        owner = owner.get_submodule(step)
    for leaf, array in (("weight", operator.weight), ("bias", _bias(operator))):
        if array is not None:
            tensor = torch.tensor(array, dtype=like.dtype, device=like.device)
            owner.register_parameter(leaf, nn.Parameter(tensor, like.requires_grad))


def _bias(operator: Weighted) -> Array | None:
    return None if isinstance(operator, Table) else operator.bias


def _call(graph: fx.Graph, value: fx.Node, part: str, operator: Weighted, old: fx.Node) -> fx.Node:
    # What is stored is read before all that computes: rounding it there comes behind.
    first = next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))
    with graph.inserting_before(first):
        weight = graph.get_attr(f"{part}.weight")
        bias = None if _bias(operator) is None else graph.get_attr(f"{part}.bias")
    if isinstance(operator, Table):
        still = old.args[2:3] if old.target is aten.embedding.default else ()  # a row that does not learn
        return graph.call_function(aten.embedding.default, (weight, value, *still))
    if isinstance(operator, Linear):
        return graph.call_function(aten.linear.default, (value, weight, bias))
    if isinstance(operator, Einsum):
        return graph.call_function(aten.einsum.default, (operator.equation, [value, weight]))
    window, rank = operator.looks, len(operator.kernel)
    zeros = window.zeros((0,) * rank, operator.kernel)  # torch's "same" depends on the kernel alone
    even = all(before == after for before, after in zeros)
    if not even:
        flat = [n for pair in reversed(zeros) for n in pair]
        value = graph.call_function(aten.constant_pad_nd.default, (value, flat, 0.0))
    padding = [before if even else 0 for before, _ in zeros]
    return graph.call_function(
        _CONVOLUTIONS[rank],
        (value, weight, bias, list(window.stride), padding, list(window.dilation), operator.groups),
    )


def _stack(old: fx.Node, part: str) -> dict[str, tuple[str, str]]:
    """Where a part comes from: as the layer does, and then the part itself."""
    stack = dict(old.meta.get("nn_module_stack") or {})
    stack[part] = (part, "torch.nn.modules.module.Module")
    return stack
