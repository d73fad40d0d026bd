"""What slimline asks of a family of steps: one `Handler` a step, and what it is handed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.graph.quantization import Quantization
from slimline.model.masks import held
from slimline.recipe import registry
from slimline.recipe.step import Step

if TYPE_CHECKING:
    from slimline.basics.progress import Progress
    from slimline.data import Data
    from slimline.frameworks.base import Masking
    from slimline.methods.sparsity import Axes
    from slimline.model import Model
    from slimline.plans import AnyPlan
    from slimline.training.companions import Company
    from slimline.training.teacher import Teacher

S = TypeVar("S", bound=Step)
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
    teacher : what training learns from: the uncompressed model, or another or several that the user named; None where
        none is known.
    target : the runtime the result is for.
    before, following : the steps right before and behind, where they work together.
    rehearsal : whether the result is only measured, never left: its artifacts need not agree with the model.
    checkpoint : where training leaves its state, or None.
    decide : keeps what a clock decides, so that a run that is killed and goes on decides the same.
    batch_sizes, threads : with which the result will be timed.
    """

    teacher: Teacher
    data: Data | None
    target: str
    seed: int = 0
    before: Step | None = None
    following: Step | None = None
    checkpoint: Path | None = None
    tell: Tell | None = None
    decide: Decide = _undecided
    batch_sizes: tuple[int, ...] = (1, 32)
    threads: int = 1
    rehearsal: bool = False

    @property
    def recovery(self) -> Step | None:
        """The step behind, if it recovers: an iterative schedule runs it after each of its rounds."""
        return self.following if self.following is not None and self.following.kind == "recovery" else None

    def inner(self, name: str) -> Context:
        """For a step that runs inside of another, such as a recovery between two rounds."""
        at = self.checkpoint and self.checkpoint / name
        return replace(self, before=None, following=None, checkpoint=at)


@dataclass(frozen=True)
class StepResult:
    """A step's result, and what the report should say of it (ready for JSON)."""

    model: Model
    record: dict[str, Any]


@dataclass(frozen=True)
class Forecast:
    """What a step would do, found out without training.

    Attributes
    ----------
    model : the network as it would be, as far as that is known; the one it was where shapes and values stay.
    does : what it would do, in a sentence without its full stop.
    skipped : whether what it is about was left out, as training is.
    lines : particulars, for people.
    details : the same and more, ready for JSON.
    stored_bytes : by name, of the tensors that would be stored in another format than they have in `model` once its
        norms are folded.
    """

    model: Model
    does: str
    skipped: bool = False
    lines: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    stored_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """A network on its way into a training loop of the user's own, see `slimline.prepare`.

    Attributes
    ----------
    native : the framework's model, to be trained in place.
    finish : makes of it, as it is then, what the step would have made.
    delay, fold_norms : of the step, in epochs of that loop: when activations begin to be rounded, and batch norms stay
        as they are.
    observe : the formats of the activations, from ranges observed on `native` as it is.
    masks : by weight name, boolean: what is False is zero, and `finish` makes it so again where the loop did not.
    """

    native: Any
    finish: Callable[[], Model] = field(repr=False)
    delay: int = 0
    fold_norms: int | None = None
    observe: Callable[[], Quantization] = field(default=Quantization, repr=False)
    masks: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict, repr=False)


