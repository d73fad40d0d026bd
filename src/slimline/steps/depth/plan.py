"""Depth pruning: which residual blocks go, and the plan that leaves them out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from slimline.basics.arguments import takes
from slimline.basics.errors import SlimlineError, unknown
from slimline.data.splits import first
from slimline.graph import cost
from slimline.graph.blocks import Block, blocks, leave_out
from slimline.graph.edits import Rewire, Silence
from slimline.graph.ir import Graph
from slimline.methods.depth import block_influence, relative_error
from slimline.model.model import is_model
from slimline.plans import StructuralPlan
from slimline.recipe.layers import matches
from slimline.steps.depth.step import DepthPruning

if TYPE_CHECKING:
    from slimline.data import Data
    from slimline.model import Model


class DepthPlan(StructuralPlan):
    """Residual blocks that go. Printable, JSON-serialisable; `mask` and `apply` carry it out.

    Parameters
    ----------
    graph : of the model it is for.
    removed : names of the blocks that go.
    scores : per block's name what decided, where anything was measured; low goes first.
    """

    def __init__(self, graph: Graph, removed: Sequence[str], scores: Mapping[str, float] | None = None) -> None:
        self.graph = graph
        self.blocks = blocks(graph)
        known = {block.name: block for block in self.blocks}
        for name in removed:
            if name not in known:
                raise unknown("residual block", name, known)
        self.removed = tuple(b for b in self.blocks if b.name in set(removed))
        self.scores = dict(scores or {})

    @cached_property
    def _nodes(self) -> frozenset[str]:
        return frozenset().union(*(block.nodes for block in self.removed))

    @property
    def parameters(self) -> int:
        """Trained numbers that will be left."""
        gone = frozenset().union(*(block.parameters for block in self.removed)) & self.graph.trainable
        return self.graph.size - sum(math.prod(self.graph.values[name].shape) for name in gone)

    @property
    def macs(self) -> int:
        """Multiply-accumulates per sample that will be left."""
        remaining = tuple(node for node in self.graph.nodes if node.name not in self._nodes)
        return cost.macs(replace(self.graph, nodes=remaining))

    @takes(model=is_model)
    def mask(self, model: Model) -> Model:
        """A new model of the same size in which the branches that go give zero."""
        return model.edited(
            (Silence([block.branch for block in self.removed]),), {"step": "mask", "plan": self.summary()}
        )

    @takes(model=is_model)
    def apply(self, model: Model) -> Model:
        """A new model without the blocks."""
        return model.edited((Rewire(leave_out(self.removed)),), {"step": "prune", "plan": self.summary()})

    def summary(self) -> dict[str, Any]:
        """What goes and what is left, ready for JSON."""
        gone = {block.name for block in self.removed}
        return {
            "blocks": [
                {
                    "name": b.name,
                    "removed": b.name in gone,
                    "layers": list(b.layers),
                    **({"score": self.scores[b.name]} if b.name in self.scores else {}),
                }
                for b in self.blocks
            ],
            "frozen": [],
            "notes": [],
            **self.totals,
        }

    @classmethod
    def from_json(cls, text: str, model: Model) -> DepthPlan:
        """The plan that `to_json` wrote, for `model`."""
        records = json.loads(text)["blocks"]
        return cls(
            model.graph,
            [b["name"] for b in records if b["removed"]],
            {b["name"]: b["score"] for b in records if "score" in b},
        )

    def __str__(self) -> str:
        lines = [self.headline]
        for block in self.blocks:
            fate = "removed" if block in self.removed else "stays"
            score = f", score {self.scores[block.name]:.4g}" if block.name in self.scores else ""
            lines.append(f"  {block.name}: {fate}{score}  ({', '.join(block.layers)})")
        return "\n".join(lines)


def plan_depth(model: Model, step: DepthPruning, data: Data | None = None, seed: int = 0) -> DepthPlan:
    """Which blocks `step` removes from `model`, without removing them.

    Raises
    ------
    SlimlineError : no residual block, more asked for than there are, a glob that matches none, or data missing.
    """
    all_blocks = blocks(model.graph)
    if not all_blocks:
        raise SlimlineError(
            "The model has no residual block that can be left out: use ChannelPruning, which makes layers narrower."
        )
    eligible = [b for b in all_blocks if _matches(b, step.layers, all_blocks, "layers")]
    if step.keep:
        eligible = [b for b in eligible if not _matches(b, step.keep, all_blocks, "keep")]
    if isinstance(step.blocks, tuple):
        named = [b for b in eligible if _matches(b, step.blocks, all_blocks, "blocks")]
        return DepthPlan(model.graph, [b.name for b in named])
    count = step.blocks if isinstance(step.blocks, int) else int(step.blocks * len(eligible) + 1e-9)
    if count > len(eligible):
        raise SlimlineError(
            f"DepthPruning is to remove {count} blocks, but only {len(eligible)} may go: ask for fewer or widen layers."
        )
    if step.criterion == "error":
        return _by_error(model, eligible, count, _samples(step, data))
    scores = _scores(model, eligible, step, data, seed)
    order = sorted(range(len(eligible)), key=lambda i: (scores[i], -i))
    names = [eligible[i].name for i in order[:count]]
    return DepthPlan(model.graph, names, dict(zip([b.name for b in eligible], scores, strict=True)))


def _matches(block: Block, globs: Sequence[str], among: Sequence[Block], field: str) -> bool:
    """By the block's own name, or by a layer in it."""
    for glob in globs:
        if not any(matches((b.name, *b.layers), (glob,)) for b in among):
            raise unknown(f"block for {field}", glob, [b.name for b in among])
    return matches((block.name, *block.layers), globs)


