"""What of a recipe can be refused before any work: names that match nothing, axes that are not there, goals too far.

Without data and without changing anything. A step behind others is asked about the network as it is now, whose layers
keep their names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slimline.steps.activations.plan import chosen as chosen_relus
from slimline.steps.depth.plan import plan_depth
from slimline.model import Model
from slimline.steps.plans import plan_channels
from slimline.recipe import ActivationPruning, ChannelPruning, DepthPruning, SparsePruning, Step
from slimline.steps.sparse.prune import chosen as chosen_layers


def _simple(step: ChannelPruning, resized: bool) -> ChannelPruning:
    """The step without what needs data or a clock, and, where the sizes are others by then, without its goal."""
    plain: dict[str, Any] = {"criterion": "l2", "compensate": False, "schedule": "oneshot", "rounds": 1}
    if step.round_to == "auto":
        plain["round_to"] = 1
    if resized:
        plain |= {"ratio": 0.5, "target_macs": None, "target_parameters": None}
    return step.model_copy(update=plain)


def check(steps: Sequence[Step], model: Model) -> None:
    """Refuse what `steps` could not do to `model`.

    Raises
    ------
    SlimlineError : a glob that matches nothing, a frozen or missing axis, no ReLU or residual block, more removed than
        there is, or a goal out of reach.
    """
    for position, step in enumerate(steps):
        resized = any(before.kind == "structural" for before in steps[:position])
        match step:
            case ChannelPruning():
                plan_channels(model, _simple(step, resized))
            case DepthPruning():
                plan_depth(model, step.model_copy(update={"criterion": "l2"}))
            case SparsePruning():  # whether a pattern fits is seen when the widths are there
                chosen_layers(model, step.model_copy(update={"pattern": "element"}) if resized else step)
            case ActivationPruning():
                chosen_relus(model.graph, step)
