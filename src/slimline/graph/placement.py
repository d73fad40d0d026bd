"""Which values of a graph are rounded to integer grids, so that a runtime can compute in integers.

A *compute* operator (convolution, linear) becomes integer when its layer is wanted. It starts a fused
*chain* ``compute -> batch norm -> activation`` of which only the end is rounded. *Glue* (add, concat,
average pooling, …) between integer operators becomes integer with them. Operators that only move numbers
or take maxima keep the grid of their input and get none of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from slimline.graph.equation import Equation
from slimline.graph.ir import IDLE, Graph, Node
from slimline.recipe.layers import matches, selected


@dataclass(frozen=True)
class Policy:
    """What a runtime runs in integers.

    Attributes
    ----------
    activations : dtype it prefers for activations, or the one they have.
    fused : element-wise functions that disappear into the operator before them.
    glue : operators with an integer kernel, as ``kind`` or ``kind:function``.
    transposed : whether transposed convolutions have an integer kernel.
    float_results : compute kinds that may answer in float, so that their result needs no grid.
    linear_channels : whether linear layers take one weight scale per output.
    stacked_channels : whether the weight of an einsum does that is no product by one matrix, such as a stack of them.
    constants : glue that may read stored tensors; numbers among the operands count as stored.
    ranges : functions whose integer kernel answers on one grid only, and the range of that grid.
    transposed_channels : whether transposed convolutions take one weight scale per output.
    whole : whether everything that can be is integer, from the model's inputs to its outputs; otherwise only
        what lies between integer layers.
    one_grid : glue whose inputs and output must all be on one grid.
    symmetric : whether grids of activations must have their zero at 0.
    narrowest : channels that an integer convolution or linear layer must have on both sides.
    aligned : of what the channels of an integer convolution, of a group of them, must be a multiple on both sides.
    positions : of the kernel of an integer convolution, at most; None for any number.
    spatial : dimensions between batch and channels that an integer convolution may have.
    composed : functions and kinds that it computes in integers by several operators with grids of their own between,
        which the simulation has too where its framework leads to the runtime directly.
    form : the exchange form by which alone a network can be told what is rounded; None for any.
    tables : whether rows of embeddings can be looked up in a table of codes.
    attention : which operands of attention (0 queries, 1 keys, 2 values) are rounded, where an integer layer makes them
        for nothing else, so that their product is one of integers; their grids have the zero in the middle.
    """

    activations: Literal["uint8", "int8", "int16", "fp8_e4m3"]
    fused: frozenset[str]
    glue: frozenset[str]
    transposed: bool
    float_results: frozenset[str]
    linear_channels: bool
    constants: frozenset[str]
    ranges: Mapping[str, tuple[float, float]]
    transposed_channels: bool
    whole: bool
    one_grid: frozenset[str]
    symmetric: bool = False
    narrowest: int = 0
    aligned: int = 1
    positions: int | None = None
    spatial: int = 3
    composed: frozenset[str] = frozenset()
    form: str | None = None
    tables: bool = False
    attention: frozenset[int] = frozenset()
    stacked_channels: bool = True


_COMPUTE = ("conv", "linear", "einsum")
_MOVES = ("reshape", "permute", "slice", "select", "split", "pad", "expand", "take")


@dataclass(frozen=True)
class Placement:
    """Where grids go.

    Attributes
    ----------
    activations : names of the values that get a grid, in topological order.
    weights : parameter to the dimension of its output channels, None for one scale per tensor.
    layers : names of the layers that compute in integers.
    owners : value to the layer that makes it (for a model input, the first layer that reads it).
    makers : value to all layers that make it: of a fused chain each, else the owner.
    groups : value to the name under which it shares its grid (itself where it shares with none).
    biases : weight to the pair (value the layer reads, the layer's bias), where there is a bias.
    refused : wanted layers that must stay float, with the reason.
    ranges : values whose range the runtime prescribes, whatever calibration sees.
    centred : values whose grid has its zero in the middle, whatever those of others have.
    tables : parameters that embeddings look up rows in, one scale per row; their layers compute nothing.
    """

    activations: tuple[str, ...]
    weights: Mapping[str, int | None]
    layers: tuple[str, ...]
    owners: Mapping[str, str]
    makers: Mapping[str, tuple[str, ...]]
    groups: Mapping[str, str]
    biases: Mapping[str, tuple[str, str]]
    refused: Mapping[str, str] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    centred: frozenset[str] = frozenset()
    tables: tuple[str, ...] = ()


def place(graph: Graph, policy: Policy, layers: Sequence[str] = ("*",), keep: Sequence[str] = ()) -> Placement:
    """Choose the values and weights of `graph` that are rounded.

    Parameters
    ----------
    layers, keep : patterns (`slimline.recipe.layers`) of the layers that shall compute in integers, and of those that
        shall not; `keep` also holds glue of those layers back.
    policy : of the runtime.
    """
    return _Placer(graph, tuple(layers), tuple(keep), policy).place()


class _Placer:
    """The work of `place`: one forward sweep finds candidates, one backward sweep keeps what is of use."""

    def __init__(self, graph: Graph, layers: tuple[str, ...], keep: tuple[str, ...], policy: Policy) -> None:
        self.graph, self.layers, self.keep, self.policy = graph, layers, keep, policy
        self.readers = graph.consumers()
        self.makers = graph.producers()
        self.stored = frozenset(graph.parameters)
        self.refused: dict[str, str] = {}

    def place(self) -> Placement:
        """See the function `place`."""
        compute = {n.name: n for n in self.graph.nodes if n.kind in _COMPUTE and self._can(n)}
        candidates = self._candidates(compute)
        rounded: set[str] = set()
        integer: dict[str, Node] = dict(compute)
        for node in compute.values():
            rounded.update(self._roots(node))
            if node.kind not in self.policy.float_results:
                rounded.add(self._end(node))
        centred = self._attended(compute) - rounded
        rounded |= centred
        # Backward: glue is of use if its result is read in integers further on.
        for node in reversed(self.graph.nodes):
            if node.name in candidates:
                end = self._end(node)
                if end in rounded or (self.policy.whole and self._is_output(end)):
                    integer[node.name] = node
                    rounded.update((end, *self._roots(node)))
        order = [*self.graph.inputs, *(name for n in self.graph.nodes for name in n.outputs)]
        activations = tuple(name for name in order if name in rounded)
        return Placement(
            activations=activations,
            weights={_weight(n): self._channels(n) for n in compute.values()},
            layers=tuple(dict.fromkeys(n.layer for n in compute.values())),
            owners={name: self._owner(name) for name in activations},
            makers=self._makers(activations),
            groups=self._groups(activations, integer),
            biases={
                _weight(n): (self._root(str(n.inputs[0])), str(n.inputs[2]))
                for n in compute.values()
                if len(n.inputs) > 2 and n.inputs[2] is not None
            },
            refused=self.refused,
            ranges=self._ranges(activations),
            centred=centred,
            tables=self._tables(),
        )

    def _attended(self, compute: Mapping[str, Node]) -> frozenset[str]:
        """The operands of attention that are rounded."""
        made = {node.outputs[0] for node in compute.values()}
        rounded = set[str]()
        for node in self.graph.nodes:
            if node.kind != "attention":
                continue
            roots = [self._root(str(name)) for name in node.inputs[:3]]
            apart = {root for position, root in enumerate(roots) if position not in self.policy.attention}
            rounded.update(roots[position] for position in self.policy.attention if roots[position] in made - apart)
        return frozenset(rounded)

    def _tables(self) -> tuple[str, ...]:
        """The tables of embeddings that nothing else reads."""
        lookups = [node for node in self.graph.nodes if node.kind == "embedding"] if self.policy.tables else []
        names = dict.fromkeys(str(node.inputs[1]) for node in lookups)
        return tuple(
            name
            for name in names
            if name in self.graph.trainable
            and self.graph.values[name].dtype == "float32"
            and all(
                reader.kind == "embedding"
                and reader.name not in self.graph.idle
                and selected((reader.layer,), self.layers, self.keep, self.graph.types)
                for reader in self.readers[name]
            )
        )

    def _ranges(self, activations: Sequence[str]) -> dict[str, tuple[float, float]]:
        """The prescribed ranges among the values that are rounded."""
        functions = {
            name: str(node.attributes.get("function", node.kind))
            for name in activations
            if (node := self.makers.get(name)) is not None
        }
        return {name: self.policy.ranges[f] for name, f in functions.items() if f in self.policy.ranges}

    def _can(self, node: Node) -> bool:
        """Whether a compute operator is wanted and able to become integer; notes why not."""
        if not selected((node.layer,), self.layers, self.keep, self.graph.types):
            return False
        reason = None
        weight = node.inputs[1]
        if node.kind == "einsum" and not node.attributes.get("weighted"):
            return False
        if node.name in self.graph.idle:
            reason = IDLE
        elif weight not in self.stored:
            reason = "its weight is computed, not stored"
        elif not self._floating(weight) or not self._floating(str(node.inputs[0])):
            reason = "it does not compute in float"
        elif any(r.kind not in _COMPUTE or not self._same_use(r, node) for r in self.readers[weight]):
            reason = "its weight is shared with an operator that needs it in float"
        elif node.attributes.get("transposed") and not self.policy.transposed:
            reason = "the runtime has no integer transposed convolution"
        elif node.kind == "conv" and len(self.graph.values[str(node.inputs[0])].shape) - 2 > self.policy.spatial:
            reason = f"the runtime has no integer convolution over more than {self.policy.spatial} dimensions"
        elif node.kind == "conv" and (misfit := self._misfit(node)):
            reason = misfit
        elif self._narrow(node):
            reason = f"it has fewer than {self.policy.narrowest} channels, for which {self._numbers} do not pay"
        if reason is not None:
            self.refused[node.layer] = reason
        return reason is None

    def _narrow(self, node: Node) -> bool:
        """Whether a layer has too few channels on one side."""
        return self.policy.narrowest > 0 and min(self._sides(node)) < self.policy.narrowest

    def _sides(self, node: Node) -> tuple[int, int]:
        """The channels that a layer reads and makes."""
        equation = node.attributes["equation"]
        own = {axis for axes in equation.inputs[1] for axis in axes} - {"."}
        sides = (node.inputs[0], equation.inputs[0]), (node.outputs[0], equation.outputs[0])
        read, made = (
            math.prod(
                size for size, axes in zip(self.graph.values[str(name)].shape, dims, strict=True) if own & set(axes)
            )
            for name, dims in sides
        )
        return read, made

    @property
    def _numbers(self) -> str:
        return "floats of 8 bits" if self.policy.activations == "fp8_e4m3" else "integers"

    def _misfit(self, node: Node) -> str | None:
        """Why the runtime has no such kernel for a convolution, if it has none."""
        most, multiple = self.policy.positions, self.policy.aligned
        if most is None and multiple == 1:
            return None
        shape, positions = self.graph.values[_weight(node)].shape, 1
        for size, axes in zip(shape, node.attributes["equation"].inputs[1], strict=True):
            positions *= size if "." in axes else 1
        inputs, outputs = self._sides(node)
        own = math.prod(shape) // (positions * outputs)
        if most is not None and positions > most:
            return f"its kernel has more than {most} positions, for which the runtime has no such convolution"
        if own % multiple or own * outputs // inputs % multiple:
            return f"its channels, those of a group, are no multiple of {multiple}"
        return None

    def _same_use(self, other: Node, node: Node) -> bool:
        """Whether both operators read their shared weight in the same way, both wanted in integers."""
        return (
            other.inputs[1] == node.inputs[1]
            and self._channels(other) == self._channels(node)
            and selected((other.layer,), self.layers, self.keep, self.graph.types)
        )

    def _candidates(self, compute: Mapping[str, Node]) -> set[str]:
        """Glue next to integer operators: it reads a value that one of them makes or reads."""
        chains = [self._chain(node) for node in compute.values()]
        near = {root for node in compute.values() for root in self._roots(node)} | {end for end, _ in chains}
        absorbed = {name for _, members in chains for name in members}
        candidates = set()
        for node in self.graph.nodes:
            if node.name in absorbed or not self._is_glue(node):
                continue
            end, members = self._chain(node)
            if any(root in near for root in self._roots(node)) or (self.policy.whole and end in near):
                candidates.add(node.name)
                near.add(end)
                absorbed.update(members)
        return candidates

    def _is_glue(self, node: Node) -> bool:
        function = node.attributes.get("function", "")
        names = _names(node)
        if not names & self.policy.glue or matches((node.layer,), self.keep, self.graph.types):
            return False
        if self._moves(node) or not all(self._floating(o) for o in node.outputs):
            return False
        operands = [name for name in node.inputs if name is not None]
        if not names & self.policy.constants:
            if any(name in self.stored for name in operands):
                return False
            if function in ("add", "sub", "mul", "max", "min") and len(operands) < 2:  # the other operand is a number
                return False
        return bool(self._roots(node))

    def _moves(self, node: Node) -> bool:
        """Whether the results of an operator lie on the grid of its input."""
        function = node.attributes.get("function")
        return (
            node.kind in _MOVES
            or (node.kind == "pool" and function == "max")
            or (node.kind == "reduce" and function in ("max", "min"))
            or (node.kind == "elementwise" and function == "identity")
        )

    def _roots(self, node: Node) -> list[str]:
        """The values whose grids the float activations that `node` reads lie on."""
        reads = node.inputs[:1] if node.kind in _COMPUTE else node.inputs
        roots = [self._root(name) for name in reads if name is not None and name not in self.stored]
        return [root for root in roots if root not in self.stored and self._floating(root)]

    def _root(self, name: str) -> str:
        """The value on whose grid `name` lies: itself, or what moving operators made it from."""
        node = self.makers.get(name)
        while node is not None and self._moves(node) and node.inputs and node.inputs[0] is not None:
            name = node.inputs[0]
            node = self.makers.get(name)
        return name

    def _end(self, node: Node) -> str:
        """The value at the end of the fused chain that `node` starts."""
        return self._chain(node)[0]

    def _chain(self, node: Node) -> tuple[str, list[str]]:
        """The value at the end of the fused chain that `node` starts, and the operators that follow in it."""
        name = node.outputs[0]
        members: list[str] = []
        normalised = node.kind not in _COMPUTE
        while len(self.readers[name]) == 1 and not self._is_output(name):
            after = self.readers[name][0]
            function = after.attributes.get("function") if after.kind == "elementwise" else None
            norm = after.kind == "batch_norm" and not normalised
            if after.inputs[0] != name or not (norm or function == "identity" or function in self.policy.fused):
                break
            normalised = normalised or norm
            members.append(after.name)
            name = after.outputs[0]
            if function in self.policy.fused:
                return name, members
        return self._root(name), members

    def _is_output(self, name: str) -> bool:
        return name in self.graph.outputs

    def _floating(self, name: str) -> bool:
        return self.graph.values[name].dtype in ("float32", "float16", "bfloat16", "float64")

    def _channels(self, node: Node) -> int | None:
        """The dimension of the weight that holds the output channels; None for one scale in all."""
        if node.kind != "conv" and not self.policy.linear_channels:
            return None
        if node.attributes.get("transposed") and not self.policy.transposed_channels:
            return None
        equation = node.attributes["equation"]
        if node.kind == "einsum" and not self.policy.stacked_channels and not _by_matrix(equation):
            return None
        weight = equation.inputs[1]
        input_axes = {axis for dim in equation.inputs[0] for axis in dim}
        output_axes = {axis for dim in equation.outputs[0] for axis in dim} - input_axes - {"."}
        shape = self.graph.values[_weight(node)].shape
        own = [d for d, axes in enumerate(weight) if output_axes & set(axes)]
        if len(own) != 1:
            return None  # several dimensions of outputs (heads and head width): no single axis names them
        if shape[own[0]] == 1:  # depthwise kernels that hold the channels apart from the multiplier
            groups = [d for d, axes in enumerate(weight) if axes == ("g",)]
            return groups[0] if groups else own[0]
        if any(axes == ("g",) for axes in weight):
            return None
        return own[0]

    def _owner(self, name: str) -> str:
        node = self.makers.get(name)
        if node is not None:
            return node.layer
        readers = self.readers[name]
        return readers[0].layer if readers else ""

    def _makers(self, activations: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """The layers of the chains that end in these values, whether they compute in integers or not."""
        layers = {node.name: node.layer for node in self.graph.nodes}
        chains = {}
        for node in self.graph.nodes:
            if node.kind in _COMPUTE:
                end, members = self._chain(node)
                chains[end] = (node.layer, *(layers[name] for name in members))
        return {name: tuple(dict.fromkeys((*chains.get(name, ()), self._owner(name)))) for name in activations}

    def _groups(self, activations: Sequence[str], integer: Mapping[str, Node]) -> dict[str, str]:
        """Values that share a grid, by the first name of each group."""
        groups = {name: name for name in activations}
        for node in integer.values():
            if _names(node) & self.policy.one_grid:
                names = [name for name in (*self._roots(node), self._end(node)) if name in groups]
                merged = {groups[name] for name in names}
                first = next(name for name in activations if groups[name] in merged)
                groups = {name: first if group in merged else group for name, group in groups.items()}
        return groups


def _names(node: Node) -> frozenset[str]:
    """What a policy may call an operator: by its kind, or by kind and function."""
    return frozenset({node.kind, f"{node.kind}:{node.attributes.get('function', '')}"})


def _by_matrix(equation: Equation) -> bool:
    """Whether each axis of an einsum by a weight is in two of the three: what it reads, the weight, the result."""
    sides = [{axis for axes in dims for axis in axes} for dims in (*equation.inputs[:2], equation.outputs[0])]
    return all(sum(axis in side for side in sides) == 2 for axis in set.union(*sides))


def _weight(node: Node) -> str:
    return str(node.inputs[1])