def _samples(step: DepthPruning, data: Data | None) -> list[tuple[np.ndarray, ...]]:
    if data is None:
        raise SlimlineError(
            f"DepthPruning by {step.criterion} needs data: pass slimline.Data with training or calibration samples, or "
            "use the criterion l2."
        )
    return first(data.split("calibration"), step.samples)


def _scores(model: Model, among: Sequence[Block], step: DepthPruning, data: Data | None, seed: int) -> list[float]:
    if step.criterion == "random":
        return [float(s) for s in np.random.default_rng(seed).random(len(among))]
    if step.criterion == "l2":
        stored = model.parameters()
        return [
            float(np.mean(np.concatenate([np.square(stored[p], dtype=np.float64).ravel() for p in weights])))
            for weights in ([p for p in sorted(b.parameters) if stored[p].ndim > 1] for b in among)
        ]
    return _influence(model, among, _samples(step, data))


def _influence(model: Model, among: Sequence[Block], batches: Sequence[tuple[np.ndarray, ...]]) -> list[float]:
    """Block influence: one less the mean cosine of what goes in and what comes out, sample by sample."""
    total = np.zeros(len(among))
    count = 0
    names = list(dict.fromkeys(name for b in among for name in (b.skip, b.output)))
    for batch in batches:
        held: dict[str, np.ndarray] = {}

        def see(name: str, array: np.ndarray, held: dict[str, np.ndarray] = held) -> None:
            held[name] = array.copy()

        model.adapter.observe(model.native, [batch], names, see)
        count += len(batch[0])
        for i, block in enumerate(among):
            total[i] += block_influence(held[block.skip], held[block.output]).sum()
    return [float(t) for t in total / count]


def _by_error(model: Model, among: Sequence[Block], count: int, batches: Sequence[tuple[np.ndarray, ...]]) -> DepthPlan:
    """Greedily the blocks whose silence changes the model's outputs least."""
    reference = model.adapter.answers(model.native, batches)

    def error(names: Sequence[str]) -> float:
        native = model.edit(Silence([b.branch for b in among if b.name in names]))
        answers = model.adapter.answers(native, batches)
        pairs = zip(zip(*reference, strict=True), zip(*answers, strict=True), strict=True)  # by output
        floats = [(a, b) for a, b in pairs if a[0].dtype.kind == "f"]
        return float(np.mean([relative_error(np.concatenate(a), np.concatenate(b)) for a, b in floats]))

    removed: list[str] = []
    scores: dict[str, float] = {}
    for _ in range(count):
        tried = {b.name: error([*removed, b.name]) for b in among if b.name not in removed}
        best = min(tried, key=tried.__getitem__)
        removed.append(best)
        scores.update(tried)
    return DepthPlan(model.graph, removed, scores)
