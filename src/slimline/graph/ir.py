"""The neutral graph: what slimline knows of a network, whichever framework it came from.

An operator is described by an einops-like *equation* over named axes, for instance a grouped
convolution by ``b (g i) y x, (g o) i k l, (g o) -> b (g o) Y X``. The equation says how axes pass
through; `slimline.graph.axes` turns all equations of a graph into the units that can be pruned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

IDLE = "no output of the model depends on it"
"""Why `Graph.idle` operators are left alone."""


@dataclass(frozen=True)
class Value:
    """A tensor of the graph: an activation, a parameter, a buffer or a constant.

    Attributes
    ----------
    name : unique in the graph; a parameter's is the user's own (state-dict or variable path).
    shape : sizes at the batch size the graph was read with (`Graph.batch`).
    dtype : numpy name, such as ``float32``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"


class InputSpec(NamedTuple):
    """What a model or an artifact takes as one of its inputs.

    Attributes
    ----------
    name : by which data may give it.
    shape : ``(batch, …)``; None where a size may be any.
    dtype : numpy name.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str


@dataclass(frozen=True)
class Node:
    """One operator.

    Attributes
    ----------
    name : unique in the graph.
    kind : the neutral operator, see `slimline.graph.ops`.
    inputs, outputs : names of values, activations and parameters alike; an absent optional
        input is None.
    attributes : what the rule of the kind needs, see `slimline.graph.ops`.
    layer : the user's name of the module or layer the operator belongs to.
    target : the native operator, for messages (``aten.conv2d``, ``Conv2D``).
    """

    name: str
    kind: str
    inputs: tuple[str | None, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    layer: str = ""
    target: str = ""

    @property
    def label(self) -> str:
        """Operator and layer, as messages name them."""
        return f"{self.target or self.kind} in {self.layer}" if self.layer else self.target or self.kind


@dataclass(frozen=True)
class Graph:
    """Operators in topological order, and the values between them.

    Attributes
    ----------
    values : every value by name, parameters included.
    parameters : names of the values that are stored with the model (weights, buffers, constants).
    trainable : the weights: parameters that were trained, not statistics and constants.
    frozen : those of them that the user has frozen: they may be sliced, and are never trained.
    inputs, outputs : names of the model's inputs and outputs.
    batch : the batch size in the shapes.
    """

    nodes: tuple[Node, ...]
    values: Mapping[str, Value]
    parameters: tuple[str, ...]
    trainable: frozenset[str]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    batch: int = 1
    frozen: frozenset[str] = frozenset()

    @property
    def learning(self) -> frozenset[str]:
        """The weights that training changes."""
        return self.trainable - self.frozen

    @cached_property
    def types(self) -> Mapping[str, frozenset[str]]:
        """By layer, what its operators are called, here and in the framework."""
        called: dict[str, set[str]] = {}
        for node in self.nodes:
            own = node.target.removeprefix("aten.")
            called.setdefault(node.layer or node.name, set()).update((node.kind, own) if own else (node.kind,))
        return {layer: frozenset(names) for layer, names in called.items()}

    @cached_property
    def idle(self) -> frozenset[str]:
        """Names of the operators that no output depends on."""
        needed, idle = set(self.outputs), set()
        for node in reversed(self.nodes):
            if needed.isdisjoint(node.outputs):
                idle.add(node.name)
            else:
                needed.update(name for name in node.inputs if name is not None)
        return frozenset(idle)

    def consumers(self) -> dict[str, list[Node]]:
        """For each value the operators that read it."""
        return self._readers

    def producers(self) -> dict[str, Node]:
        """For each computed value the operator that makes it."""
        return self._makers

    @cached_property
    def _readers(self) -> dict[str, list[Node]]:
        readers: dict[str, list[Node]] = {name: [] for name in self.values}
        for node in self.nodes:
            for name in node.inputs:
                if name is not None:
                    readers[name].append(node)
        return readers

    @cached_property
    def _makers(self) -> dict[str, Node]:
        return {name: node for node in self.nodes for name in node.outputs}

    @property
    def size(self) -> int:
        """Number of trained numbers, frozen or not."""
        return sum(math.prod(self.values[name].shape) for name in self.trainable)
