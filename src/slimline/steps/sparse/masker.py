"""Masks that change while a network trains: which update is due, and what it prunes, exchanges or lets free.

Knows no framework. The training loop, slimline's own or the user's, tells a `Masker` after every optimiser step,
and holds to zero what its masks say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.methods import sparsity
from slimline.methods.schedules import SparsitySchedule, dense_phase, regrown
from slimline.methods.schedules import sparsity as scheduled
from slimline.methods.sparsity import Array, Layout, Pattern
from slimline.steps.sparse.prune import criterion
from slimline.steps.sparse.step import SparsePruning

UPDATES, PHASES = 50, 10  # between `begin` and `end`, where no frequency is given
PREFIX = "masker/"


class Masker:
    """The masks of one gradual pruning.

    Parameters
    ----------
    layouts : by weight name, the weights to prune.
    total : optimiser steps of the training; None where they are not known, and the step's times are numbers of steps.
    old : masks that hold already and stay.

    Attributes
    ----------
    masks : by weight name, of the weight's shape; True stays.
    steps_taken : optimiser steps so far.
    """

    def __init__(
        self,
        step: SparsePruning,
        layouts: Mapping[str, Layout],
        shapes: Mapping[str, tuple[int, ...]],
        total: int | None,
        seed: int,
        old: Mapping[str, Array] | None = None,
    ) -> None:
        if not step.trains:
            raise SlimlineError(f"SparsePruning with schedule: {step.schedule} prunes outside the training: apply it.")
        self.step, self.layouts, self.seed = step, layouts, seed
        self.pattern = Pattern.parse(step.pattern)
        self.name, self.function = criterion(step)
        self.begin, self.end = _times(step, total)
        parts = PHASES if step.schedule == "acdc" else UPDATES
        self.frequency = step.frequency or max((self.end - self.begin) // parts, 1)
        group = self.pattern.group
        self.amount = float(step.amount or 0.0) if group is None else 1 - group[0] / group[1]
        self.old = {name: (old or {}).get(name, np.ones(shapes[name], bool)) for name in layouts}
        self.masks = dict(self.old)
        self.steps_taken = 0

    @property
    def complete(self) -> bool:
        """Whether the masks have reached the amount and stay."""
        early = self.step.schedule == "constant" and self.step.regrow is None
        return self.steps_taken >= (self.begin if early else self.end)

    @property
    def sparsity(self) -> float:
        """The part of the weights that is masked now."""
        return 1 - sum(int(m.sum()) for m in self.masks.values()) / sum(m.size for m in self.masks.values())

    @property
    def gradient(self) -> bool:
        """Whether updates read gradients."""
        return self.step.gradient or self.step.regrow is not None or self.function is not None

    def advance(self, weights: Callable[[], Mapping[str, Array]], gradients: Callable[[], Mapping[str, Array]]) -> bool:
        """Count an optimiser step; whether it changed the masks.

        Parameters
        ----------
        weights, gradients : asked for where an update needs them; gradients as if nothing were masked.
        """
        self.steps_taken += 1
        at = self.steps_taken - self.begin
        if not 0 <= at <= self.end - self.begin or (at % self.frequency and self.steps_taken != self.end):
            return False
        if self.step.schedule == "acdc" and dense_phase(self.steps_taken, self.begin, self.end, self.frequency):
            self.masks = dict(self.old)
            return True
        self.masks = self._update(weights(), gradients() if self.gradient else {})
        return True

    def state(self) -> dict[str, Array]:
        """All that the next update depends on besides the weights."""
        arrays: dict[str, Array] = {f"{PREFIX}mask/{name}": mask for name, mask in self.masks.items()}
        return arrays | {f"{PREFIX}done": np.array(self.steps_taken)}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Continue from `state`."""
        self.steps_taken = int(state[f"{PREFIX}done"])
        self.masks = {name: state[f"{PREFIX}mask/{name}"].astype(bool) for name in self.masks}

    def _update(self, weights: Mapping[str, Array], gradients: Mapping[str, Array]) -> dict[str, Array]:
        span = self.end - self.begin
        progress = (self.steps_taken - self.begin) / span if span else 1.0
        schedule: SparsitySchedule = self.step.schedule  # type: ignore[assignment]  # it trains
        gone = scheduled(schedule, progress, self.amount, self.step.power)
        slopes = {n: layout.matrix(gradients[n]) for n, layout in self.layouts.items()} if gradients else {}
        scores = {}
        for number, (name, layout) in enumerate(self.layouts.items()):
            score = self._score(number, layout.matrix(weights[name]), slopes.get(name))
            scores[name] = np.where(layout.matrix(self.masks[name]), score, -np.inf)
        part = self.step.regrow
        if part is not None and self.steps_taken > self.begin:
            exchanged = regrown(progress, part) * (1 - gone)
            survivors = self._select(scores, gone + exchanged)
            for name, layout in self.layouts.items():
                grown = np.where(survivors[name], np.inf, np.abs(slopes[name]))
                scores[name] = np.where(layout.matrix(self.old[name]), grown, -np.inf)
        masks = self._select(scores, gone)
        tensors = {name: layout.tensor(masks[name], weights[name].shape) for name, layout in self.layouts.items()}
        return {name: mask & self.old[name] for name, mask in tensors.items()}

    def _score(self, number: int, weight: Array, gradient: Array | None) -> Array:
        if self.function is not None:
            return sparsity.checked(self.function(weight, gradient, None), weight.shape, self.name)
        return sparsity.score(self.name, weight, gradient, None, self.seed + number)

    def _select(self, scores: Mapping[str, Array], gone: float) -> dict[str, Array]:
        """The mask of every layer that loses the part `gone`, as matrices."""
        step, pattern = self.step, self.pattern
        if pattern.group is not None:
            n, m = pattern.group
            return {name: sparsity.n_of_m(s, max(n, round(m * (1 - gone))), m) for name, s in scores.items()}
        if step.scope == "row":
            return {name: sparsity.keep_rows(s, gone, pattern) for name, s in scores.items()}
        if step.scope == "erk":
            counts = sparsity.erk_counts([self.old[name].shape for name in scores], gone)
        elif step.scope == "global":
            counts = sparsity.global_counts(list(scores.values()), gone, pattern)
        else:
            counts = sparsity.local_counts([s.size for s in scores.values()], gone)
        return {n: sparsity.keep_mask(s, c, pattern) for (n, s), c in zip(scores.items(), counts, strict=True)}


def _times(step: SparsePruning, total: int | None) -> tuple[int, int]:
    """First and last update, in optimiser steps from 1."""
    bounds = []
    for name in ("begin", "end"):
        when = getattr(step, name)
        if isinstance(when, float):
            if total is None:
                raise SlimlineError(
                    f"SparsePruning {name}={when:g} is a part of a training of unknown length: pass total=, the number "
                    "of its optimiser steps, or give a number of steps."
                )
            when = round(when * total)
        bounds.append(max(when, 1))
    begin, end = bounds
    if total is not None and end > total:
        raise SlimlineError(
            f"SparsePruning ends at optimiser step {end}, but the training has {total}: train longer or end earlier."
        )
    if begin > end:
        raise SlimlineError(f"SparsePruning begins at optimiser step {begin}, after its end at {end}: swap them.")
    return begin, end
