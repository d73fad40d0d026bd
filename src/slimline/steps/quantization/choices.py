"""What a step says of the weights of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slimline.graph.ends import first_layers, last_layers
from slimline.graph.ir import Graph
from slimline.recipe.layers import Types, first_match, refuse_unmatched
from slimline.steps.quantization.step import Granularity, QuantizationOverride, StaticQuantization, WeightType


@dataclass(frozen=True)
class Choice:
    """What a step says of the weights of a layer; `pattern` is that of the override which says so."""

    type: WeightType
    granularity: Granularity | None
    pattern: str | None = None


@dataclass(frozen=True)
class Choices:
    """What a step says of the weights of every layer of a graph."""

    step: StaticQuantization
    types: Types
    layers: tuple[str, ...]
    first: frozenset[str]
    last: frozenset[str]

    @classmethod
    def of(cls, step: StaticQuantization, graph: Graph) -> Choices:
        """Refuses overrides whose pattern fits no layer."""
        layers = tuple(dict.fromkeys(node.layer for node in graph.nodes if node.layer))
        refuse_unmatched("layer for overrides", step.overrides, layers, graph.types)
        return cls(step, graph.types, layers, first_layers(graph), last_layers(graph))

    def of_layers(self, layers: Sequence[str]) -> Choice:
        """Of weights that these layers read: of the first override that fits one of them, then of the step's rules."""
        step = self.step
        pattern = first_match(layers, step.overrides, self.types)
        own = QuantizationOverride() if pattern is None else step.overrides[pattern]
        first = step.first_layers if self.first.intersection(layers) else None
        last = step.last_layers if self.last.intersection(layers) else None
        return Choice(own.weights or first or last or step.weights, own.granularity or step.granularity, pattern)
