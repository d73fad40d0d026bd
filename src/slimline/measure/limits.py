"""What an artifact costs in parts of the original's, and whether that is within a budget: one definition for all.

The estimate before the work, undo and the final report judge with the functions here, so that none of them has a slack
of its own: a latency is only as sure as its interval says, and where that holds the limit the clock cannot tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from slimline.recipe import Budget

Outcome = Literal["met", "missed", "unclear"]


class Part(BaseModel):
    """A quantity in parts of the original's, and the two-sided interval of it at `confidence` (None: it is exact)."""

    model_config = ConfigDict(frozen=True, extra="allow")

    value: float
    low: float
    high: float
    confidence: float | None = None

    @classmethod
    def exact(cls, after: float, before: float) -> Part:
        """Of a quantity that is counted."""
        value = after / max(before, 1)
        return cls(value=value, low=value, high=value)

    def judge(self, limit: float) -> Outcome:
        """Whether it is at most `limit`: the whole interval (``met``), none of it (``missed``), or ``unclear``."""
        return "met" if self.high <= limit else "missed" if self.low > limit else "unclear"


class Cost(BaseModel):
    """Of an artifact, in parts of the original's; None was not measured. `latency` by batch size."""

    model_config = ConfigDict(frozen=True, extra="allow")

    latency: Mapping[int, Part] = {}
    size: Part | None = None
    macs: Part | None = None


class Limit(BaseModel):
    """A limit of the budget and what became of it; `what` is ``latency``, ``size`` or ``MACs``."""

    model_config = ConfigDict(frozen=True, extra="allow")

    what: str
    part: Part
    limit: float
    outcome: Outcome

    def sentence(self) -> str:
        """For people."""
        reached = f"{self.what} reaches {self.part.value:.3g} of the original's"
        if self.part.confidence is not None:
            interval = f"{self.part.low:.3g} to {self.part.high:.3g}"
            reached = f"{reached} ({interval} with {100 * self.part.confidence:g} % confidence)"
        said = f"{reached}, the budget is {self.limit:.3g}"
        return f"{said}: the clock cannot tell" if self.outcome == "unclear" else said


def judged_batch(batch_sizes: Sequence[int]) -> int:
    """The batch size at which a budget's latency is meant: the largest."""
    return max(batch_sizes)


def limits(cost: Cost, budget: Budget) -> tuple[Limit, ...]:
    """Every limit of `budget` on what was measured, with its outcome."""
    latency = cost.latency[judged_batch(tuple(cost.latency))] if cost.latency else None
    pairs = (
        ("latency", latency, budget.max_latency),
        ("size", cost.size, budget.max_size),
        ("MACs", cost.macs, budget.max_macs),
    )
    return tuple(
        Limit(what=what, part=part, limit=limit, outcome=part.judge(limit))
        for what, part, limit in pairs
        if part is not None and limit is not None
    )


def worst(found: Sequence[Limit]) -> Outcome:
    """``missed`` if one is, else ``unclear`` if one is, else ``met``."""
    outcomes = {f.outcome for f in found}
    return next((o for o in ("missed", "unclear") if o in outcomes), "met")


def limited(budget: Budget) -> bool:
    """Whether a budget limits latency, size or MACs at all."""
    return any(limit is not None for limit in (budget.max_latency, budget.max_size, budget.max_macs))


class Trial(BaseModel):
    """Something that was tried in order to decide, with what it was found to cost and why it was chosen or not.

    Attributes
    ----------
    stage : ``estimate`` (an artifact without training, before the work), ``attempt`` (the whole work), ``undo`` (a
        choice of layers that stay in float; its latency is in parts of that of the float artifact).
    settings : what was tried, ready for JSON.
    cost : what was measured.
    drop : score lost on the selection split; None where it was not measured.
    chosen, reason : what came of it.
    seconds : that it took.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    stage: Literal["estimate", "attempt", "undo"]
    settings: Mapping[str, object]
    cost: Cost = Cost()
    drop: float | None = None
    chosen: bool = False
    reason: str = ""
    seconds: float | None = None
