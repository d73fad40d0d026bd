"""How strongly a recipe may be done: its rungs, from nothing at all to nearly everything pruned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slimline.recipe import Recipe, Step
from slimline.steps.base import handler_of

RATIOS = tuple(i / 32 for i in range(1, 32))


@dataclass(frozen=True)
class Rung:
    """One strength.

    Attributes
    ----------
    name : for people.
    recipe : what is done.
    ratio : the strength of the steps that have one (`Handler.with_strength`); None where they are as they were given.
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
    if any(_at(step, 0.5) is not None for step in recipe.steps):
        rungs += [Rung(f"{100 * ratio:g} % pruned", _pruned(plain, ratio), ratio) for ratio in RATIOS]
    return tuple(rungs)


def _at(step: Step, strength: float) -> Step | None:
    return handler_of(step).with_strength(step, strength)


def _pruned(recipe: Recipe, ratio: float) -> Recipe:
    return recipe.model_copy(update={"steps": tuple(_at(step, ratio) or step for step in recipe.steps)})


def _unpruned(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Without what has a strength, training that only prepares it, and recoveries that then have nothing to recover."""
    remaining: list[Step] = []
    for position, step in enumerate(steps):
        following = steps[position + 1] if position + 1 < len(steps) else None
        prepares = (
            step.kind == "training"
            and following is not None
            and step.joins(following)
            and _at(following, 0.5) is not None
        )
        if _at(step, 0.5) is not None or prepares or (step.kind == "recovery" and not remaining):
            continue
        remaining.append(step)
    return tuple(remaining)
