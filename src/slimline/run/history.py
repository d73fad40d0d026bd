"""What the journal of a run says, event after event: its stages, its decisions, and the recipe as it changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slimline.basics.errors import SlimlineError
from slimline.recipe.recipe import Recipe
from slimline.run.journal import (
    Computed,
    Decision,
    Event,
    Finished,
    Journal,
    Note,
    Resolved,
    Stage,
    fingerprint,
)

Record = dict[str, Any]


class History:
    """The state of a run, as its journal tells it and no more.

    Attributes
    ----------
    journal : where new events are appended.
    created : the first record of the journal.
    stages : the finished ones, by name.
    decisions : answers by name and key.
    devices : on which training, calibration and gradients were computed, in their order.
    finished : whether the run is whole.
    """

    def __init__(self, root: Path) -> None:
        self.journal = journal = Journal(root)
        self.created: Record = journal.created.model_dump(mode="json", by_alias=True)
        self.stages: dict[str, Stage] = {}
        self.decisions: dict[tuple[str, str], Record] = {}
        self.devices: list[str] = []
        self.finished = False
        self._recipes = [(journal.created.recipe, True)]
        for event in journal.events[1:]:
            self._take(event)

    def append(self, event: Event) -> None:
        """Note `event` in the journal, and then here."""
        self.journal.append(event)
        self._take(event)

    def resolve(self, recipe: Recipe, edited: bool) -> None:
        """Note another recipe."""
        self.append(Resolved(event="recipe", recipe=recipe.model_dump(mode="json", by_alias=True), edited=edited))

    @property
    def begun(self) -> Recipe:
        """The recipe that the run was started with."""
        return self._parsed(self._recipes[0][0])

    @property
    def recipe(self) -> Recipe:
        """The recipe as it is now."""
        return self._parsed(self._recipes[-1][0])

    @property
    def wish(self) -> Recipe:
        """The recipe as the user gave it last, before it was fitted to the budget."""
        return self._parsed(self._edited)

    @property
    def base(self) -> str:
        """A hash of `wish`."""
        return fingerprint(self._edited)

    @property
    def replaced(self) -> Recipe | None:
        """The recipe that the present one was fitted from; None where the user gave the present one."""
        if len(self._recipes) < 2 or self._recipes[-1][1]:
            return None
        return self._parsed(self._recipes[-2][0])

    @property
    def _edited(self) -> Record:
        return next(recipe for recipe, edited in reversed(self._recipes) if edited)

    def _parsed(self, recipe: Record) -> Recipe:
        try:
            return Recipe.model_validate(recipe)
        except RecursionError as e:
            raise SlimlineError(f"{self.journal.path} holds no recipe: start a new run in another directory.") from e

    def _take(self, event: Event) -> None:
        match event:
            case Stage():
                self.stages[event.name] = event
            case Decision():
                self.decisions[event.name, event.key] = event.record
            case Resolved():
                self._recipes.append((event.recipe, event.edited))
            case Computed():
                self.devices.append(event.device)
        if not isinstance(event, Note):
            self.finished = isinstance(event, Finished)
