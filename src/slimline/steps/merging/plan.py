"""Which layers become one, and the plan that makes them so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from slimline.basics.arguments import takes
from slimline.basics.errors import SlimlineError
from slimline.graph import cost
from slimline.graph.edits import Edit, Replace, Rewire
from slimline.graph.equation import Window
from slimline.graph.ir import Graph, Node
from slimline.graph.matrix import LayerMatrix, matrices
from slimline.graph.operators import Convolution, Linear, Operator
from slimline.methods.merging import chained, dense, identity, placed
from slimline.model.equality import refuse_other_answers
from slimline.model.model import is_model
from slimline.plans import StructuralPlan
from slimline.recipe.layers import refuse_unmatched, selected
from slimline.steps.layer_fit import Layer, part_name, refusal
from slimline.steps.merging.step import MergeLayers

if TYPE_CHECKING:
    from slimline.model import Model

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Merge:
    """Layers that become one.

    Attributes
    ----------
    layers : what is merged.
    name : of the layer that takes their place.
    edits : that do it.
    """

    layers: tuple[str, ...]
    name: str
    edits: tuple[Edit, ...]


class MergePlan(StructuralPlan):
    """Layers that become one. Printable and JSON-serialisable; `mask` and `apply` are the same: nothing is lost.

    Parameters
    ----------
    graph : of the model it is for.
    after : what it will be.
    merges : in the order in which they are done, each on what the ones before it left.
    """

    def __init__(self, graph: Graph, after: Graph, merges: Sequence[Merge]) -> None:
        self.graph, self.after = graph, after
        self.merges = tuple(merges)

    @property
    def parameters(self) -> int:
        """Trained numbers that will be left."""
        return self.after.size

    @property
    def macs(self) -> int:
        """Multiply-accumulates per sample that will be left."""
        return cost.macs(self.after)

    @takes(model=is_model)
    def apply(self, model: Model) -> Model:
        """A new model with the merged layers.

        Raises
        ------
        SlimlineError : it does not answer as `model` does.
        """
        remaining = set(self.after.parameters)
        masks = {name: mask for name, mask in model.masks.items() if name in remaining}
        edits = tuple(edit for merge in self.merges for edit in merge.edits)
        merged = model.edited(edits, {"step": "merge", "plan": self.summary()}, masks)
        refuse_other_answers(model, merged, "MergeLayers")
        return merged

    mask = apply

    def summary(self) -> dict[str, Any]:
        """What becomes what, ready for JSON."""
        return {
            "merged": [{"layers": list(m.layers), "into": m.name} for m in self.merges],
            "frozen": [],
            "notes": [],
            **self.totals,
        }

    def __str__(self) -> str:
        return "\n".join([self.headline, *(f"  {', '.join(m.layers)} -> {m.name}" for m in self.merges)])


def plan_merging(model: Model, step: MergeLayers) -> MergePlan:
    """All that can be merged in `model`.

    Raises
    ------
    SlimlineError : nothing, or a glob that matches no layer.
    """
    check(model, step)
    graph, merges = model.graph, []
    while (merge := _Search(model, step).next()) is not None:
        merges.append(merge)
        model = replace(model, native=model.adapter.edit(model.native, merge.edits, model.example))
    return MergePlan(graph, model.graph, merges)


def check(model: Model, step: MergeLayers) -> None:
    """Refuse what `plan_merging` does."""
    graph = model.graph
    names = [m.layer for m in matrices(graph)]
    for field, globs in (("layers", step.layers), ("keep", step.keep)):
        refuse_unmatched(f"layer with a weight matrix for {field}", globs, names, graph.types)
    if _Search(model, step).next() is None:
        raise SlimlineError(
            "Nothing can be merged: no branches of one value are added, and no linear layers follow each other "
            "without an activation between: leave MergeLayers out, or choose other layers."
        )


@dataclass(frozen=True)
class Branch:
    """A layer with the norm behind it, a norm alone, or a value itself: an affine function of a value.

    Attributes
    ----------
    source, output : names of the values.
    node, layer : of the layer; None for a norm or a value itself.
    scale, shift : ``(channels,)``, of the norm; None without one.
    axis : of the value that the norm looks at.
    weight : ``(outputs, inputs / groups, *kernel)``, without the norm.
    bias : ``(outputs,)``, without the norm; zeros where there is none.
    """

    source: str
    output: str
    node: Node | None = None
    layer: Layer | None = None
    scale: Array | None = None
    shift: Array | None = None
    axis: int | None = None
    weight: Array | None = None
    bias: Array | None = None

    def scaled(self, weight: Array, bias: Array) -> tuple[Array, Array]:
        """A layer with the norm in it."""
        if self.scale is None or self.shift is None:
            return weight, bias
        return weight * self.scale.reshape(-1, *[1] * (weight.ndim - 1)), bias * self.scale + self.shift

    @property
    def names(self) -> tuple[str, ...]:
        """The layer's, if there is one."""
        return () if self.node is None else (self.node.layer or self.node.name,)


