"""Activation pruning: thresholds of ReLUs, calibrated on data, and the sparsity they really give."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from slimline.basics.arguments import takes
from slimline.basics.errors import SlimlineError
from slimline.data.splits import first
from slimline.graph import cost, edits
from slimline.graph.ir import Graph, Node
from slimline.methods.activations import sparsity, threshold_for_error, threshold_for_sparsity
from slimline.model.model import is_model
from slimline.plans import StructuralPlan
from slimline.recipe.layers import Choice, refuse_unmatched, selected
from slimline.steps.activations.step import ActivationPruning

if TYPE_CHECKING:
    from slimline.data import Data
    from slimline.model import Model

SEEN = 2**15  # values of one batch and ReLU that are looked at, spread evenly
SAMPLES = 256  # on which the zeros of a training are counted
GAIN = (
    "Zeros among activations are skipped by none of the runtimes that slimline measures: their kernels are dense. They "
    "save energy or time only on hardware that skips them."
)
PRICE = f"{GAIN} Here each threshold is one more operator."


@dataclass(frozen=True)
class Threshold:
    """Of one ReLU: the value it makes, its layer, the threshold, the part of its outputs that is zero before and after
    all thresholds are raised, and the part of its sum of squares that its own cuts off."""

    value: str
    layer: str
    threshold: float
    before: float
    after: float
    error: float


class ActivationPlan(StructuralPlan):
    """Thresholds for ReLUs. Printable, JSON-serialisable; `mask` and `apply` are the same here: no shape changes."""

    def __init__(self, graph: Graph, thresholds: Sequence[Threshold]) -> None:
        self.graph = graph
        self.thresholds = tuple(thresholds)

    @takes(model=is_model)
    def apply(self, model: Model) -> Model:
        """A new model with the thresholds."""
        model.check_float()
        raised = {t.value: t.threshold for t in self.thresholds if t.threshold > 0}
        return model.edited((edits.Threshold(raised),), {"step": "truncate", "plan": self.summary()})

    mask = apply

    @property
    def parameters(self) -> int:
        """Trained numbers: all stay."""
        return self.graph.size

    @property
    def macs(self) -> int:
        """Multiply-accumulates per sample: all stay."""
        return cost.macs(self.graph)

    def summary(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "activations": [asdict(t) for t in self.thresholds],
            "frozen": [],
            "notes": [PRICE],
            **self.totals,
        }

    @classmethod
    def from_json(cls, text: str, model: Model) -> ActivationPlan:
        """The plan that `to_json` wrote, for `model`."""
        return cls(model.graph, [Threshold(**t) for t in json.loads(text)["activations"]])

    def __str__(self) -> str:
        lines = [
            f"  {t.value} ({t.layer}): zeros {t.before:.0%} -> {t.after:.0%}, threshold {t.threshold:.4g}"
            for t in self.thresholds
        ]
        return "\n".join([*lines, f"  note: {PRICE}"])


def plan_activations(model: Model, step: ActivationPruning, data: Data | None = None, seed: int = 0) -> ActivationPlan:
    """Thresholds that reach the step's sparsity or error on each ReLU of `model`; `seed` decides nothing.

    Raises
    ------
    SlimlineError : no ReLU, a glob that matches none, or data missing.
    """
    nodes = chosen(model.graph, step)
    if data is None:
        raise SlimlineError("ActivationPruning needs data: pass slimline.Data with training or calibration samples.")
    values = observed(model, [node.outputs[0] for node in nodes], data, step.samples)
    thresholds = []
    for node in nodes:
        seen = values[node.outputs[0]]
        if step.sparsity is not None:
            threshold = threshold_for_sparsity(seen, step.sparsity)
        else:
            threshold = threshold_for_error(seen, step.error or 0.0)
        cut = float(np.square(seen[seen <= threshold], dtype=np.float64).sum())
        total = float(np.square(seen, dtype=np.float64).sum())
        thresholds.append(
            Threshold(node.outputs[0], node.layer, threshold, sparsity(seen), float("nan"), cut / max(total, 1e-300))
        )
    truncated = ActivationPlan(model.graph, thresholds).apply(model)
    after = observed(truncated, list(values), data, step.samples)
    return ActivationPlan(model.graph, [replace(t, after=sparsity(after[t.value], t.threshold)) for t in thresholds])


def zeros_among_activations(step: Choice, before: Model, after: Model, data: Data) -> dict[str, Any]:
    """The zeros of the ReLUs that a training penalised, as `ActivationPlan.summary` says them; no threshold is raised.

    `after` has the same graph as `before`.
    """
    nodes = {node.outputs[0]: node.layer for node in chosen(before.graph, step)}
    old, new = (observed(model, list(nodes), data, SAMPLES) for model in (before, after))
    rows = [Threshold(n, layer, 0.0, sparsity(old[n]), sparsity(new[n]), 0.0) for n, layer in nodes.items()]
    return {"activations": [asdict(row) for row in rows], "notes": [GAIN]}


def observed(model: Model, values: Sequence[str], data: Data, samples: int) -> dict[str, np.ndarray]:
    """Values of the named activations on the first calibration samples, flat."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in values}

    def see(name: str, array: np.ndarray) -> None:
        flat = array.reshape(-1)
        parts[name].append(flat[np.linspace(0, flat.size - 1, min(flat.size, SEEN)).astype(np.int64)])

    model.adapter.observe(model.native, first(data.split("calibration"), samples), list(values), see)
    return {name: np.concatenate(pieces) for name, pieces in parts.items()}


def relus(graph: Graph) -> list[Node]:
    """Operators that cut at zero."""
    return [n for n in graph.nodes if n.kind == "elementwise" and n.attributes["function"] in ("relu", "relu6")]


def chosen(graph: Graph, step: Choice) -> list[Node]:
    """The ReLUs that the step's globs choose.

    Raises
    ------
    SlimlineError : no ReLU, or a glob that matches none.
    """
    candidates = relus(graph)
    if not candidates:
        raise SlimlineError(f"The model has no ReLU, so no activations that are zero: {step.step} needs some.")
    named = list(dict.fromkeys(name for n in candidates for name in (n.layer, n.outputs[0])))
    for field, globs in (("layers", step.layers), ("keep", step.keep)):
        refuse_unmatched(f"ReLU for {field}", globs, named, graph.types)
    return [n for n in candidates if selected((n.layer, n.outputs[0]), step.layers, step.keep, graph.types)]
