"""How strongly to compress, where the user names only the budget: whole attempts, judged on the selection samples.

Estimates (`slimline.search.fit`) say which strengths meet the limits on latency, size, memory and MACs; what is lost
only the whole work can tell. So an attempt that loses more than `Budget.max_drop` is stepped back from as far as the
other limits allow, and where there are none, the strongest is looked for that does not. Certification samples play no
part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from slimline.files.decisions import checked
from slimline.measure.limits import Cost, Trial, limited
from slimline.methods.search import strongest
from slimline.recipe import Budget
from slimline.search.fit import Decisions, Fit
from slimline.search.ladder import Rung

if TYPE_CHECKING:
    from slimline.data import Data
    from slimline.recipe import Recipe
    from slimline.steps.base import Decide

ATTEMPTS = 5
_ROUNDING = 1e-9  # of a drop that is exactly the limit

R = TypeVar("R")


@dataclass(frozen=True)
class Attempt:
    """The whole work at one strength: the `number`-th, with what a clock decided for it beforehand."""

    number: int
    rung: Rung
    decisions: Decisions

    @property
    def prefix(self) -> str:
        """Of the names of its stages; empty for the first."""
        return "" if self.number == 1 else f"try-{self.number}-"


@dataclass(frozen=True)
class Outcome(Generic[R]):
    """The attempt that is kept and its result, all that was tried, and why the limits cannot all be met (or '')."""

    attempt: Attempt
    result: R
    trials: tuple[Trial, ...]
    conflict: str = ""


def search(
    rungs: tuple[Rung, ...],
    start: int,
    fitted: Fit,
    budget: Budget,
    work: Callable[[Attempt], R],
    measure: Callable[[R], tuple[Cost, float | None]],
    alike: Callable[[Rung], str],
    decide: Decide,
) -> Outcome[R]:
    """Attempt what `fitted` allows until the budget is met, at most `ATTEMPTS` times (and then perhaps nothing at all).

    Parameters
    ----------
    start : the mildest rung that does something; below it is the one that does nothing.
    work : does an attempt, or reads back what it left.
    measure : what an artifact costs and loses on the selection samples (None: there are none).
    alike : equal for rungs that lead to the same shapes, of which one attempt is enough.
    decide : keeps what was measured.
    """
    if len(rungs) == 1 or budget.max_drop is None:
        attempt = Attempt(1, rungs[fitted.rung], fitted.decisions.get(fitted.rung, {}))
        return Outcome(attempt, work(attempt), fitted.trials)
    attempts = _Attempts(rungs, fitted, budget.max_drop, work, measure, alike, decide)
    if limited(budget):
        for rung in (fitted.rung, *fitted.milder)[:ATTEMPTS]:
            if attempts.passes(rung):
                return attempts.outcome(rung)
        return attempts.outcome(min(attempts.of, key=lambda rung: (attempts.drop(rung), rung)), conflict=True)
    chosen = strongest(start, len(rungs), attempts.passes)
    if chosen is None:
        chosen = 0
        attempts.attempt(chosen)
    return attempts.outcome(chosen)


class Measured(BaseModel):
    """What an attempt costs and loses on the selection samples, for the journal."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    strength: str
    cost: Cost
    drop: float | None