class Handler(ABC, Generic[S]):
    """Everything that slimline does with one kind of step. A module of `slimline.steps` makes one called ``handler``.

    Attributes
    ----------
    config : the step.
    summary : what the step does, in a line.
    plans : whether `plan` has an answer.
    reads : roles of the samples that the step may read, each with the case in which it does; '' where it always does.
    """

    config: type[S]
    summary: ClassVar[str]
    plans: ClassVar[bool] = False
    reads: ClassVar[tuple[tuple[str, str], ...]] = ()

    @property
    def reading(self) -> str:
        """`reads` in words."""
        return ", ".join(f"{role} ({when})" if when else role for role, when in self.reads)

    def check(self, step: S, model: Model, earlier: Sequence[Step]) -> None:
        """Refuse what the step could not do to `model`, without data and before any work.

        Parameters
        ----------
        earlier : the steps that come before it; `model` is the network as it is now, whose layers keep their names.

        Raises
        ------
        SlimlineError : a glob that matches nothing, frozen or missing axes, more removed than there is, or a goal out
            of reach.
        """

    def check_target(self, step: S, target: str, model: Model) -> None:
        """Refuse what the runtime `target` could not hold or run of a model like `model`, before any work.

        Raises
        ------
        SlimlineError : it cannot; says which targets can.
        """

    def plan(
        self, step: S, model: Model, data: Data | None = None, seed: int = 0, target: str | None = None
    ) -> AnyPlan:
        """What the step will do; for a structural step.

        Raises
        ------
        SlimlineError : the step has no plan.
        """
        names = ", ".join(name for name, other in registry.handlers().items() if other.plans)
        raise SlimlineError(f"A {step.step} has no plan: plan is for {names}; use slimline.apply.")

    @abstractmethod
    def perform(self, step: S, model: Model, context: Context) -> StepResult:
        """Do it: a new model, and its record."""

    def remarks(self, step: S, target: str) -> tuple[str, ...]:
        """What the user should know before the work of what the step can do on the runtime `target`, in sentences."""
        return ()

    def company(self, step: S, student: Model, context: Context) -> Company | None:
        """What the step does while the training behind it runs, if it works like that."""
        return None

    def masking(
        self,
        step: S,
        weights: Mapping[str, tuple[str, Axes]],
        shapes: Mapping[str, tuple[int, ...]],
        total: int | None,
        seed: int,
    ) -> Masking:
        """What the step does in a training loop of the user's own.

        Parameters
        ----------
        weights : by weight name the user's name of the layer, and how its weight is read as a matrix.
        shapes : of the weights.
        total : optimiser steps of the training, where they are known.

        Raises
        ------
        SlimlineError : the step has no part in such a loop.
        """
        raise SlimlineError(f"{step.step} does not act in a loop of your own: give a SparsePruning that trains.")

    def prepare(self, step: S, model: Model, context: Context) -> Prepared:
        """What the step would train, for a training loop of the user's own.

        Raises
        ------
        SlimlineError : the step trains nothing that can be trained so.
        """
        raise SlimlineError(
            f"{step.step} prepares nothing for a loop of your own: give a QuantizationAwareTraining or a Distillation."
        )

    def with_strength(self, step: S, strength: float) -> S | None:
        """The step that takes the part `strength` in (0, 1) of what it can, to fit a budget; None where it has no such
        dial."""
        return None

    def rehearsal(self, step: S) -> S | None:
        """The quickest step that leaves the same shapes and formats, to measure what it would buy; None where the step
        changes neither."""
        return step

    def forecast_needs(self, step: S) -> tuple[str, ...]:
        """Roles of the samples without which `forecast` has no answer."""
        quick = self.rehearsal(step)
        return () if quick is None else quick.needs

    def forecast(self, step: S, model: Model, context: Context) -> Forecast:
        """What the step would do to `model`: its plan applied, its quick form done, or no more than a sentence where it
        trains."""
        quick = self.rehearsal(step)
        if quick is None:
            return Forecast(model, f"{self.summary}; training is skipped here, shapes and formats stay", skipped=True)
        if self.plans:
            plan = self.plan(quick, model, context.data, context.seed, context.target)
            lines = tuple(line.strip() for line in str(plan).splitlines() if line != plan.headline)
            return Forecast(plan.apply(model), self.summary, lines=lines, details={"plan": plan.summary()})
        outcome = perform(quick, model, context)
        refused = [f"{entry['what']}: {entry['reason']}" for entry in outcome.record.get("refused", ())]
        notes = [f"note: {note}" for note in outcome.record.get("notes", ())]
        return Forecast(outcome.model, self.summary, lines=(*refused, *notes), details=outcome.record)


def handler_of(step: S) -> Handler[S]:
    """The handler of a step."""
    return cast("Handler[S]", registry.handler(step.step))


def perform(step: Step, model: Model, context: Context) -> StepResult:
    """Do one step; what the model's masks set to zero stays zero."""
    outcome = handler_of(step).perform(step, model, context)
    return StepResult(held(outcome.model), outcome.record)


def plan_record(step: Step, plan: AnyPlan) -> Mapping[str, Any]:
    """What the report says of a step that was planned and then applied."""
    return {**step.model_dump(mode="json"), "plan": plan.summary()}


def perform_plan(handler: Handler[S], step: S, model: Model, context: Context) -> StepResult:
    """Plan and apply at once; for handlers whose step is no more than its plan."""
    return applied(step, handler.plan(step, model, context.data, context.seed, context.target), model)


def applied(
    step: Step,
    plan: AnyPlan,
    model: Model,
    refused: Sequence[Mapping[str, str]] = (),
    undoing: Mapping[str, Any] | None = None,
) -> StepResult:
    """What a plan makes of a model, with what the step refused and what it cost to find out what pays."""
    changed = replace(plan.apply(model), history=(*model.history, step.model_dump(mode="json")))
    record = dict(plan_record(step, plan))
    record |= {"refused": list(refused)} if refused else {}
    return StepResult(changed, record | ({"undoing": undoing} if undoing else {}))


def neighbours(steps: Sequence[Step], position: int) -> tuple[Step | None, Step | None]:
    """The steps right before and behind the one at `position`, each where it works together with it."""
    step = steps[position]
    before = steps[position - 1] if position else None
    following = steps[position + 1] if position + 1 < len(steps) else None
    return (
        before if before is not None and before.joins(step) else None,
        following if following is not None and step.joins(following) else None,
    )
