"""What a step says of the weights of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slimline.basics.errors import SlimlineError
from slimline.graph.ends import first_layers, last_layers
from slimline.graph.ir import Graph
from slimline.recipe.layers import Types, first_match, refuse_unmatched, selected
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
        """Refuses overrides whose pattern fits no layer, and what `refuse_short_tables` does."""
        layers = tuple(dict.fromkeys(node.layer for node in graph.nodes if node.layer))
        refuse_unmatched("layer for overrides", step.overrides, layers, graph.types)
        refuse_short_tables(step, graph)
        return cls(step, graph.types, layers, first_layers(graph), last_layers(graph))

    def of_layers(self, layers: Sequence[str]) -> Choice:
        """Of weights that these layers read: of the first override that fits one of them, then of the step's rules."""
        step = self.step
        pattern = first_match(layers, step.overrides, self.types)
        own = QuantizationOverride() if pattern is None else step.overrides[pattern]
        first = step.first_layers if self.first.intersection(layers) else None
        last = step.last_layers if self.last.intersection(layers) else None
        return Choice(own.weights or first or last or step.weights, own.granularity or step.granularity, pattern)


def refuse_short_tables(step: StaticQuantization, graph: Graph) -> None:
    """Refuse int4 that is asked of embeddings by name or by their place: their tables have 8 bits.

    ``weights: int4`` for all is of layers that multiply.
    """
    first = first_layers(graph) if step.first_layers == "int4" else frozenset[str]()
    last = last_layers(graph) if step.last_layers == "int4" else frozenset[str]()
    for node in graph.nodes:
        layer = node.layer
        if node.kind != "embedding" or not selected((layer,), step.layers, step.keep, graph.types):
            continue
        pattern = first_match((layer,), step.overrides, graph.types)
        own = None if pattern is None else step.overrides[pattern].weights
        by = {"first_layers": layer in first, "last_layers": layer in last}
        asked = f"the override of {pattern!r}" if own is not None else next((name for name in by if by[name]), None)
        if own == "int4" or (own is None and asked is not None):
            raise SlimlineError(
                f"{layer} is an embedding, whose table has 8 bits beside integer activations: let {asked} ask int4 of "
                "other layers alone, or use WeightQuantization, which stores tables in int4 too."
            )
