"""How strongly a recipe may be done: its rungs, from nothing at all to nearly everything pruned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slimline.recipe import Recipe, Step
from slimline.steps.channels.step import ChannelPruning
from slimline.steps.sparse_training.step import SparseTraining

RATIOS = tuple(i / 32 for i in range(1, 32))


@dataclass(frozen=True)
class Rung:
    """One strength.

    Attributes
    ----------
    name : for people.
    recipe : what is done.
    ratio : part of every unit that `ChannelPruning` removes; None where the recipe's steps are as they were given.
    """

    name: str
    recipe: Recipe
    ratio: float | None = None

    def settings(self) -> dict[str, Any]:
        """Ready for JSON."""
        pruned = {} if self.ratio is None else {"ratio": self.ratio}
        return {"strength": self.name, **pruned, "steps": [step.step for step in self.recipe.steps]}


def ladder(recipe: Recipe) -> tuple[Rung, ...]:
    """From the mildest to the strongest; a recipe without ``fit`` has one rung, itself.

    With it the first does nothing, the second all but channel pruning (and what only serves or mends that), the rest
    prune every unit by 1/32, 2/32, …; where nothing of the recipe is left without pruning, the second is missing.
    """
    if not recipe.fit:
        return (Rung("as the recipe says", recipe),)
    plain = recipe.model_copy(update={"fit": False})
    rungs = [Rung("nothing", plain.model_copy(update={"steps": ()}))]
    whole = Rung("no pruning", plain.model_copy(update={"steps": _unpruned(recipe.steps)}))
    if whole.recipe.steps:
        rungs.append(whole)
    if any(isinstance(step, ChannelPruning) for step in recipe.steps):
        rungs += [Rung(f"{100 * ratio:g} % pruned", _pruned(plain, ratio), ratio) for ratio in RATIOS]
    return tuple(rungs)


def _pruned(recipe: Recipe, ratio: float) -> Recipe:
    goal = {"ratio": ratio, "target_macs": None, "target_parameters": None}
    steps = tuple(s.model_copy(update=goal) if isinstance(s, ChannelPruning) else s for s in recipe.steps)
    return recipe.model_copy(update={"steps": steps})


def _unpruned(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Without channel pruning, sparse training right before it, and recoveries that then have nothing to recover."""
    left: list[Step] = []
    for position, step in enumerate(steps):
        following = steps[position + 1] if position + 1 < len(steps) else None
        serves = isinstance(step, SparseTraining) and isinstance(following, ChannelPruning)
        if isinstance(step, ChannelPruning) or serves or (step.kind == "recovery" and not left):
            continue
        left.append(step)
    return tuple(left)
