"""Channel pruning of a model by parts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slimline.basics.errors import NothingToPrune, SlimlineError
from slimline.graph.units import Units
from slimline.model.model import Model
from slimline.model.parts import PartedModel
from slimline.plans import Plan
from slimline.recipe.layers import matches, refuse_unmatched
from slimline.recipe.step import Step
from slimline.steps.channels.selection import plan
from slimline.steps.channels.step import ChannelPruning


@dataclass(frozen=True)
class PartedPlan:
    """A plan per part; `mask` and `apply` carry them out."""

    plans: Mapping[str, Plan]

    def mask(self, model: PartedModel) -> PartedModel:
        """A new model of the same shapes that computes what `apply`'s will."""
        return model.then({name: plan.mask(model.parts[name]) for name, plan in self.plans.items()})

    def apply(self, model: PartedModel) -> PartedModel:
        """A new model from which the positions are really removed."""
        return model.then({name: plan.apply(model.parts[name]) for name, plan in self.plans.items()})

    def summary(self) -> dict[str, Any]:
        """What goes from every part, ready for JSON."""
        return {name: plan.summary() for name, plan in self.plans.items()}

    def to_json(self, indent: int | None = 2) -> str:
        """The plans as JSON text; `from_json` reads them back for the same model."""
        return json.dumps(self.summary(), indent=indent)

    @classmethod
    def from_json(cls, text: str, model: PartedModel) -> PartedPlan:
        """The plans that `to_json` wrote, for `model`."""
        return cls({name: Plan.from_json(json.dumps(p), model.parts[name]) for name, p in json.loads(text).items()})

    def __str__(self) -> str:
        return "\n".join(f"{name}: {plan}" for name, plan in self.plans.items())


def plan_parts(model: PartedModel, step: Step, seed: int = 0) -> PartedPlan:
    """What a `ChannelPruning` removes from every part, each planned by itself; globs are on the whole model's names.

    A part of which nothing can be pruned, such as one layer between two boundaries, stays, with a note in its plan;
    it is an error where that is every part.
    """
    for part in model.parts.values():
        part.check_float()
    if not isinstance(step, ChannelPruning) or step.schedule != "oneshot":
        raise SlimlineError(
            f"{type(step).__name__} cannot be done to a model by parts: prune its channels in one shot, and train its "
            "native module."
        )
    if step.cut is not None:
        raise SlimlineError(f"A model by parts is not pruned along {step.cut}: prune parts['name'] by itself.")
    if step.needs:
        raise SlimlineError("A model by parts is pruned without data: choose the criterion l1, l2 or random.")
    globs = {field: tuple(getattr(step, field)) for field in ("layers", "keep")}
    every = [layer for part in model.parts.values() for layer in part.graph.types]
    types = {layer: called for part in model.parts.values() for layer, called in part.graph.types.items()}
    for field, patterns in {**globs, "overrides": tuple(step.overrides)}.items():
        refuse_unmatched(f"layer for {field}", patterns, every, types)
    plans, idle = {}, []
    for name, part in model.parts.items():
        own: dict[str, Any] = {f: tuple(p for p in patterns if _matches(part, p)) for f, patterns in globs.items()}
        own["overrides"] = {p: override for p, override in step.overrides.items() if _matches(part, p)}
        if own["layers"]:
            try:
                plans[name] = plan(part, step.model_copy(update=own), None, seed)
            except NothingToPrune as reason:
                plans[name] = Plan(Units(part.graph), {}, (str(reason),))
                idle.append(f"In the part {name!r}: {reason}")
            except SlimlineError as reason:
                raise SlimlineError(f"In the part {name!r}: {reason}") from reason
    if plans and len(idle) == len(plans):
        raise NothingToPrune(" ".join(idle))
    return PartedPlan(plans)


def _matches(part: Model, pattern: str) -> bool:
    return pattern == "*" or matches(part.graph.types, (pattern,), part.graph.types)


def apply(model: PartedModel, steps: Sequence[Step], seed: int = 0) -> PartedModel:
    """A new model to which the steps were done, one after the other."""
    for step in steps:
        model = plan_parts(model, step, seed).apply(model)
    return model
