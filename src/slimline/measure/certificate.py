"""The certificate: how much was lost, at most, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from slimline.basics.arguments import whole
from slimline.basics.arrays import as_array
from slimline.basics.errors import SlimlineError, unknown

Method = Literal["exact", "betting", "tango", "clopper-pearson", "bootstrap", "set bootstrap"]
Verdict = Literal["certified", "refuted", "inconclusive", "measured"]
Range = tuple[float, float]

KNOWN_RANGES: dict[str, Range] = dict.fromkeys(("accuracy", "agreement", "jaccard"), (0.0, 1.0))
"""Of the scores that slimline computes itself."""

_MOST_SAMPLES = 10**9
_NAMES = {
    "exact": "exact bound by Buehler",
    "betting": "betting bound",
    "tango": "Tango score interval, approximate",
    "clopper-pearson": "exact Clopper-Pearson",
    "bootstrap": "bootstrap, approximate",
    "set bootstrap": "paired bootstrap of a metric over the whole set, approximate",
}
_MENDS = {
    "bootstrap": "give Data metric_range=(lowest, highest)",
    "set bootstrap": "only the mean of a score per sample can be certified",
    "tango": "use method='exact'",
}
"""What would give a verdict, by approximate method."""


class Certificate(BaseModel):
    """A one-sided confidence statement on the drop of a score from the original to the compressed model.

    Attributes
    ----------
    verdict : ``certified`` if the drop is at most `max_drop` with this confidence, ``refuted`` if it is more with this
        confidence, ``inconclusive`` if the samples cannot tell, ``measured`` if there was no `max_drop` or no bound
        that is known to hold.
    metric : name of the score; for ``accuracy`` and ``agreement`` drops are parts of 1.
    observed_drop : score of the original less that of the compressed model: the mean of all samples', or the set's.
    bound : one-sided upper confidence bound on the true drop; approximate for ``tango`` and the bootstraps.
    lower_bound : one-sided lower confidence bound at the same confidence.
    max_drop : the budget, or None.
    confidence : of each bound; of all certificates on the same samples together, where `use` counts them.
    n : independent samples, or groups of samples where there are `groups`.
    losses, gains : samples only the original, only the compressed model got right; None unless scores are 0 or 1.
    method : ``exact`` for 0/1 scores, ``betting`` for a declared range, else ``bootstrap``; ``set bootstrap`` of a
        metric over the whole set.
    more_samples : how many more would settle an inconclusive verdict if losses and gains stay as frequent; None if
        it is settled, or no number would do.
    score_range : the least and the greatest score that there can be, where that is known.
    groups : how many groups of dependent samples were counted, each once, whatever its size; None if none were named.
    samples : samples scored, copies and members of groups included; None if that is `n`.
    copies : samples left out because they are copies of others.
    use : the how-manyth model this is that was scored against the original on these samples; None if that was not
        watched.
    risk : the part of ``1 - confidence`` that this certificate's bounds spend, each.
    notes : what else a reader must know, as sentences.
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
    score_range: Range | None = None
    groups: int | None = None
    samples: int | None = None
    copies: int = 0
    use: int | None = None
    risk: float | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.sentence()

    def sentence(self) -> str:
        """What it says, for people; `notes` follow as sentences of their own."""
        return " ".join([f"{self._statement()}.", *self.notes])

    def _statement(self) -> str:
        sure = f"{'a nominal ' if self.method in _MENDS else ''}{100 * self.confidence:g} % confidence"
        of_set = self.groups is None or self.method == "set bootstrap"
        score = self.metric if of_set else f"the mean {self.metric} of a group"
        fell = f"{score} did not change"
        if self.observed_drop:
            fell = f"{score} {'fell' if self.observed_drop > 0 else 'rose'} by {self._amount(self.observed_drop)}"
        roughly = "roughly " if self.method in _MENDS else ""
        at_most = f"the true drop is {roughly}at most {self._amount(self.bound)} with {sure}"
        if self.bound < 0:
            at_most = f"the true rise is {roughly}at least {self._amount(self.bound)} with {sure}"
        basis = self._basis()
        if self.max_drop is None:
            return f"Measured: {fell}; {at_most} ({basis})"
        budget = self._amount(self.max_drop)
        if self.verdict == "measured":
            unproven = f"which does not certify the budget of {budget}: {_MENDS[self.method]}"
            return f"Measured: {fell}; {at_most}, {unproven} ({basis})"
        if self.verdict == "certified":
            return f"Certified: {fell}; {at_most}, within the budget of {budget} ({basis})"
        if self.verdict == "refuted":
            at_least = f"the true drop is at least {self._amount(self.lower_bound)} with {sure}"
            return f"Refuted: {fell}; {at_least}, more than the budget of {budget} ({basis})"
        more = "samples" if self.groups is None else "groups"
        settle = (
            f"no number of {more} would settle it"
            if self.more_samples is None
            else f"about {self.more_samples:,} more {more} would settle it"
        )
        return f"Inconclusive: {fell}; {at_most}, the budget is {budget}; {settle} ({basis})"

    def _basis(self) -> str:
        """What it rests on: samples, method, range, earlier uses."""
        counted = f"{self.n:,} samples"
        if self.groups is not None:
            counted = f"{self.n:,} groups of {self.samples or self.n:,} samples, "
            counted += "drawn as wholes" if self.method == "set bootstrap" else "each group counted once"
        elif self.copies:
            counted = f"{self.n:,} distinct samples, {self.copies:,} copies left out"
        facts = [counted, _NAMES[self.method]]
        if self.method == "betting" and self.score_range is not None:
            low, high = self.score_range
            facts[-1] += f" for scores from {low:g} to {high:g}"
        if self.use is not None and self.use > 1:
            facts.append(
                f"model {self.use:,} certified on these samples, which is paid for: the confidence is that of all "
                f"{self.use:,} together"
            )
        return ", ".join(facts)

    def _amount(self, change: float) -> str:
        drop = abs(change)
        return f"{100 * drop:.2f} points" if self.metric in KNOWN_RANGES else f"{drop:.4g}"


