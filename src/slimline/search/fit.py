"""Will the budget be met? Asked of real artifacts, before any training.

Latency, size, memory and MACs depend on shapes and precision, not on how well the weights were trained. So a recipe's
structural and quantization steps are done once without recovery, with what the clock will decide in them, and the
artifact is measured against the original's as the final report will: at the recipe's batch sizes, with its threads,
judged by `slimline.measure.limits`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from slimline.basics.errors import SlimlineError
from slimline.basics.progress import Progress
from slimline.files.decisions import checked
from slimline.graph import cost
from slimline.measure.limits import Cost, Part, Trial, judged_batch, limited, limits, worst
from slimline.methods.search import mildest
from slimline.model import Model
from slimline.model.lowering import lower
from slimline.recipe import Budget, Recipe
from slimline.runtimes.base import runtime
from slimline.search.ladder import Rung
from slimline.steps.base import Context, Decide, Tell, handler_of, perform

if TYPE_CHECKING:
    import numpy as np

    from slimline.data import Data
    from slimline.measure.size import Memory

SECONDS, SAMPLES = 0.5, 9  # of the timing of a trial, per artifact and batch size
Decisions = dict[str, dict[str, Any]]
"""What a clock decided, by the names ``STAGE/WHAT`` under which a run keeps it."""


def stage_name(position: int, step: str) -> str:
    """Of the step at `position` in a recipe, counted from 0."""
    return f"{position + 1:02d}-{step}"


class Fit(BaseModel):
    """Which rungs of a ladder a budget leaves.

    Attributes
    ----------
    rung : the mildest that meets the limits on latency, size, memory and MACs.
    milder : those below it of which the clock cannot tell, strongest first.
    trials : all that was tried.
    decisions : by rung, what the clock decided in its steps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rung: Annotated[int, Field(ge=0)]
    milder: tuple[Annotated[int, Field(ge=0)], ...] = ()
    trials: tuple[Trial, ...] = ()
    decisions: dict[int, Decisions] = {}

    @classmethod
    def of(cls, record: Mapping[str, Any], rungs: int) -> Fit:
        """What a run's journal holds, for a ladder of so many `rungs`."""
        parsed = checked(cls, record, "what the budget allows")
        if any(rung >= rungs for rung in (parsed.rung, *parsed.milder)):
            raise SlimlineError("The run's journal names a strength that there is not: start a new run.")
        return parsed


@dataclass(frozen=True)
class Estimate:
    """What a rung would cost, and what the clock decided on the way."""

    cost: Cost
    decisions: Decisions
    seconds: float


class Estimator(Protocol):
    """Makes the untrained artifact of a rung and measures it."""

    def __call__(self, rung: Rung) -> Estimate: ...


def fit(
    rungs: tuple[Rung, ...], start: int, budget: Budget, target: str, estimate: Estimator, tell: Tell | None = None
) -> Fit:
    """The mildest of the rungs from `start` on with which the limits on latency, size, memory and MACs are met.

    A latency is met where its whole interval is; where none is, the mildest of which the clock cannot tell is taken.

    Raises
    ------
    SlimlineError
        If they cannot be met; says the best that was reached.
    """
    if not limited(budget):
        return Fit(rung=start)
    seen: dict[int, Estimate] = {}

    def meets(number: int) -> bool:
        if tell is not None:
            tell(Progress("Measuring what the budget allows", len(seen), len(seen) + 1, {"now": rungs[number].name}))
        seen[number] = estimate(rungs[number])
        return outcome(number) == "met"

    def outcome(number: int) -> str:
        return worst(limits(seen[number].cost, budget))

    chosen = mildest(start, len(rungs), meets)
    unclear = sorted(number for number in seen if outcome(number) == "unclear")
    if chosen is None and not unclear:
        raise SlimlineError(f"The budget cannot be met on {target}: {_best(seen, budget)}; allow more or prune more.")
    rung = unclear[0] if chosen is None else chosen
    milder = tuple(number for number in reversed(unclear) if number < rung)
    return Fit(
        rung=rung,
        milder=milder,
        trials=tuple(
            _row(rungs[number], estimated, budget, number == rung) for number, estimated in sorted(seen.items())
        ),
        decisions={
            n: estimated.decisions for n, estimated in seen.items() if n in (rung, *milder) and estimated.decisions
        },
    )


def _best(seen: Mapping[int, Estimate], budget: Budget) -> str:
    """The limits that the rung that comes nearest misses, in words."""

    def excess(candidate: Estimate) -> float:
        return max(judged.judged.low / judged.limit for judged in limits(candidate.cost, budget))

    best = min(seen.values(), key=excess)
    return "; ".join(judged.sentence() for judged in limits(best.cost, budget) if judged.outcome == "missed")


def _row(rung: Rung, estimate: Estimate, budget: Budget, chosen: bool) -> Trial:
    judged = limits(estimate.cost, budget)
    reason = "; ".join(limit.sentence() for limit in judged if limit.outcome != "met")
    if not reason:
        reason = (
            "the mildest that was seen to meet the limits" if chosen else "meets the limits, but a milder one does too"
        )
    return Trial(
        stage="estimate",
        settings=rung.settings(),
        cost=estimate.cost,
        chosen=chosen,
        reason=reason,
        seconds=round(estimate.seconds, 3),
    )


