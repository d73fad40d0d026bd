"""What an artifact costs, in parts of the original's and in absolute terms, and whether that is within a budget.

One definition for all: the estimate before the work, undo and the final report judge with the functions here, so that
none of them has a slack of its own. A latency is only as sure as its interval says, and where that holds the limit the
clock cannot tell. A limit that is a part is judged by the part, whose interval is of paired rounds: what slows the
machine down slows both artifacts. One that is a time is judged by the artifact's own median, whose interval knows only
the rounds that were timed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from slimline.basics.quantities import SIZE, TIME, Kind

if TYPE_CHECKING:
    from slimline.recipe import Budget

Outcome = Literal["met", "missed", "unclear"]
Unit = Literal["ms", "B"]
_KINDS: dict[str, Kind] = {"ms": TIME, "B": SIZE}
_MOST_DIGITS = 9


class Interval(BaseModel):
    """A quantity, and the two-sided interval of it at `confidence` (None: it is exact)."""

    model_config = ConfigDict(frozen=True, extra="allow")

    value: float
    low: float
    high: float
    confidence: float | None = None

    def judge(self, limit: float) -> Outcome:
        """Whether it is at most `limit`: the whole interval (``met``), none of it (``missed``), or ``unclear``."""
        return "met" if self.high <= limit else "missed" if self.low > limit else "unclear"


class Amount(Interval):
    """A quantity in absolute terms: milliseconds a batch, or bytes."""

    unit: Unit


class Part(Interval):
    """A quantity in parts of the original's; `amount` is the same in absolute terms (None: it has none)."""

    amount: Amount | None = None

    @classmethod
    def exact(cls, after: float, before: float, unit: Unit | None = None) -> Part:
        """Of a quantity that is counted, in `unit`."""
        value = after / max(before, 1)
        amount = None if unit is None else Amount(value=after, low=after, high=after, unit=unit)
        return cls(value=value, low=value, high=value, amount=amount)


class Cost(BaseModel):
    """Of an artifact; None was not measured. `latency` by batch size; `memory` is the peak of the whole process."""

    model_config = ConfigDict(frozen=True, extra="allow")

    latency: Mapping[int, Part] = {}
    size: Part | None = None
    memory: Part | None = None
    macs: Part | None = None


class Limit(BaseModel):
    """A limit of the budget and what became of it.

    Attributes
    ----------
    what : ``latency``, ``size``, ``peak memory`` or ``MACs``.
    part : what was measured, with its amount if the limit is absolute.
    limit : in `unit`; a part of the original's where that is None.
    batch : size at which a latency was measured.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    what: str
    part: Part
    limit: float
    outcome: Outcome
    unit: Unit | None = None
    batch: int | None = None

    @model_validator(mode="after")
    def _measured(self) -> Limit:
        if self.unit is not None and (self.part.amount is None or self.part.amount.unit != self.unit):
            raise ValueError(f"the limit on {self.what} is in {self.unit} and what was measured is not")
        return self

    @property
    def judged(self) -> Interval:
        """What is compared with the limit: the part, or the amount."""
        return self.part if self.unit is None or self.part.amount is None else self.part.amount

    def sentence(self) -> str:
        """For people."""
        part, unit = self.judged, self.unit
        digits = 3 if unit is None else self._digits(unit)

        def say(value: float) -> str:
            return f"{value:.3g}" if unit is None else _KINDS[unit].write(value, digits)

        if unit is None:
            sentence, budget = f"{self.what} reaches {say(part.value)} of the original's", say(self.limit)
        else:
            sentence, budget = f"{self.what} is {say(part.value)}", _KINDS[unit].write(self.limit)
        if part.confidence is not None:
            low, high = (say(end).partition(" ")[0] for end in (part.low, part.high))  # the unit is said once
            sentence += f" ({low} to {high} with {100 * part.confidence:g} % confidence)"
        if unit is not None and self.batch is not None:
            sentence += f" at batch {self.batch}"
        sentence += f", the budget is {budget}"
        return f"{sentence}: the clock cannot tell" if self.outcome == "unclear" else sentence

    def _digits(self, unit: Unit) -> int:
        """So many that what was measured does not look like a limit that it is not."""
        kind, value = _KINDS[unit], self.judged.value
        enough = (n for n in range(3, _MOST_DIGITS) if kind.write(value, n) != kind.write(self.limit))
        return 3 if value == self.limit else next(enough, _MOST_DIGITS)


def written(value: float, unit: Unit) -> str:
    """An amount for people, to three digits."""
    return _KINDS[unit].write(value, 3)


def judged_batch(batch_sizes: Sequence[int]) -> int:
    """The batch size at which a budget's latency is meant: the largest."""
    return max(batch_sizes)


def limits(cost: Cost, budget: Budget) -> tuple[Limit, ...]:
    """Every limit of `budget` on what was measured, with its outcome."""
    batch = judged_batch(tuple(cost.latency)) if cost.latency else None
    pairs = (
        ("latency", None if batch is None else cost.latency[batch], budget.max_latency),
        ("size", cost.size, budget.max_size),
        ("peak memory", cost.memory, budget.max_memory),
        ("MACs", cost.macs, budget.max_macs),
    )
    result = []
    for what, part, limit in pairs:
        if part is None or limit is None:
            continue
        at = batch if what == "latency" else None
        if not isinstance(limit, str):
            result.append(Limit(what=what, part=part, limit=limit, outcome=part.judge(limit), batch=at))
        elif part.amount is not None:
            unit = part.amount.unit
            most = _KINDS[unit].read(limit)
            assert most is not None, "a budget holds only what can be read"
            result.append(Limit(what=what, part=part, limit=most, outcome=part.amount.judge(most), unit=unit, batch=at))
    return tuple(result)


def worst(judged: Sequence[Limit]) -> Outcome:
    """``missed`` if one is, else ``unclear`` if one is, else ``met``."""
    outcomes = {f.outcome for f in judged}
    return next((o for o in ("missed", "unclear") if o in outcomes), "met")


def limited(budget: Budget) -> bool:
    """Whether a budget limits latency, size, memory or MACs at all."""
    ceilings = (budget.max_latency, budget.max_size, budget.max_memory, budget.max_macs)
    return any(limit is not None for limit in ceilings)


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
