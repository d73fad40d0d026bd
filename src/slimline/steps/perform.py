"""Doing a step: each takes a model and gives a new one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimline.steps.activations.plan import zeros_among_activations
from slimline.errors import SlimlineError
from slimline.model.masks import held
from slimline.methods.schedules import ratios
from slimline.model import Model
from slimline.steps.plans import plan, plan_channels
from slimline.recipe import (
    ActivationPruning,
    ChannelPruning,
    DepthPruning,
    Distillation,
    SparsePruning,
    SparseTraining,
    StaticQuantization,
    Step,
    Training,
)
from slimline.steps.channels.rounding import settled
from slimline.data.splits import first
from slimline.steps.sparse.zeros import note

if TYPE_CHECKING:
    from slimline.data import Data
    from slimline.graph.cuts import CutPlan
    from slimline.graph.plan import Plan
    from slimline.training.loop import Progress

Tell = Callable[["Progress"], None]
Decide = Callable[[str, Callable[[], dict[str, Any]]], dict[str, Any]]
"""A name, and what to ask if it was not decided before: the answer, which a run journals at once."""


def _undecided(name: str, choose: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    return choose()


@dataclass(frozen=True)
class Context:
    """What a step may need besides the model.

    Attributes
    ----------
    teacher : what training learns from: the uncompressed model, or another that the user named; None where neither is
        known.
    target : the runtime the result is for.
    recovery : the `Distillation` that follows, which an iterative schedule runs after each of its rounds.
    checkpoint : where training leaves its state, or None.
    pruning : the gradual `SparsePruning` that came before, which happens while this step trains.
    removal : the `ChannelPruning` that follows, which `SparseTraining` with a growing penalty prepares.
    decide : keeps what a clock decides, so that a run that is killed and goes on decides the same.
    batch_sizes, threads : with which the result will be timed.
    """

    teacher: Model | None
    data: Data | None
    target: str
    seed: int = 0
    recovery: Distillation | None = None
    checkpoint: Path | None = None
    tell: Tell | None = None
    pruning: SparsePruning | None = None
    removal: ChannelPruning | None = None
    decide: Decide = _undecided
    batch_sizes: tuple[int, ...] = (1, 32)
    threads: int = 1


@dataclass(frozen=True)
class Done:
    """A step's result, and what the report should say of it (ready for JSON)."""

    model: Model
    record: dict[str, Any]


def perform(step: Step, model: Model, context: Context) -> Done:
    """Do one step; what the model's masks set to zero stays zero."""
    done = _DO[type(step)](step, model, context)
    return Done(held(done.model), done.record)


def _prune(step: ChannelPruning, model: Model, context: Context) -> Done:
    rounds: list[dict[str, Any]] = []
    history = model.history
    start = dense = model
    plans: list[Plan | CutPlan] = []
    step, rounding = settled(step, model.graph, context.target, context.decide)
    for number, current in enumerate(_rounds(step), 1):
        found = plan_channels(model, current, context.data, context.seed, context.target)
        model = found.apply(model)
        plans.append(found)
        if step.compensates:
            model = _compensated(dense, model, plans, step, context)
        rounds.append(found.summary())
        if step.schedule == "iterative" and number < step.rounds and context.recovery is not None:
            at = context.checkpoint and context.checkpoint / f"round-{number}"
            model = _recover(context.recovery, model, _at(context, at)).model
            dense, plans = model, []  # what was learned since is not to be undone
    record = {**step.model_dump(mode="json"), "plan": rounds[-1] if len(rounds) == 1 else _joined(start, model, rounds)}
    if rounding is not None:
        record["plan"]["rounding"] = rounding
    model = replace(model, history=(*history, step.model_dump(mode="json")))
    return Done(model, record)


def _prune_at_once(step: DepthPruning | ActivationPruning, model: Model, context: Context) -> Done:
    found = plan(model, step, context.data, context.seed)
    pruned = replace(found.apply(model), history=(*model.history, step.model_dump(mode="json")))
    return Done(pruned, {**step.model_dump(mode="json"), "plan": found.summary()})