def certify(
    original_scores: np.ndarray,
    compressed_scores: np.ndarray,
    max_drop: float | None,
    confidence: float = 0.95,
    method: Method | None = None,
    metric: str = "accuracy",
    seed: int = 0,
    *,
    score_range: Range | Literal["known"] | None = "known",
    binary: bool | None = None,
    groups: np.ndarray | None = None,
    copies: int = 0,
    use: int | None = None,
    notes: tuple[str, ...] = (),
) -> Certificate:
    """Bound the drop of the mean score from paired scores of both models on the same samples.

    The samples must be independent draws that were not used for any choice. Each of the two one-sided bounds is wrong
    with probability at most ``1 - confidence``, for every distribution of the scores, and there is no verdict where no
    such bound is known: for real scores without a range, and for the approximate methods.

    Parameters
    ----------
    original_scores, compressed_scores : ``(n,)``, the higher the better; 0/1 or real.
    max_drop : the budget, in the unit of the scores (0.01 is one point of accuracy); None only measures.
    confidence : in (0.5, 1).
    method : of 0/1 scores ``exact`` (the default), ``clopper-pearson`` (exact, conservative) or ``tango``
        (approximate); of real ones ``betting`` where there is a range, else ``bootstrap`` (approximate).
    metric : name of the score.
    seed : of the bootstrap.
    score_range : the lowest and the highest score a sample can get, None if nobody knows; ``known`` is 0 to 1 for
        ``accuracy``, ``agreement`` and ``jaccard``, and None for any other metric.
    binary : whether a score can only be 0 or 1. None: if the arrays are boolean, or the metric is ``accuracy`` or
        ``agreement`` and no score is anything else. Scores that happen to be 0 or 1 tell nothing of rarer ones.
    groups : ``(n,)``, equal for samples that depend on each other. The drop is then that of the mean over groups of a
        group's mean score: each group counts once.
    copies, notes : samples that were left out as copies, and sentences, for the record.
    use : the how-manyth model this is that is scored on these samples; see `share`.

    Raises
    ------
    SlimlineError
        For no samples, scores of different lengths, that are not finite or not in the range, or a method that does not
        fit them.
    """
    whole(seed, "seed", 0, 2**63)
    before, after = _paired(original_scores, compressed_scores)
    check_terms(len(before), max_drop, confidence)
    if binary is None:
        binary = _looks_binary(original_scores, compressed_scores, score_range == "known" and metric in KNOWN_RANGES)
    elif binary and not _zero_one(before, after):
        raise SlimlineError(f"The scores of {metric} are not all 0 or 1: they are not binary.")
    requested_range = KNOWN_RANGES.get(metric) if score_range == "known" else score_range
    bounds = None if requested_range is None else check_range(requested_range, metric)
    bounds = (0.0, 1.0) if bounds is None and binary else bounds
    if bounds is not None:
        inside(before, after, bounds, metric)
    samples = len(before)
    if groups is not None:
        before, after = _group_means(before, after, np.asarray(groups))
        binary = binary and len(before) == samples
    chosen = _suited(method, binary, bounds)
    risk = (1 - confidence) * (1 if use is None else share(use))
    bound: _Bounds
    if chosen in ("betting", "bootstrap"):
        bound = _of_drops(before - after, max_drop, 1 - risk, None if chosen == "bootstrap" else bounds, seed)
    else:
        losses, gains = int((before > after).sum()), int((before < after).sum())
        bound = _of_counts(losses, gains, len(before), max_drop, 1 - risk, chosen)
    verdict = "measured" if chosen in _MENDS else _verdict(bound.upper, bound.lower, max_drop)
    return Certificate(
        verdict=verdict,
        metric=metric,
        observed_drop=bound.observed,
        bound=bound.upper,
        lower_bound=bound.lower,
        max_drop=max_drop,
        confidence=confidence,
        n=len(before),
        losses=bound.losses,
        gains=bound.gains,
        method=chosen,
        more_samples=bound.more() if verdict == "inconclusive" else None,
        score_range=bounds,
        groups=None if groups is None else len(before),
        samples=samples if groups is not None else None,
        copies=copies,
        use=use,
        risk=risk,
        notes=notes,
    )