class _Search:
    """The next merge of one graph."""

    def __init__(self, model: Model, step: MergeLayers) -> None:
        self.graph, self.step = model.graph, step
        self.stored = model.parameters()
        self.readers, self.producers = self.graph.consumers(), self.graph.producers()
        self.matrices = {m.node: m for m in matrices(self.graph)}

    def next(self) -> Merge | None:
        """The first in graph order."""
        for node in self.graph.nodes:
            merge = self._sum(node) or self._chain(node)
            if merge is not None:
                return merge
        return None

    def _sum(self, node: Node) -> Merge | None:
        terms = self._terms(node.outputs[0]) if self._adds(node) else []
        branches = [self._branch(term) for term in terms]
        weighted = [b for b in branches if b.layer is not None and b.layer.kernel]
        if len(branches) < 2 or not weighted or len({b.source for b in branches}) != 1:
            return None
        largest = max(weighted, key=lambda b: math.prod(b.layer.kernel) if b.layer else 0)
        layer = largest.layer
        assert layer is not None and largest.node is not None and largest.weight is not None
        groups = layer.matrix.shape[0]
        total, constant = np.zeros(largest.weight.shape), np.zeros(len(largest.weight))
        for branch in branches:
            part = self._placed(branch, layer, groups)
            if part is None:
                return None
            total, constant = total + part[0], constant + part[1]
        operator = Convolution(total, constant if constant.any() else None, layer.window, groups)
        result = largest.node.outputs[0]
        edits = (Rewire({node.outputs[0]: result}), Replace(layer.name, largest.source, result, (operator,)))
        return Merge(tuple(name for b in branches for name in b.names), f"{layer.name}.0", edits)

    def _adds(self, node: Node) -> bool:
        shape = self.graph.values[node.outputs[0]].shape
        return (
            node.kind == "elementwise"
            and node.attributes["function"] == "add"
            and len(node.inputs) > 1
            and all(i is not None and i not in self.graph.parameters for i in node.inputs)
            and all(self.graph.values[i].shape == shape for i in node.inputs if i)
        )

    def _terms(self, value: str) -> list[str]:
        """What is added up to a value, through sums that nothing else reads."""
        return [
            inner
            for name in self.producers[value].inputs
            if name is not None
            for inner in (self._terms(name) if self._inside(name) and self._adds(self.producers[name]) else [name])
        ]

    def _inside(self, value: str) -> bool:
        """Whether a computed value has one reader and nobody else sees it."""
        return value in self.producers and len(self.readers[value]) == 1 and value not in self.graph.outputs

    def _branch(self, value: str) -> Branch:
        """The longest branch that ends in a value, and that nothing else reads."""
        itself = Branch(value, value)
        if not self._inside(value):
            return itself
        node = self.producers[value]
        if node.kind == "batch_norm":
            norm = self._norm(node)
            if norm is None or node.inputs[0] is None:
                return itself
            before = self._layer(node.inputs[0]) if self._inside(node.inputs[0]) else None
            branch = before or Branch(node.inputs[0], value)
            return replace(branch, output=value, scale=norm[0], shift=norm[1], axis=node.attributes["axis"])
        return self._layer(value) or itself

    def _layer(self, value: str) -> Branch | None:
        """The layer that makes a value, if it may be merged."""
        node = self.producers[value]
        matrix = self.matrices.get(node.name)
        if matrix is None or not selected((matrix.layer,), self.step.layers, self.step.keep, self.graph.types):
            return None
        if node.kind not in ("linear", "conv") or refusal(self.graph, node, matrix, self.readers):
            return None
        named = [m.layer for m in self.matrices.values()]
        layer = Layer.of(self.graph, node, matrix, part_name(self.graph, matrix, named))
        groups, outputs, _ = matrix.shape
        weight = matrix.matrix(self.stored[matrix.weight]).astype(np.float64)
        weight = weight.reshape(groups * outputs, -1, *layer.kernel)
        bias = np.zeros(groups * outputs)
        if matrix.bias is not None:
            bias = bias + self.stored[matrix.bias].reshape(-1)
        return Branch(matrix.input, value, node, layer, None, None, None, weight, bias)

    def _norm(self, node: Node) -> tuple[Array, Array] | None:
        """Scale and shift of a batch norm with statistics of its own."""
        scale, shift, mean, variance = node.inputs[1:5]
        epsilon = node.attributes.get("epsilon")
        vectors = [name for name in node.inputs[1:] if name is not None]
        shared = any(name not in self.graph.parameters or len(self.readers[name]) > 1 for name in vectors)
        if epsilon is None or mean is None or variance is None or shared or len(node.inputs) != 5:
            return None
        factor = 1 / np.sqrt(self.stored[variance].astype(np.float64).reshape(-1) + epsilon)
        if scale is not None:
            factor = factor * self.stored[scale].reshape(-1)
        constant = -self.stored[mean].reshape(-1) * factor
        return factor, constant if shift is None else constant + self.stored[shift].reshape(-1)

    def _placed(self, branch: Branch, into: Layer, groups: int) -> tuple[Array, Array] | None:
        """A branch as a convolution of another's kernel; None where it is none."""
        if branch.axis is not None and branch.axis != _channels(into.matrix, self.graph):
            return None
        window, rank = into.window, len(into.kernel)
        stride, dilation = (window.stride, window.dilation) if window else ((1,) * rank, (1,) * rank)
        if branch.layer is None:
            outputs = len(branch.scale) if branch.scale is not None else groups * into.matrix.shape[1]
            if stride != (1,) * rank or outputs != groups * into.channels:
                return None
            kernel, zeros, other = (1,) * rank, [(0, 0)] * rank, dilation
            weight, bias = identity(outputs, groups).reshape(outputs, -1, *kernel), np.zeros(outputs)
        else:
            own, layer = branch.layer.window, branch.layer
            assert branch.weight is not None and branch.bias is not None
            if len(layer.kernel) != rank or layer.matrix.shape[0] != groups:
                return None
            if (own.stride if own else (1,) * rank) != stride:
                return None
            kernel, weight, bias = layer.kernel, branch.weight, branch.bias
            zeros, other = _zeros(layer), own.dilation if own else dilation
        around = _zeros(into)
        words = window is not None and isinstance(window.padding, str) and stride != (1,) * rank
        if words and kernel != into.kernel:  # where they look depends on the size
            return None
        offsets = []
        for d in range(rank):
            offset, rest = divmod(around[d][0] - zeros[d][0], dilation[d])
            if rest or offset < 0 or offset + kernel[d] > into.kernel[d] or (kernel[d] > 1 and other[d] != dilation[d]):
                return None
            offsets.append(offset)
        weight, bias = branch.scaled(weight, bias)
        return placed(weight, offsets, into.kernel), bias

    def _chain(self, node: Node) -> Merge | None:
        value = node.inputs[0] if node.inputs else None
        if node.name not in self.matrices or value is None or not self._inside(value):
            return None
        second, first = self._layer(node.outputs[0]), self._branch(value)
        if second is None or first.layer is None or second.layer is None:
            return None
        one, two = first.layer, second.layer
        heavier = self.step.heavier
        if bool(one.kernel) != bool(two.kernel) or (not heavier and {one.matrix.shape[0], two.matrix.shape[0]} != {1}):
            return None
        if first.axis is not None and first.axis != _channels(one.matrix, self.graph):
            return None
        assert first.weight is not None and first.bias is not None
        assert second.weight is not None and second.bias is not None
        weight, bias = first.scaled(dense(first.weight, one.matrix.shape[0]), first.bias)
        window = _both(one, two)
        if window is None or (bias.any() and any(map(any, _zeros(two)))):
            return None  # a bias is not seen in the zeros around
        weight, bias = chained(weight, bias, dense(second.weight, two.matrix.shape[0]), second.bias)
        macs = weight.size * two.times * math.prod(two.after)
        if not heavier and (weight.size > one.parameters + two.parameters or macs > one.macs + two.macs):
            return None
        constant = bias if bias.any() else None
        operator: Operator = Convolution(weight, constant, window) if two.kernel else Linear(weight, constant)
        edit = Replace(two.name, first.source, node.outputs[0], (operator,))
        return Merge((*first.names, *second.names), f"{two.name}.0", (edit,))