def _compensated(
    dense: Model, pruned: Model, plans: list[Plan | CutPlan], step: ChannelPruning, context: Context
) -> Model:
    from slimline.steps.channels.compensation import compensate

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
    left = 1.0
    for gone in ratios(step.schedule, step.rounds, goal if field == "ratio" else 1 - goal):
        part = (1 - gone) / left
        left = 1 - gone
        yield step.model_copy(
            update={field: 1 - part if field == "ratio" else part, "schedule": "oneshot", "rounds": 1}
        )


def _sparsify(step: SparsePruning, model: Model, context: Context) -> Done:
    from slimline.steps.sparse.prune import sparsify

    record = step.model_dump(mode="json")
    history = (*model.history, dict(record))
    record["zeros"] = note(step, context.target)
    if step.trains:  # the recovery that follows does it
        return Done(model.then(model.native, history[-1]), record)
    for number, amount in enumerate(_amounts(step), 1):
        current = step.model_copy(update={"amount": amount, "schedule": "oneshot", "rounds": 1})
        found = sparsify(model, current, context.data, context.seed)
        model = found.model
        if number < step.rounds and context.recovery is not None:
            at = context.checkpoint and context.checkpoint / f"round-{number}"
            model = held(_recover(context.recovery, model, _at(context, at)).model)
    record |= {"refused": found.refused, "sparsity": found.layers}
    return Done(replace(model, history=history), record)


def _amounts(step: SparsePruning) -> list[float | int | None]:
    """What is gone after each round."""
    if step.schedule != "iterative" or step.amount is None:
        return [step.amount]
    return list(ratios("iterative", step.rounds, float(step.amount)))


def _at(context: Context, checkpoint: Path | None) -> Context:
    return replace(context, recovery=None, checkpoint=checkpoint, pruning=None)


def _recover(step: Training, model: Model, context: Context) -> Done:
    from slimline.training.loop import recover

    if context.data is None:
        raise SlimlineError(f"{step.step} needs data: pass slimline.Data with train=(x, y) or train=(x,).")
    found = recover(
        model,
        context.teacher,
        step,
        context.data,
        context.seed,
        context.checkpoint,
        context.tell,
        context.pruning,
        context.removal,
    )
    history = [{k: v for k, v in r.items() if k != "seconds"} for r in found.records]
    return Done(found.model, {**step.model_dump(mode="json"), "best_epoch": found.best_epoch, "history": history})


def _train_sparse(step: SparseTraining, model: Model, context: Context) -> Done:
    done = _recover(step, model, context)
    if step.of != "activations" or context.data is None:
        return done
    return Done(done.model, {**done.record, "plan": zeros_among_activations(step, model, done.model, context.data)})


def _quantize(step: StaticQuantization, model: Model, context: Context) -> Done:
    from slimline.steps.quantization.undo import quantize_what_pays

    if context.data is None:
        raise SlimlineError("StaticQuantization needs data: pass slimline.Data with calibration or training samples.")
    undone = quantize_what_pays(model, step, context)
    record = {**step.model_dump(mode="json"), "refused": undone.refused}
    if undone.record:
        record["undoing"] = undone.record
    if (quantization := undone.model.quantization) is not None:
        record["float_layers"] = dict(quantization.float_layers)
        record["integer_layers"] = list(quantization.layers)
        record["weight_bits"] = undone.bits
        if undone.bits < 8:
            record["notes"] = [
                f"weights have {undone.bits} bits, since integer kernels of {context.target} overflow with 8 on this "
                "processor, which has no VNNI; compress on one that has for the last bit"
            ]
    return Done(undone.model, record)


_DO: dict[type[Step], Callable[[Any, Model, Context], Done]] = {
    ChannelPruning: _prune,
    DepthPruning: _prune_at_once,
    ActivationPruning: _prune_at_once,
    Distillation: _recover,
    SparsePruning: _sparsify,
    SparseTraining: _train_sparse,
    StaticQuantization: _quantize,
}


def neighbours(steps: Sequence[Step], position: int) -> dict[str, Any]:
    """The fields of `Context` that are the steps around the one at `position`, where they work together."""
    before = steps[position - 1] if position else None
    following = steps[position + 1] if position + 1 < len(steps) else None
    return {
        "recovery": following if isinstance(following, Distillation) else None,
        "pruning": before if isinstance(before, SparsePruning) and before.trains else None,
        "removal": following if isinstance(following, ChannelPruning) else None,
    }
