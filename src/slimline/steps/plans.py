"""`slimline.plan`: what a structural step will do, by the kind of step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

from slimline import arguments
from slimline.steps.activations.plan import ActivationPlan, plan_activations
from slimline.arguments import takes
from slimline.steps.channels.cutting import plan_cuts
from slimline.steps.depth.plan import DepthPlan, plan_depth
from slimline.errors import SlimlineError
from slimline.graph.cuts import CutPlan
from slimline.graph.plan import Plan
from slimline.run.parts import PartedModel, PartedPlan, plan_parts
from slimline.steps.channels.selection import plan as plan_units
from slimline.recipe import ActivationPruning, ChannelPruning, DepthPruning
from slimline.recipe.step import Step

if TYPE_CHECKING:
    from slimline.data import Data
    from slimline.model import Model

AnyPlan = Plan | CutPlan | DepthPlan | ActivationPlan


def plan_channels(
    model: Model, step: ChannelPruning, data: Data | None = None, seed: int = 0, target: str | None = None
) -> Plan | CutPlan:
    """What a `ChannelPruning` removes: positions of units, or what layers lose by themselves."""
    return plan_units(model, step, data, seed, target) if step.cut is None else plan_cuts(model, step, data, seed)


_PLANNERS: dict[type[Step], Any] = {
    ActivationPruning: plan_activations,
    ChannelPruning: plan_channels,
    DepthPruning: plan_depth,
}


@overload
def plan(model: Model, step: Step, data: Data | None = None, seed: int = 0) -> AnyPlan: ...
@overload
def plan(model: PartedModel, step: Step, data: Data | None = None, seed: int = 0) -> PartedPlan: ...
@takes(
    model=arguments.any_model,
    step=arguments.steps,
    data=arguments.optional(arguments.data),
    seed=arguments.seed,
)
def plan(model: Model | PartedModel, step: Step, data: Data | None = None, seed: int = 0) -> AnyPlan | PartedPlan:
    """What `step` removes from `model`, without removing it: a plan that can `mask` and `apply`.

    Parameters
    ----------
    step : a structural step.
    data : for criteria that measure.
    seed : of random choices.

    Raises
    ------
    SlimlineError : for a step that has no plan, a glob that matches nothing, a goal out of reach, or missing data.
    """
    for part in model.parts.values() if isinstance(model, PartedModel) else (model,):
        part.check_float()
    if isinstance(model, PartedModel):
        return plan_parts(model, step, seed)
    planner = _PLANNERS.get(type(step))
    if planner is None:
        names = ", ".join(kind.__name__ for kind in _PLANNERS)
        raise SlimlineError(f"A {type(step).__name__} has no plan: plan is for {names}; use slimline.apply.")
    found: AnyPlan = planner(model, step, data, seed)
    return found
