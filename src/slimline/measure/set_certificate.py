"""The drop of a metric over a whole set, by a paired bootstrap over samples or groups of them: no certificate.

No bound of such a metric is known to hold for every distribution and number of samples, and a bootstrap's does not: it
cannot see what did not occur. See docs/certificates.md for how often it is wrong.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np

from slimline.basics.arguments import whole
from slimline.basics.errors import SlimlineError
from slimline.measure import paired
from slimline.measure.certificate import Certificate, check_terms, share
from slimline.measure.set_metrics import SetScores

_BEYOND = 100
"""Resamples that should lie beyond a bound: its level is then known to a tenth of the risk."""
_MOST = 9999
_PARTS = 200
"""Of the units, for the jackknife."""


def certify_set(
    original: SetScores,
    compressed: SetScores,
    max_drop: float | None,
    confidence: float = 0.95,
    *,
    seed: int = 0,
    groups: np.ndarray | None = None,
    copies: int = 0,
    use: int | None = None,
    notes: tuple[str, ...] = (),
    resamples: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Certificate:
    """Measure the drop of a set metric between two models on the same samples, with approximate one-sided bounds.

    Samples are drawn anew with replacement, the same ones for both models, and the drop is computed of each such set;
    the bounds are its bias-corrected and accelerated percentiles (`paired.bca`), accelerated by a jackknife over 200
    parts. The verdict is ``measured`` whatever they are.

    Parameters
    ----------
    original, compressed : of both models, on the same samples.
    max_drop, confidence, copies, use, notes : as of `slimline.measure.certify`.
    groups : ``(n,)``, equal for samples that depend on each other: whole groups are drawn.
    resamples : by default as many as leave 100 beyond a bound, at most 9,999.
    progress : called with the part done, in (0, 1].

    Raises
    ------
    SlimlineError : no samples, or a metric that fails on all of them.
    """
    whole(seed, "seed", 0, 2**63)
    check_terms(len(original), max_drop, confidence)
    risk = (1 - confidence) * (1 if use is None else share(use))
    resamples = min(_MOST, math.ceil(_BEYOND / risk)) if resamples is None else resamples
    observed = original.mean() - compressed.mean()
    units = _units(len(original), groups)
    n = len(original) if units is None else len(units)

    def drop(drawn: np.ndarray) -> float:
        rows = drawn if units is None else np.concatenate([units[unit] for unit in drawn])
        try:
            return original[rows].mean() - compressed[rows].mean()
        except SlimlineError:  # not defined of this set: the area under a curve of one class, say
            return math.nan

    rng = np.random.default_rng(seed)
    drops = np.empty(resamples)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of sets of which the metric is not defined
        parts = np.array_split(rng.permutation(n), min(n, _PARTS)) if n > 1 else []
        without = np.array([drop(np.setdiff1d(np.arange(n), part)) for part in parts])
        for i in range(resamples):
            drops[i] = drop(rng.integers(0, n, n))
            if progress is not None and (i + 1) % 100 == 0:
                progress((i + 1) / resamples)
    undefined = int(np.isnan(drops).sum())
    if undefined:
        notes += (f"{original.name} is not defined of {undefined:,} of {resamples:,} resamples, which are left out.",)
    without = without[~np.isnan(without)]
    influences = without.mean() - without if len(without) else without
    lower, upper = paired.bca(observed, drops[~np.isnan(drops)], influences, 1 - risk)
    return Certificate(
        verdict="measured",
        metric=original.name,
        observed_drop=observed,
        bound=upper,
        lower_bound=lower,
        max_drop=max_drop,
        confidence=confidence,
        n=n,
        method="set bootstrap",
        groups=None if groups is None else n,
        samples=None if groups is None else len(original),
        copies=copies,
        use=use,
        risk=risk,
        notes=notes,
    )


def _units(rows: int, groups: np.ndarray | None) -> list[np.ndarray] | None:
    """Rows of each group, in the order in which groups come; None where there are none."""
    if groups is None:
        return None
    names = np.asarray(groups)
    if names.shape != (rows,):
        raise SlimlineError(f"There are groups of shape {names.shape} for {rows} samples: give a group per sample.")
    place = np.unique(names.astype(str) if names.dtype.kind == "O" else names, return_inverse=True)[1]
    members = np.split(np.argsort(place, kind="stable"), np.cumsum(np.bincount(place))[:-1])
    return sorted(members, key=lambda member: int(member[0]))