def _both(one: Layer, two: Layer) -> Window | None:
    """Where a layer looks that does what two do one behind the other; None where in a dimension both look beyond a
    position."""
    busy = [_busy(layer) for layer in (one, two)]
    if any(map(all, zip(*busy, strict=True))):
        return None
    windows = [_window(layer) for layer in (one, two)]
    for window, other in zip(windows, reversed(busy), strict=True):
        if not any(other):
            return window
    words = {w.padding for w in windows if isinstance(w.padding, str)}
    alike = len({w.padding for w in windows}) == 1
    if words and not alike and any(set(w.stride) != {1} for w in windows):
        return None  # where it looks depends on the size
    each = [(one, windows[0]) if first else (two, windows[1]) for first in busy[0]]
    looks = [(w.stride[d], w.dilation[d], _zeros(layer)[d]) for d, (layer, w) in enumerate(each)]
    stride, dilation, zeros = zip(*looks, strict=True)
    return Window(stride, dilation, next(iter(words)) if words and alike else zeros)


def _window(layer: Layer) -> Window:
    rank = len(layer.kernel)
    return layer.window or Window((1,) * rank, (1,) * rank, ((0, 0),) * rank)


def _busy(layer: Layer) -> list[bool]:
    """Of each dimension of the kernel whether the layer looks beyond a position, or leaves some out."""
    looks = zip(layer.kernel, _window(layer).stride, _zeros(layer), strict=True)
    return [k > 1 or s > 1 or any(zeros) for k, s, zeros in looks]


def _zeros(layer: Layer) -> list[tuple[int, int]]:
    return _window(layer).zeros(layer.before, layer.kernel)


def _channels(matrix: LayerMatrix, graph: Graph) -> int | None:
    """The dimension of a layer's output that holds its channels."""
    node = next(n for n in graph.nodes if n.name == matrix.node)
    own = {name for name, _ in (*matrix.groups, *matrix.outputs)}
    dims = node.attributes["equation"].outputs[0]
    return next((d for d, dim in enumerate(dims) if own & set(dim)), None)