def _paired(original: np.ndarray, compressed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both models' scores as finite real numbers, one for each sample."""
    before, after = _finite(original), _finite(compressed)
    if before.ndim != 1 or before.shape != after.shape:
        raise SlimlineError(
            f"A certificate needs a score per sample of both models, not {before.shape} and {after.shape}."
        )
    return before, after


def _zero_one(before: np.ndarray, after: np.ndarray) -> bool:
    return bool(np.isin(before, (0, 1)).all() and np.isin(after, (0, 1)).all())


def _looks_binary(original: np.ndarray, compressed: np.ndarray, named: bool) -> bool:
    """Whether scores can only be 0 or 1: booleans, and those of a metric of slimline's (`named`) that all are."""
    typed = all(np.asarray(scores).dtype == bool for scores in (original, compressed))
    return typed or (named and _zero_one(np.asarray(original), np.asarray(compressed)))


def _suited(method: Method | None, binary: bool, bounds: Range | None) -> Method:
    """The method that was asked for, or the best that fits; refuses one that does not fit."""
    chosen = method or ("exact" if binary else "bootstrap" if bounds is None else "betting")
    if chosen not in _NAMES:
        raise unknown("certificate method", chosen, _NAMES)
    if chosen in ("exact", "tango", "clopper-pearson") and not binary:
        raise SlimlineError(f"Method {chosen} needs scores of 0 and 1: use method='betting' with a score_range.")
    if chosen == "betting" and bounds is None:
        raise SlimlineError("Method betting needs to know the range of the scores: give score_range=(lowest, highest).")
    return chosen


def check_terms(samples: int, max_drop: float | None, confidence: float) -> None:
    """Raise the error that says which term of a certificate cannot be."""
    if not samples:
        raise SlimlineError("There are no samples to certify on: give test data, or a larger split.")
    if not (isinstance(confidence, int | float) and 0.5 < confidence < 1):
        raise SlimlineError(f"confidence must be between 0.5 and 1, not {confidence}: 0.95 is usual.")
    if max_drop is not None and not math.isfinite(max_drop):
        raise SlimlineError(f"max_drop is {max_drop}: give a finite number, or None to measure only.")


def share(use: int) -> float:
    """The part of the allowed risk that the `use`-th certificate on the same samples spends; they sum to one.

    The first spends four fifths, the k-th of the others ``0.2 / (k (k - 1))``, so that all statements on the samples
    hold together with the stated confidence, however the later models were chosen in the light of the earlier ones.
    """
    return 0.8 if use <= 1 else 0.2 / (use * (use - 1))


def check_range(ends: object, metric: str = "the metric") -> Range:
    """The lowest and highest score as floats, or the error that says what is wrong."""
    try:
        low, high = (float(v) for v in ends)  # type: ignore[attr-defined]
    except (TypeError, ValueError, OverflowError):
        low, high = math.nan, math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise SlimlineError(
            f"The range of {metric} is {ends!r}: give the lowest and the highest score of a sample, such as (0, 1)."
        )
    return low, high


class _Bounds:
    """The observed drop, its bounds, and how many more samples would settle a verdict."""

    def __init__(
        self,
        observed: float,
        lower: float,
        upper: float,
        more: Callable[[], int | None],
        losses: int | None = None,
        gains: int | None = None,
    ) -> None:
        self.observed, self.lower, self.upper, self.more = observed, lower, upper, more
        self.losses, self.gains = losses, gains


def _finite(scores: np.ndarray) -> np.ndarray:
    array = as_array(scores, "An array of scores", exact=True).astype(np.float64)
    if not np.isfinite(array).all():
        raise SlimlineError("Some scores are NaN or infinite: return finite scores, 0 for an answer that is of no use.")
    return array


def inside(before: np.ndarray, after: np.ndarray, bounds: Range, metric: str) -> None:
    """Raise the error that says which score is outside the declared range, if one is."""
    from slimline.measure import betting

    for scores in (before.astype(np.float64), after.astype(np.float64)):
        if not betting.fits(scores, *bounds):
            off = scores.min() if scores.min() < bounds[0] else scores.max()
            raise SlimlineError(
                f"The scores of {metric} reach {off:g}, outside the range {bounds[0]:g} to {bounds[1]:g} that was "
                "declared: declare the lowest and the highest score a sample can get."
            )


def _group_means(before: np.ndarray, after: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if groups.dtype.kind == "O":
        groups = groups.astype(str)
    if groups.shape != before.shape:
        raise SlimlineError(
            f"There are groups of shape {groups.shape} for scores of shape {before.shape}: give a group per sample."
        )
    _, first, place, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    # In the order in which they come, whatever their names.
    order = np.argsort(first)
    return (np.bincount(place, before) / sizes)[order], (np.bincount(place, after) / sizes)[order]


def _of_counts(losses: int, gains: int, n: int, max_drop: float | None, confidence: float, method: Method) -> _Bounds:
    from slimline.measure import exact, paired

    bounds: dict[str, paired.CountBound] = {
        "exact": exact.upper,
        "tango": paired.tango,
        "clopper-pearson": paired.clopper_pearson,
    }
    upper = bounds[method]

    def decided(samples: int) -> bool:
        assert max_drop is not None
        more, fewer = losses * samples / n, gains * samples / n
        if (losses - gains) / n < max_drop:
            if method == "exact" and samples <= _EXACT_FORESIGHT:
                return exact.rejects(more, fewer, samples, confidence, max_drop)
            return (paired.tango if method == "exact" else upper)(more, fewer, samples, confidence) <= max_drop
        if method == "exact" and samples <= _EXACT_FORESIGHT:
            return -exact.upper(fewer, more, samples, confidence) > max_drop
        return -(paired.tango if method == "exact" else upper)(fewer, more, samples, confidence) > max_drop

    def more_samples() -> int | None:
        if (losses - gains) / n == max_drop:
            return None
        enough = n
        while not decided(enough):
            enough *= 2
            if enough >= _MOST_SAMPLES:
                return None
        unsettled = enough // 2
        while enough - unsettled > 1:
            middle = (enough + unsettled) // 2
            unsettled, enough = (unsettled, middle) if decided(middle) else (middle, enough)
        return max(1, enough - n)

    lower, above = -upper(gains, losses, n, confidence), upper(losses, gains, n, confidence)
    return _Bounds((losses - gains) / n, lower, above, more_samples, losses, gains)


_EXACT_FORESIGHT = 3000
"""Samples beyond which Tango's bound, which is much faster, foretells the exact one as well as anybody needs."""


def _of_drops(drops: np.ndarray, max_drop: float | None, confidence: float, scores: Range | None, seed: int) -> _Bounds:
    from slimline.measure import betting, paired

    n, observed = len(drops), float(drops.mean())
    if scores is None:
        lower, upper = paired.bootstrap(drops, confidence, seed)
        return _Bounds(observed, lower, upper, lambda: None)
    width = scores[1] - scores[0]
    upper = betting.upper(drops, -width, width, confidence)
    lower = -betting.upper(-drops, -width, width, confidence)

    def more_samples() -> int | None:
        """A bound is as far from the mean as a / sqrt(n) + b / n, where a comes from the spread of the drops."""
        assert max_drop is not None
        gap = abs(max_drop - observed)
        distance = upper - observed if observed < max_drop else observed - lower
        a = float(drops.std()) * math.sqrt(2 * math.log(1 / (1 - confidence)))
        b = max(0.0, (distance - a / math.sqrt(n)) * n)
        if gap <= 0:
            return None
        enough = ((a + math.sqrt(a * a + 4 * b * gap)) / (2 * gap)) ** 2
        return max(1, math.ceil(enough) - n) if enough < _MOST_SAMPLES else None

    return _Bounds(observed, lower, upper, more_samples)


def _verdict(bound: float, lower: float, max_drop: float | None) -> Verdict:
    if max_drop is None:
        return "measured"
    if bound <= max_drop:
        return "certified"
    return "refuted" if lower > max_drop else "inconclusive"