class Shapes(BaseModel):
    """Text that tells networks of different shapes apart, for the journal."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shapes: str


class _Attempts(Generic[R]):
    """Those of one search, by rung."""

    def __init__(
        self,
        rungs: tuple[Rung, ...],
        fitted: Fit,
        max_drop: float,
        work: Callable[[Attempt], R],
        measure: Callable[[R], tuple[Cost, float | None]],
        alike: Callable[[Rung], str],
        decide: Decide,
    ) -> None:
        self.rungs, self.fitted, self.max_drop = rungs, fitted, max_drop
        self.work, self.measure, self.alike, self.decide = work, measure, alike, decide
        self.of: dict[int, tuple[Attempt, R, Measured]] = {}
        self.shapes: dict[str, int] = {}

    def passes(self, rung: int) -> bool | None:
        """Whether no more is lost than may be; None where that would take one attempt too many."""
        shape = self.shape(rung)
        if shape not in self.shapes:
            if len(self.of) >= ATTEMPTS:
                return None
            self.attempt(rung)
            self.shapes[shape] = rung
        return self.drop(self.shapes[shape]) <= self.max_drop + _ROUNDING

    def shape(self, rung: int) -> str:
        """Equal for rungs that lead to the same shapes, also where a clock rounds them."""
        record = self.decide(f"shapes-{rung}", lambda: {"shapes": self.alike(self.rungs[rung])})
        return checked(Shapes, record, "the shapes that a strength leads to").shapes

    def attempt(self, rung: int) -> None:
        """Do the whole work and see what it loses."""
        attempt = Attempt(len(self.of) + 1, self.rungs[rung], self.fitted.decisions.get(rung, {}))
        result = self.work(attempt)

        def ask() -> dict[str, Any]:
            cost, drop = self.measure(result)
            return Measured(strength=attempt.rung.name, cost=cost, drop=drop).model_dump(mode="json")

        measured = checked(Measured, self.decide(f"attempt-{attempt.number}", ask), f"attempt {attempt.number}")
        self.of[rung] = attempt, result, measured

    def drop(self, rung: int) -> float:
        """Lost in the attempt on this rung; 0 where it cannot be measured."""
        return self.of[rung][2].drop or 0.0

    def outcome(self, rung: int, conflict: bool = False) -> Outcome[R]:
        """The search, ended on `rung` or one of the same shapes."""
        if rung not in self.of:
            rung = self.shapes[self.shape(rung)]
        attempt, result, _ = self.of[rung]
        rows = [self._row(number, number == rung, conflict) for number in self.of]
        reason = ""
        if conflict:
            reason = (
                f"the limits conflict: with the mildest compression that meets the others, the selection samples show "
                f"{self.drop(rung):.4g} lost and the budget allows {self.max_drop:.4g} (strength: {attempt.rung.name})"
            )
        return Outcome(attempt, result, (*self.fitted.trials, *rows), reason)

    def _row(self, rung: int, chosen: bool, conflict: bool) -> Trial:
        attempt, _, measured = self.of[rung]
        lost = measured.drop
        if lost is None:
            reason = "there are no selection samples to see what it loses"
        elif lost > self.max_drop + _ROUNDING:
            reason = f"the selection samples show {lost:.4g} lost, the budget allows {self.max_drop:.4g}"
            reason += "; the least that was reached" if chosen and conflict else ""
        else:
            other = "another was stronger" if not limited(attempt.rung.recipe.budget) else "a milder one does too"
            reason = f"the selection samples show {lost:.4g} lost, within {self.max_drop:.4g}"
            reason += "" if chosen else f", but {other}"
        return Trial(
            stage="attempt",
            settings={**attempt.rung.settings(), "attempt": attempt.number},
            cost=measured.cost,
            drop=lost,
            chosen=chosen,
            reason=reason,
        )


class Selection:
    """What artifacts lose against the original's on the selection samples, run by the runtime itself.

    Samples and the names of outputs are asked for when they are needed: a run that only has to be ended has neither.
    """

    def __init__(
        self, data: Callable[[], Data], recipe: Recipe, baseline: Path, names: Callable[[], Sequence[str]]
    ) -> None:
        self.data, self.recipe, self.baseline, self.names = data, recipe, baseline, names
        self._reference: Any = None

    def drop(self, artifact: Path) -> float | None:
        """Mean score of the original less that of `artifact`; None where there are no such samples."""
        from slimline.measure import outputs, score, scored

        data = self.data()
        if not data.has("selection"):
            return None
        split = data.split("selection")
        batch = max(self.recipe.batch_sizes)
        artifacts = (self.baseline, artifact) if self._reference is None else (artifact,)
        names = self.names()
        needed = scored(names, split.labels, data.metric, data.declared) if names else None
        answers = [
            outputs(each, split.inputs, batch, self.recipe.threads, names=names, needed=needed) for each in artifacts
        ]
        self._reference = self._reference if self._reference is not None else answers[0]
        before, after = (
            score(answer, split.labels, reference=self._reference, metric=data.metric, declared=data.declared)[1]
            for answer in (self._reference, answers[-1])
        )
        return float(before.mean() - after.mean())
