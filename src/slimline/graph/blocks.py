"""Residual blocks: branches that end in an addition and can be left out, what they were added to standing in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from slimline.graph.ir import Graph, Node

WEIGHTED = ("conv", "linear", "einsum")


@dataclass(frozen=True)
class Block:
    """A branch whose result is added to a value of the same shape.

    Attributes
    ----------
    name : what the layers of the branch have in common of their names (``layer3.1``), else the first of them.
    output : the value that the addition gives; without the block its readers read `skip`.
    skip, branch : the two values that are added.
    nodes : names of the operators that serve the branch alone, the addition among them.
    layers : the user's layers among them.
    parameters : stored tensors that only they read.
    """

    name: str
    output: str
    skip: str
    branch: str
    nodes: frozenset[str]
    layers: tuple[str, ...]
    parameters: frozenset[str]


def blocks(graph: Graph) -> tuple[Block, ...]:
    """Every residual block in graph order.

    A block is an addition of a value and a branch that starts from it, or that starts from where the value's own
    short cut (at most one weighted layer) starts. Nothing outside may read what the branch computes on its way.
    """
    search = _Search(graph)
    result = [block for node in graph.nodes if (block := search.block(node)) is not None]
    taken: dict[str, int] = {}
    for i, block in enumerate(result):
        taken[block.name] = taken.get(block.name, 0) + 1
        if taken[block.name] > 1:
            name = f"{block.name}#{taken[block.name]}"
            result[i] = Block(**{**vars(block), "name": name})
    return tuple(result)


class _Search:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.producers = graph.producers()
        self.readers = graph.consumers()
        self.stored = set(graph.parameters)
        self.order = {node.name: i for i, node in enumerate(graph.nodes)}
        self.nodes = {node.name: node for node in graph.nodes}
        self.before: dict[str, int] = {}  # per operator it and those before it, as bits: graphs have thousands
        for i, node in enumerate(graph.nodes):
            behind = 1 << i
            for name in self._reads(node):
                behind |= self._behind(name)
            self.before[node.name] = behind

    def _reads(self, node: Node) -> list[str]:
        return [name for name in node.inputs if name is not None and name not in self.stored]

    def _behind(self, value: str) -> int:
        """The operators that a value needs."""
        return self.before[self.producers[value].name] if value in self.producers else 0

    def _members(self, bits: int) -> set[str]:
        return {self.graph.nodes[i].name for i, bit in enumerate(reversed(bin(bits)[2:])) if bit == "1"}

    def _enters(self, members: Iterable[str]) -> set[str]:
        """Activations that operators read and none of them makes."""
        inside = set(members)
        reads = {value for name in inside for value in self._reads(self.nodes[name])}
        return {value for value in reads if value not in self.producers or self.producers[value].name not in inside}

    def block(self, node: Node) -> Block | None:
        """The block that ends in this operator."""
        values = self._reads(node)
        if node.kind != "elementwise" or node.attributes["function"] != "add" or len(values) != 2:
            return None
        if len(node.inputs) != 2 or node.outputs[0] in self.graph.inputs:
            return None
        shape = self.graph.values[node.outputs[0]].shape
        options = []
        for skip, branch in (values, values[::-1]):
            own = self._own(skip, branch, node)
            if own is None or self.graph.values[skip].shape != shape or not self._short(skip, branch, own):
                continue
            parameters = self._parameters(own)
            size = sum(math.prod(self.graph.values[p].shape) for p in parameters)
            options.append((size, skip, branch, own, parameters))
        if not options:
            return None
        _, skip, branch, own, parameters = max(options, key=lambda o: o[0])
        layers = tuple(dict.fromkeys(self.nodes[n].layer for n in sorted(own, key=self.order.__getitem__)))
        named = tuple(layer for layer in layers if layer)
        name = _common([self.nodes[n].layer for n in own if self.nodes[n].kind in WEIGHTED]) or named[0]
        return Block(name, node.outputs[0], skip, branch, frozenset((*own, node.name)), named, frozenset(parameters))

    def _own(self, skip: str, branch: str, end: Node) -> set[str] | None:
        """Operators that only serve the branch; None where others read what they compute, or they hold no weight."""
        if branch not in self.producers:
            return None
        own = self._members(self._behind(branch) & ~self._behind(skip))
        for name in own:
            for value in self.nodes[name].outputs:
                if value in self.graph.outputs:
                    return None
                if any(reader.name not in own and reader.name != end.name for reader in self.readers[value]):
                    return None
        return own if any(self.nodes[name].kind in WEIGHTED for name in own) else None

    def _short(self, skip: str, branch: str, own: Iterable[str]) -> bool:
        """Whether the branch starts at `skip`, or where a short cut that ends there starts."""
        starts = self._enters(own)
        if skip in starts:
            return True
        cut = self._members(self._behind(skip) & ~self._behind(branch))
        weighted = sum(self.nodes[name].kind in WEIGHTED for name in cut)
        return bool(cut) and weighted <= 1 and len(starts) == 1 and self._enters(cut) == starts

    def _parameters(self, own: Iterable[str]) -> set[str]:
        inside = set(own)
        read = {p for n in inside for p in self.nodes[n].inputs if p in self.stored}
        return {p for p in read if all(reader.name in inside for reader in self.readers[p])}


def _common(names: Iterable[str]) -> str:
    """The leading parts, between dots or slashes, that all names share; one name gives its parent and itself."""
    unique = [name for name in dict.fromkeys(names) if name]
    if len(unique) < 2:
        return unique[0] if unique else ""
    first, *others = (name.split(".") for name in unique)
    shared = []
    for i, part in enumerate(first[:-1]):
        if any(i >= len(other) - 1 or other[i] != part for other in others):
            break
        shared.append(part)
    return ".".join(shared)


def leave_out(removed: Iterable[Block]) -> dict[str, str]:
    """Per output of a removed block the value that its readers read instead, itself not of a removed block."""
    direct: Mapping[str, str] = {block.output: block.skip for block in removed}
    replacements = {}
    for output in direct:
        value = output
        while value in direct:
            value = direct[value]
        replacements[output] = value
    return replacements
