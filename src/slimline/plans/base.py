"""What all plans of structural steps have in common."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from slimline.graph import cost
from slimline.graph.ir import Graph

if TYPE_CHECKING:
    from slimline.model import Model


class StructuralPlan(ABC):
    """What a structural step will do, before anything is done.

    Attributes
    ----------
    graph : of the model the plan is for.
    """

    graph: Graph

    @property
    @abstractmethod
    def parameters(self) -> int:
        """Trained numbers that will be left."""

    @property
    @abstractmethod
    def macs(self) -> int:
        """Multiply-accumulates per sample that will be left."""

    @abstractmethod
    def mask(self, model: Model) -> Model:
        """A new model of the same shapes that computes what `apply`'s will."""

    @abstractmethod
    def apply(self, model: Model) -> Model:
        """A new model from which what the plan names is really gone."""

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """What goes and what is left, ready for JSON."""

    def to_json(self, indent: int | None = 2) -> str:
        """The plan as JSON text; `from_json` reads it back for the same model."""
        return json.dumps(self.summary(), indent=indent)

    @property
    def totals(self) -> dict[str, dict[str, int]]:
        """Parameters and MACs before and after."""
        return {
            "parameters": {"before": self.graph.size, "after": self.parameters},
            "macs": {"before": cost.macs(self.graph), "after": self.macs},
        }

    @property
    def headline(self) -> str:
        """The totals in a line."""
        size, macs = self.totals["parameters"], self.totals["macs"]
        return f"parameters {size['before']:,} -> {size['after']:,}   MACs {macs['before']:,} -> {macs['after']:,}"
