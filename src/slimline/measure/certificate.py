"""The certificate: how much was lost, at most, and how sure that is."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from slimline.errors import SlimlineError, unknown

Method = Literal["tango", "clopper-pearson", "bootstrap"]
Verdict = Literal["certified", "refuted", "inconclusive", "measured"]

_FEWEST_FOR_BOOTSTRAP = 30
_MOST_SAMPLES = 10**9
_NAMES = {
    "tango": "Tango score interval",
    "clopper-pearson": "exact Clopper-Pearson",
    "bootstrap": "paired BCa bootstrap",
}


class Certificate(BaseModel):
    """A one-sided confidence statement on the drop of a per-sample score from the original to the compressed model.

    Attributes
    ----------
    verdict : ``certified`` if the drop is at most `max_drop` with this confidence, ``refuted`` if it is more with this
        confidence, ``inconclusive`` if the samples cannot tell, ``measured`` if there was no `max_drop`.
    metric : name of the score; for ``accuracy`` and ``agreement`` drops are parts of 1.
    observed_drop : mean score of the original less that of the compressed model.
    bound : one-sided upper confidence bound on the true drop.
    lower_bound : one-sided lower confidence bound at the same confidence.
    max_drop : the budget, or None.
    confidence : of each bound.
    n : samples.
    losses, gains : samples only the original, only the compressed model got right; None unless scores are 0 or 1.
    method : ``tango``, ``clopper-pearson`` or ``bootstrap``.
    more_samples : how many more would settle an inconclusive verdict if losses and gains stay as frequent; None if
        it is settled, or no number would do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    verdict: Verdict
    metric: str
    observed_drop: float
    bound: float
    lower_bound: float
    max_drop: float | None
    confidence: float
    n: int
    losses: int | None = None
    gains: int | None = None
    method: Method
    more_samples: int | None = None

    def __str__(self) -> str:
        return self.sentence()

    def sentence(self) -> str:
        """What it says, for people."""
        sure = f"{100 * self.confidence:g} % confidence"
        basis = f"{self.n:,} samples, {_NAMES[self.method]}"
        fell = f"{self.metric} did not change"
        if self.observed_drop:
            fell = f"{self.metric} {'fell' if self.observed_drop > 0 else 'rose'} by {self._amount(self.observed_drop)}"
        at_most = f"the true drop is at most {self._amount(self.bound)} with {sure}"
        if self.bound < 0:
            at_most = f"the true rise is at least {self._amount(self.bound)} with {sure}"
        if self.max_drop is None:
            return f"Measured: {fell}; {at_most} ({basis})."
        budget = self._amount(self.max_drop)
        if self.verdict == "certified":
            return f"Certified: {fell}; {at_most}, within the budget of {budget} ({basis})."
        if self.verdict == "refuted":
            at_least = f"the true drop is at least {self._amount(self.lower_bound)} with {sure}"
            return f"Refuted: {fell}; {at_least}, more than the budget of {budget} ({basis})."
        settle = (
            "no number of samples would settle it"
            if self.more_samples is None
            else f"about {self.more_samples:,} more samples would settle it"
        )
        return f"Inconclusive: {fell}; {at_most}, the budget is {budget}; {settle} ({basis})."

    def _amount(self, change: float) -> str:
        drop = abs(change)
        return f"{100 * drop:.2f} points" if self.metric in ("accuracy", "agreement") else f"{drop:.4g}"


