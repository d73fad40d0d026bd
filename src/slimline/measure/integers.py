"""How much of an artifact's work its runtime really does in integers, and why not more."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from slimline.graph import cost
from slimline.graph.ir import Graph, Node

Fraction = Annotated[float, Field(ge=0, le=1)]

_PRODUCT = re.compile(r"matmul|gemm|conv|fullyconnected|lstm|gru|rnn|attention|einsum|while", re.IGNORECASE)
MOST = 0.5
"""Part of the multiply-accumulates from which a model may be said to run in integers."""


class Floating(BaseModel):
    """A layer that computes in float, its part of all multiply-accumulates, and why."""

    model_config = ConfigDict(frozen=True, extra="allow")

    layer: str
    macs: Fraction
    reason: str


class Integers(BaseModel):
    """What of an artifact runs in integers.

    Attributes
    ----------
    macs : part of the multiply-accumulates of a sample that the runtime executes on integers.
    floating : layers that do the others, those with most first.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    macs: Fraction
    floating: tuple[Floating, ...] = ()

    @property
    def sentence(self) -> str:
        """What there is to know of it, in words."""
        percent = 100 * self.macs
        amount = "all" if not self.floating else "none" if not self.macs else f"{percent:.3g} %"
        return f"{amount} of the multiply-accumulates run in integers"


def integers(
    graph: Graph, operators: Mapping[str, str], reasons: Mapping[str, str], layers: Iterable[str] = (), target: str = ""
) -> Integers:
    """What runs in integers.

    Parameters
    ----------
    graph : of the model behind the artifact.
    operators : what its runtime executes, ``"integer"`` or ``"float"`` by name; see `Runtime.integer_layers`. It is
        named after its layer, with something behind that name where a layer has several.
    reasons : why layers were left in float, as far as a step said so.
    layers : those whose values and weights lie on integer grids.
    """
    gridded = set(layers)
    work: dict[str, int] = {}
    nodes: dict[str, Node] = {}
    for node in graph.nodes:
        macs = cost.node_macs(node, lambda name: graph.values[name].shape)
        if macs:
            name = layer_name(node, graph)
            work[name] = work.get(name, 0) + macs
            nodes[name] = node
    total = max(sum(work.values()), 1)
    floating = []
    for name, macs in work.items():
        if not _integer(name, operators):
            reason = reasons.get(name) or _why(nodes[name], name in gridded, target)
            floating.append(Floating(layer=name, macs=macs / total, reason=reason))
    integer_macs = total - sum(work[f.layer] for f in floating)
    floating.sort(key=lambda f: -f.macs)
    return Integers(macs=integer_macs / total if work else 0.0, floating=tuple(floating))


def layer_name(node: Node, graph: Graph) -> str:
    """The user's layer that an operator belongs to; where it has none the owner of its weight, or its own name."""
    weights = stored_weights(node, graph)
    return node.layer or (weights[0].rpartition(".")[0] if weights else "") or node.name


def stored_weights(node: Node, graph: Graph) -> list[str]:
    """Names of the trainable tensors that an operator reads, through the fake quantization of a weight."""
    makers = graph.producers()

    def stored(name: str) -> str:
        while name in makers and makers[name].kind == "elementwise" and makers[name].inputs[0]:
            name = makers[name].inputs[0] or name
        return name

    return [s for n in node.inputs[1:] if n is not None and (s := stored(n)) in graph.trainable]


def _integer(layer: str, operators: Mapping[str, str]) -> bool:
    """Whether all products of a layer run in integers; what the runtime does not know by its name does not."""
    own = {name: kind for name, kind in operators.items() if _belongs(name, layer)}
    products = {n: k for n, k in own.items() if n == layer or _PRODUCT.search(n[len(layer) :].replace("_", ""))}
    return bool(products) and all(kind == "integer" for kind in products.values())


def _belongs(name: str, layer: str) -> bool:
    """Whether an operator's name is the layer's, with nothing or with a number, an operator or a place behind it."""
    ending = name[len(layer) :]
    return name.startswith(layer) and re.fullmatch(r"(_\d+)?([/ (].*)?", ending) is not None


def _why(node: Node, gridded: bool, target: str) -> str:
    on = f" on {target}" if target else ""
    if node.kind == "recurrent":
        return f"there is no integer kernel for recurrent layers{on}"
    if gridded:
        return f"its values lie on integer grids, but the kernel that runs{on} is a float one"
    if node.kind in ("attention", "matmul", "bilinear", "einsum"):
        return f"products of two activations stay in float{on}"
    return "no quantization step has put it on integer grids"