class Trials:
    """Untrained artifacts, timed against the original's on the target: an `Estimator`. A context manager."""

    def __init__(self, original: Model, data: Data, recipe: Recipe) -> None:
        self.original, self.data, self.recipe = original, data, recipe
        self.runtime = runtime(str(recipe.target))
        self._folder = tempfile.TemporaryDirectory(prefix="slimline-fit-")
        self._baseline: Path | None = None
        self._baseline_memory: Memory | None = None
        self._measured: dict[tuple[Any, ...], Estimate] = {}

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *error: object) -> None:
        self._folder.cleanup()

    def __call__(self, rung: Rung) -> Estimate:
        start = monotonic()
        decisions: Decisions = {}
        model, budget = self.original, rung.recipe.budget
        steps = list(enumerate(rung.recipe.steps))
        for position, step in steps:
            rehearsed = None if step.kind == "quantization" else handler_of(step).rehearsal(step)
            if rehearsed is not None:
                model = perform(rehearsed, model, self._context(position, step.step, decisions)).model
        macs = Part.exact(cost.macs(model.graph), cost.macs(self.original.graph))
        counted = Cost(macs=macs)
        needs_artifact = any(x is not None for x in (budget.max_latency, budget.max_size, budget.max_memory))
        if worst(limits(counted, budget)) == "missed" or not needs_artifact:
            return Estimate(counted, decisions, monotonic() - start)
        graph = model.graph
        key = (tuple((n, graph.values[n].shape) for n in sorted(graph.trainable)), len(rung.recipe.steps))
        if key not in self._measured:
            self._measured[key] = self._finished(model, rung, macs, decisions, start)
        known = self._measured[key]
        return Estimate(known.cost, {**known.decisions, **decisions}, monotonic() - start)

    def _finished(self, model: Model, rung: Rung, macs: Part, decisions: Decisions, start: float) -> Estimate:
        """Quantized as the run will, written and measured."""
        from slimline.measure import file_bytes, latency_part, measure_latency, memory_part

        for position, step in enumerate(rung.recipe.steps):
            rehearsed = handler_of(step).rehearsal(step) if step.kind == "quantization" else None
            if rehearsed is not None:
                model = perform(rehearsed, model, self._context(position, step.step, decisions)).model
        recipe, folder = rung.recipe, Path(self._folder.name)
        if self._baseline is None:
            self._baseline = folder / f"baseline{self.runtime.suffix}"
            lower(self.runtime, self.original, self._baseline, quick=True)
        path = folder / f"trial{self.runtime.suffix}"
        lower(self.runtime, model, path, quick=True)
        latency: dict[int, Part] = {}
        if recipe.budget.max_latency is not None:
            rows = self._rows()
            artifacts = {"before": self._baseline, "after": path}
            times = measure_latency(
                artifacts, rows, recipe.batch_sizes, recipe.threads, SECONDS, SAMPLES, seed=recipe.seed
            )
            latency = {
                batch: latency_part(times["before"][batch], times["after"][batch], recipe.seed)
                for batch in recipe.batch_sizes
            }
        memory = None
        if recipe.budget.max_memory is not None:
            if self._baseline_memory is None:
                self._baseline_memory = self._peak(self._baseline)
            memory = memory_part(self._baseline_memory, self._peak(path))
        size = Part.exact(file_bytes(path), file_bytes(self._baseline), "B")
        cost = Cost(latency=latency, size=size, memory=memory, macs=macs)
        return Estimate(cost, decisions, monotonic() - start)

    def _rows(self) -> tuple[np.ndarray, ...]:
        """Real ones, as many as the largest batch has, if there are."""
        return next(self.data.split("calibration").batches(max(self.recipe.batch_sizes)))[0]

    def _peak(self, artifact: Path) -> Memory:
        from slimline.measure import measure_memory

        return measure_memory(artifact, self._rows(), judged_batch(self.recipe.batch_sizes), self.recipe.threads)

    def _context(self, position: int, step: str, decisions: Decisions) -> Context:
        stage = stage_name(position, step)

        def decide(what: str, choose: Callable[[], dict[str, Any]]) -> dict[str, Any]:
            decisions[f"{stage}/{what}"] = answer = json.loads(json.dumps(choose()))
            return dict(answer)

        recipe = self.recipe
        return Context(
            self.original,
            self.data,
            str(recipe.target),
            recipe.seed,
            decide=decide,
            batch_sizes=recipe.batch_sizes,
            threads=recipe.threads,
            rehearsal=True,
        )


def decided(
    decide: Decide,
    rungs: tuple[Rung, ...],
    start: int,
    subject: Callable[[], tuple[Model, Data]],
    recipe: Recipe,
    tell: Tell | None,
) -> Fit:
    """`fit` by `Trials` of the model and the data that `subject` gives, asked once in the life of a run."""

    def ask() -> dict[str, Any]:
        with Trials(*subject(), recipe) as trials:
            return fit(rungs, start, recipe.budget, str(recipe.target), trials, tell).model_dump(mode="json")

    return Fit.of(decide("fit", ask), len(rungs))
