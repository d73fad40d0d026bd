"""Channel pruning in one shot or in rounds, with what repairs it in between."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from slimline.basics.errors import SlimlineError
from slimline.data.splits import first
from slimline.methods.schedules import ratios
from slimline.model import Model
from slimline.steps.base import Context, Handler, StepResult, perform
from slimline.steps.channels.compensation import compensate
from slimline.steps.channels.rounding import resolved
from slimline.steps.channels.step import ChannelOverride, ChannelPruning

if TYPE_CHECKING:
    from slimline.plans import CutPlan, Plan


def prune(handler: Handler[ChannelPruning], step: ChannelPruning, model: Model, context: Context) -> StepResult:
    """Prune as the step's schedule says, each round planned on what the one before has left."""
    rounds: list[dict[str, Any]] = []
    history = model.history
    start = dense = model
    plans: list[Plan | CutPlan] = []
    step, rounding = resolved(step, model.graph, context.target, context.decide)
    for number, current in enumerate(_rounds(step), 1):
        plan: Any = handler.plan(current, model, context.data, context.seed, context.target)
        model = plan.apply(model)
        plans.append(plan)
        if step.compensates:
            model = _compensated(dense, model, plans, step, context)
        rounds.append(plan.summary())
        if step.schedule == "iterative" and number < step.rounds and context.recovery is not None:
            model = perform(context.recovery, model, context.inner(f"round-{number}")).model
            dense, plans = model, []  # what was learned since is not to be undone
    record = {**step.model_dump(mode="json"), "plan": rounds[-1] if len(rounds) == 1 else _joined(start, model, rounds)}
    if rounding is not None:
        record["plan"]["rounding"] = rounding
    model = replace(model, history=(*history, step.model_dump(mode="json")))
    return StepResult(model, record)


def _compensated(
    dense: Model, pruned: Model, plans: list[Plan | CutPlan], step: ChannelPruning, context: Context
) -> Model:
    if context.data is None:
        raise SlimlineError("Compensation needs data: pass slimline.Data with calibration or training samples.")
    return compensate(dense, pruned, plans, first(context.data.split("calibration"), step.samples, step.batch_size))


def _joined(before: Model, after: Model, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    last = rounds[-1]
    return {
        "rounds": rounds,
        "frozen": last["frozen"],
        "notes": [note for r in rounds for note in r["notes"]],
        "parameters": {"before": before.graph.size, "after": after.graph.size},
        "macs": {"before": rounds[0]["macs"]["before"], "after": last["macs"]["after"]},
    }


def _rounds(step: ChannelPruning) -> Iterator[ChannelPruning]:
    """The one-shot steps of a gradual schedule, each relative to what the round before has left."""
    field = next(n for n in ("ratio", "target_macs", "target_parameters") if getattr(step, n) is not None)
    goal = getattr(step, field)
    remaining = _remaining(step, goal if field == "ratio" else 1 - goal)
    own = {pattern: _remaining(step, override.ratio) for pattern, override in step.overrides.items()}
    for number, part in enumerate(remaining):
        overrides = {pattern: ChannelOverride(ratio=1 - parts[number]) for pattern, parts in own.items()}
        value = 1 - part if field == "ratio" else part
        yield step.model_copy(update={field: value, "overrides": overrides, "schedule": "oneshot", "rounds": 1})


def _remaining(step: ChannelPruning, ratio: float) -> list[float]:
    """What stays in each round of what the one before has left, until the part `ratio` is gone."""
    fractions, remaining = [], 1.0
    for gone in ratios(step.schedule, step.rounds, ratio):
        fractions.append((1 - gone) / remaining)
        remaining = 1 - gone
    return fractions