def certify(
    original_scores: np.ndarray,
    compressed_scores: np.ndarray,
    max_drop: float | None,
    confidence: float = 0.95,
    method: Method | None = None,
    metric: str = "accuracy",
    seed: int = 0,
) -> Certificate:
    """Bound the drop of the mean score from paired scores of both models on the same samples.

    The samples must not have been used for any choice. The two one-sided bounds share no risk: a verdict is wrong with
    probability at most ``1 - confidence`` (approximately so for ``tango`` and ``bootstrap``).

    Parameters
    ----------
    original_scores, compressed_scores : ``(n,)``, the higher the better; 0/1 or real.
    max_drop : the budget, in the unit of the scores (0.01 is one point of accuracy); None only measures.
    confidence : in (0.5, 1).
    method : of 0/1 scores ``tango`` (Tango 1998, the default) or ``clopper-pearson`` (exact, conservative); of real
        ones ``bootstrap`` (Efron 1987; no verdict from fewer than 30 samples).
    metric : name of the score.
    seed : of the bootstrap.

    Raises
    ------
    SlimlineError
        For no samples, scores of different lengths or that are not finite, or a method that does not fit them.
    """
    before = np.asarray(original_scores, dtype=np.float64)
    after = np.asarray(compressed_scores, dtype=np.float64)
    if before.ndim != 1 or before.shape != after.shape:
        raise SlimlineError(
            f"A certificate needs a score per sample of both models, not {before.shape} and {after.shape}."
        )
    if not len(before):
        raise SlimlineError("There are no samples to certify on: give test data, or a larger split.")
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise SlimlineError("Some scores are NaN or infinite: return finite scores, 0 for an answer that is of no use.")
    if not 0.5 < confidence < 1:
        raise SlimlineError(f"confidence must be between 0.5 and 1, not {confidence:g}: 0.95 is usual.")
    binary = bool(np.isin(before, (0, 1)).all() and np.isin(after, (0, 1)).all())
    chosen = method or ("tango" if binary else "bootstrap")
    if chosen not in _NAMES:
        raise unknown("certificate method", chosen, _NAMES)
    if chosen == "bootstrap":
        return _from_drops(before - after, max_drop, confidence, metric, seed)
    if not binary:
        raise SlimlineError(f"Method {chosen} needs scores of 0 and 1: use method='bootstrap' for others.")
    losses, gains = int((before > after).sum()), int((before < after).sum())
    return _from_counts(losses, gains, len(before), max_drop, confidence, chosen, metric)


def _from_counts(
    losses: int, gains: int, n: int, max_drop: float | None, confidence: float, method: Method, metric: str
) -> Certificate:
    from slimline.measure import paired

    upper: paired.CountBound = paired.tango if method == "tango" else paired.clopper_pearson
    bound, lower = upper(losses, gains, n, confidence), -upper(gains, losses, n, confidence)
    verdict = _verdict(bound, lower, max_drop)

    def settled(samples: int) -> bool:
        more, fewer = losses * samples / n, gains * samples / n
        above, below = upper(more, fewer, samples, confidence), -upper(fewer, more, samples, confidence)
        return _verdict(above, below, max_drop) != "inconclusive"

    more_samples = None
    if verdict == "inconclusive" and (losses - gains) / n != max_drop:
        enough = n
        while not settled(enough) and enough < _MOST_SAMPLES:
            enough *= 2
        if enough < _MOST_SAMPLES:
            unsettled = enough // 2
            while enough - unsettled > 1:
                middle = (enough + unsettled) // 2
                unsettled, enough = (unsettled, middle) if settled(middle) else (middle, enough)
            more_samples = enough - n
    return Certificate(
        verdict=verdict,
        metric=metric,
        observed_drop=(losses - gains) / n,
        bound=bound,
        lower_bound=lower,
        max_drop=max_drop,
        confidence=confidence,
        n=n,
        losses=losses,
        gains=gains,
        method=method,
        more_samples=more_samples,
    )


def _from_drops(drops: np.ndarray, max_drop: float | None, confidence: float, metric: str, seed: int) -> Certificate:
    from slimline.measure import paired

    n, observed = len(drops), float(drops.mean())
    lower, bound = paired.bootstrap(drops, confidence, seed)
    verdict = _verdict(bound, lower, max_drop)
    more_samples = None
    if max_drop is not None and n < _FEWEST_FOR_BOOTSTRAP:
        verdict, more_samples = "inconclusive", _FEWEST_FOR_BOOTSTRAP - n
    elif max_drop is not None and verdict == "inconclusive" and observed != max_drop:
        # The distance of a bound from the mean shrinks as one over the root of n.
        distance = bound - observed if observed < max_drop else observed - lower
        enough = n * (distance / (max_drop - observed)) ** 2
        more_samples = int(np.ceil(enough)) - n if enough < _MOST_SAMPLES else None
    return Certificate(
        verdict=verdict,
        metric=metric,
        observed_drop=observed,
        bound=bound,
        lower_bound=lower,
        max_drop=max_drop,
        confidence=confidence,
        n=n,
        method="bootstrap",
        more_samples=more_samples,
    )


def _verdict(bound: float, lower: float, max_drop: float | None) -> Verdict:
    if max_drop is None:
        return "measured"
    if bound <= max_drop:
        return "certified"
    return "refuted" if lower > max_drop else "inconclusive"
