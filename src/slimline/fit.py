"""Will the budget be met? Asked of real artifacts, before any training.

Latency, size and MACs depend on shapes and precision, not on how well the weights were trained. So the
recipe's structural and quantization steps are done once without recovery, and the artifact is timed against
the original's on the target.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slimline.errors import SlimlineError
from slimline.graph import cost
from slimline.recipe import Budget, ChannelPruning, Recipe, StaticQuantization
from slimline.recovery import Progress
from slimline.runtimes.base import runtime
from slimline.runtimes.gate import lower
from slimline.steps import Context, Tell, perform

if TYPE_CHECKING:
    from slimline.data import Data
    from slimline.model import Model

STRENGTHS = (0.25, 0.5, 0.625, 0.75, 0.8125, 0.875, 0.9375)
SLACK = 1.1  # a clock may err by this much before a budget is called impossible


@dataclass(frozen=True)
class Cost:
    """Of a trial, in parts of the original's."""

    latency: float
    size: float
    macs: float

    def missed(self, budget: Budget, slack: float = 1.0) -> list[str]:
        """Limits of `budget` that are not met, in words."""
        found = []
        for what, value, limit, free in (
            ("latency", self.latency, budget.max_latency, slack),
            ("size", self.size, budget.max_size, 1.0),
            ("MACs", self.macs, budget.max_macs, 1.0),
        ):
            if limit is not None and value > limit * free:
                found.append(f"{what} reaches {value:.3g} of the original's, the budget is {limit:.3g}")
        return found


def fit(original: Model, data: Data, recipe: Recipe, tell: Tell | None = None) -> Recipe:
    """The recipe with which the budget's limits on latency, size and MACs are met.

    A recipe with ``fit`` (as ``auto``) gets the mildest pruning that meets them; any other is only checked.

    Raises
    ------
    SlimlineError
        If they cannot be met; says the best that was reached.
    """
    budget = recipe.budget
    settled = recipe.model_copy(update={"fit": False})
    if budget.max_latency is None and budget.max_size is None and budget.max_macs is None:
        return settled
    with tempfile.TemporaryDirectory(prefix="slimline-fit-") as folder:
        trials = _Trials(original, data, recipe, Path(folder))
        candidates = [settled]
        if recipe.fit:
            candidates = [_with_ratio(settled, ratio) for ratio in STRENGTHS]
        best: Cost | None = None
        for number, candidate in enumerate(candidates):
            if tell is not None:
                tell(Progress("Measuring what the budget allows", number, len(candidates)))
            found = trials.cost(candidate)
            if not found.missed(budget, 1.0 if recipe.fit else SLACK):
                return candidate
            best = found if best is None or found.latency < best.latency else best
    assert best is not None
    missed = "; ".join(best.missed(budget)) or "the clock does not confirm it"
    raise SlimlineError(f"The budget cannot be met on {recipe.target}: {missed}; allow more or prune more.")


def _with_ratio(recipe: Recipe, ratio: float) -> Recipe:
    steps = tuple(
        s.model_copy(update={"ratio": ratio, "target_macs": None, "target_parameters": None})
        if isinstance(s, ChannelPruning)
        else s
        for s in recipe.steps
    )
    return recipe.model_copy(update={"steps": steps})


class _Trials:
    """Untrained artifacts of candidates, timed against the original's."""

    def __init__(self, original: Model, data: Data, recipe: Recipe, folder: Path) -> None:
        self.original, self.data, self.recipe, self.folder = original, data, recipe, folder
        self.runtime = runtime(str(recipe.target))
        self.baseline = folder / f"baseline{self.runtime.suffix}"
        lower(self.runtime, original, self.baseline, quick=True)
        self.rows = next(data.split("calibration").batches(max(recipe.batch_sizes)))[0]

    def cost(self, candidate: Recipe) -> Cost:
        from slimline.measure import file_bytes, measure_latency

        model = self.original
        for step in candidate.steps:
            if isinstance(step, ChannelPruning):
                step = step.model_copy(update={"schedule": "oneshot", "rounds": 1})
            elif isinstance(step, StaticQuantization):
                step = step.model_copy(update={"undo": False, "samples": 64, "batch_size": 32})
            elif step.kind in ("training", "recovery"):
                continue
            context = Context(self.original, self.data, str(candidate.target), candidate.seed)
            model = perform(step, model, context).model
        path = self.folder / f"trial{self.runtime.suffix}"
        lower(self.runtime, model, path, quick=True)
        batch = max(candidate.batch_sizes)
        times = measure_latency(
            {"before": self.baseline, "after": path}, self.rows, (batch,), candidate.threads, 0.5, 20, candidate.seed
        )
        return Cost(
            times["after"][batch].median_ms / times["before"][batch].median_ms,
            file_bytes(path) / file_bytes(self.baseline),
            cost.macs(model.graph) / max(cost.macs(self.original.graph), 1),
        )
