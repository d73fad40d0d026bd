"""Verdicts, how many more samples, what people read, and how often the certificate is wrong."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimline.basics.errors import SlimlineError
from slimline.measure import Certificate, certify, paired


def scores(losses, gains, n):
    original, compressed = np.ones(n), np.ones(n)
    compressed[:losses] = 0
    original[losses : losses + gains] = 0
    return original, compressed


@pytest.mark.parametrize(
    ("losses", "gains", "n", "verdict"),
    [
        (60, 40, 10_000, "certified"),
        (0, 0, 10_000, "certified"),
        (0, 300, 10_000, "certified"),
        (400, 100, 10_000, "refuted"),
        (130, 40, 10_000, "inconclusive"),
        (110, 0, 10_000, "inconclusive"),
        (0, 0, 100, "inconclusive"),
        (10_000, 0, 10_000, "refuted"),
        (1, 0, 1, "inconclusive"),
        (0, 1, 1, "inconclusive"),
    ],
)
@pytest.mark.parametrize("method", [None, "clopper-pearson", "betting"])
def test_verdicts(losses, gains, n, verdict, method):
    found = certify(*scores(losses, gains, n), max_drop=0.01, method=method)
    counts = (None, None) if method == "betting" else (losses, gains)
    assert (found.verdict, found.losses, found.gains, found.n) == (verdict, *counts, n)
    assert found.observed_drop == pytest.approx((losses - gains) / n)
    assert found.lower_bound <= found.observed_drop <= found.bound


def test_without_a_budget():
    found = certify(*scores(60, 40, 10_000), max_drop=None)
    assert found.verdict == "measured" and found.max_drop is None and found.more_samples is None
    assert found.sentence().startswith("Measured: accuracy fell by 0.20 points; the true drop is at most 0.3")


COUNTS = [(25, 10, 1000), (8, 2, 1000), (3, 1, 300), (0, 0, 100), (1, 2, 90)]


@pytest.mark.parametrize(("losses", "gains", "n"), COUNTS)
def test_more_samples_by_exhaustive_search(losses, gains, n):
    def settled(size):
        more, fewer = losses * size / n, gains * size / n
        bound = paired.clopper_pearson
        return bound(more, fewer, size, 0.95) <= 0.01 or -bound(fewer, more, size, 0.95) > 0.01

    found = certify(*scores(losses, gains, n), max_drop=0.01, method="clopper-pearson")
    assert found.verdict == "inconclusive"
    assert n + found.more_samples == next(size for size in range(n, 50_000) if settled(size))


@pytest.mark.parametrize("method", ["exact", "betting"])
@pytest.mark.parametrize(("losses", "gains", "n"), COUNTS)
def test_more_samples_settle_and_many_fewer_do_not(losses, gains, n, method):
    found = certify(*scores(losses, gains, n), max_drop=0.01, method=method)
    assert found.verdict == "inconclusive"

    def verdict(size):
        return certify(*scores(*(round(c * size / n) for c in (losses, gains)), size), 0.01, method=method).verdict

    assert verdict(n + round(1.3 * found.more_samples)) != "inconclusive"
    assert verdict(n + round(0.7 * found.more_samples)) == "inconclusive"


def test_no_loss_at_all_needs_the_rule_of_three():
    """0.99^n <= 0.05 from n = 299 on, where Tango's interval is content with 268."""
    found = certify(*scores(0, 0, 100), max_drop=0.01)
    assert found.more_samples == 299 - 100
    assert certify(*scores(0, 0, 299), max_drop=0.01).verdict == "certified"
    assert certify(*scores(0, 0, 298), max_drop=0.01).verdict == "inconclusive"


def test_hopeless_says_so():
    found = certify(*scores(150, 50, 10_000), max_drop=0.01)
    assert found.verdict == "inconclusive" and found.more_samples is None
    assert "no number of samples would settle it" in found.sentence()


def test_sentences():
    good = certify(*scores(60, 40, 10_000), max_drop=0.01)
    assert good.sentence() == (
        "Certified: accuracy fell by 0.20 points; the true drop is at most 0.37 points with 95 % confidence, "
        "within the budget of 1.00 points (10,000 samples, exact bound by Buehler)."
    )
    bad = certify(*scores(400, 100, 10_000), max_drop=0.01)
    assert bad.sentence().startswith("Refuted: accuracy fell by 3.00 points; the true drop is at least 2.6")
    open_ = certify(*scores(130, 40, 10_000), max_drop=0.01)
    assert f"about {open_.more_samples:,} more samples would settle it" in open_.sentence()


def test_a_gain_reads_as_a_rise():
    assert "accuracy rose by 0.20 points" in certify(*scores(40, 60, 10_000), max_drop=0.01).sentence()
    assert "the true rise is at least 0.04 points" in certify(*scores(40, 60, 10_000), max_drop=0.01).sentence()
    assert "accuracy did not change" in certify(*scores(40, 40, 10_000), max_drop=0.01).sentence()


def test_real_scores_without_a_range_are_only_measured():
    rng = np.random.default_rng(0)
    original = rng.normal(0, 1, 2000)
    compressed = original - rng.normal(0.02, 0.1, 2000)
    found = certify(original, compressed, max_drop=0.05, metric="closeness")
    assert (found.method, found.verdict, found.losses) == ("bootstrap", "measured", None)
    assert found == certify(original, compressed, max_drop=0.05, metric="closeness")
    # The mean's normal interval is right for so many samples.
    drops = original - compressed
    assert found.bound == pytest.approx(drops.mean() + 1.645 * drops.std() / 2000**0.5, abs=5e-4)
    said = found.sentence()
    assert "closeness fell by 0.0" in said and "roughly at most" in said and "bootstrap, approximate" in said
    assert "does not certify the budget of 0.05: give Data metric_range=(lowest, highest)" in said


def test_zeros_and_ones_of_a_metric_that_may_give_more_are_not_taken_for_binary():
    ones = np.ones(5000)
    assert certify(ones, ones, 0.01, metric="mine").verdict == "measured"
    ranged = certify(ones, ones, 0.01, metric="mine", score_range=(0, 1))
    assert (ranged.method, ranged.verdict) == ("betting", "certified")
    boolean = certify(ones.astype(bool), ones.astype(bool), 0.01, metric="mine")
    assert (boolean.method, boolean.verdict) == ("exact", "certified")
    assert certify(ones, ones, 0.01, metric="accuracy", score_range=None).verdict == "measured"


@pytest.mark.parametrize("method", ["tango", "bootstrap"])
def test_approximate_methods_give_no_verdict(method):
    found = certify(*scores(0, 0, 10_000), max_drop=0.01, method=method)
    assert found.verdict == "measured" and "does not certify" in found.sentence()


def test_a_declared_range_certifies_and_refutes():
    rng = np.random.default_rng(3)
    before, after = rng.uniform(0.6, 0.9, 3000), rng.uniform(0.6, 0.9, 3000)
    good = certify(before, after, 0.05, metric="iou", score_range=(0, 1))
    assert (good.method, good.verdict, good.score_range) == ("betting", "certified", (0, 1))
    assert "betting bound for scores from 0 to 1" in good.sentence()
    bad = certify(before, after - 0.3, 0.05, metric="iou", score_range=(0, 1))
    assert bad.verdict == "refuted" and bad.lower_bound > 0.05
    # The same in another unit.
    scaled = certify(before * 100 - 50, after * 100 - 50, 5, metric="iou", score_range=(-50, 50))
    assert scaled.bound == pytest.approx(100 * good.bound, rel=1e-6)


def test_scores_outside_the_range_are_named():
    with pytest.raises(SlimlineError, match="scores of dB reach 41, outside the range 0 to 40"):
        certify(np.full(9, 41.0), np.full(9, 40.0), 1, metric="dB", score_range=(0, 40))
    assert certify(np.full(9, 1 + 1e-9), np.ones(9), 0.5, metric="m", score_range=(0, 1)).n == 9


def test_groups_count_once():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), rng.integers(1, 30, 40))
    before, after = np.ones(len(groups)), (groups % 10 != 3).astype(float)
    found = certify(before, after, 0.5, groups=groups)
    assert (found.n, found.groups, found.samples) == (40, 40, len(groups))
    assert found.observed_drop == pytest.approx(0.1)
    assert (found.method, found.losses) == ("betting", None)
    assert f"40 groups of {len(groups):,} samples, each group counted once" in found.sentence()
    assert "the mean accuracy of a group fell by 10.00 points" in found.sentence()
    assert found.bound == certify(before, after, 0.5, groups=[f"s{g}" for g in groups]).bound
    alone = certify(before, after, 0.5, groups=np.arange(len(groups)))
    assert alone.method == "exact" and alone.bound == certify(before, after, 0.5).bound


def test_methods_agree_on_large_samples():
    pair = scores(300, 200, 10_000)
    exact, tango, double, resampled, bet = (
        certify(*pair, max_drop=0.02, method=m).bound
        for m in ("exact", "tango", "clopper-pearson", "bootstrap", "betting")
    )
    assert tango == pytest.approx(resampled, abs=3e-4)
    assert tango == pytest.approx(exact, abs=1e-4)
    assert exact < double < exact + 0.003
    assert exact < bet < exact + 0.003


def test_later_certificates_on_the_same_samples_spend_less():
    from slimline.measure.certificate import share

    assert sum(share(k) for k in range(1, 100_000)) == pytest.approx(1, abs=1e-4)
    pair = scores(60, 40, 10_000)
    bounds = [certify(*pair, 0.01, use=k).bound for k in (None, 1, 2, 3, 10)]
    assert bounds == sorted(bounds) and len(set(bounds)) == 5
    later = certify(*pair, 0.01, use=3)
    assert later.risk == pytest.approx(0.05 * 0.2 / 6) and later.confidence == 0.95
    assert "model 3 certified on these samples, which is paid for" in later.sentence()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 5000), st.floats(0, 0.2), st.floats(0, 0.2))
def test_a_larger_budget_never_hurts(losses, gains, both, one, other):
    pair = scores(losses, gains, losses + gains + both + 1)
    rank = {"refuted": 0, "inconclusive": 1, "certified": 2}
    small, large = (certify(*pair, max_drop=m) for m in sorted((one, other)))
    assert rank[small.verdict] <= rank[large.verdict]
    assert Certificate.model_validate_json(small.model_dump_json()) == small


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: certify(np.ones(0), np.ones(0), 0.01), "no samples"),
        (lambda: certify(np.ones(3), np.ones(4), 0.01), "a score per sample"),
        (lambda: certify(np.ones((3, 2)), np.ones((3, 2)), 0.01), "a score per sample"),
        (lambda: certify(np.array([np.nan]), np.ones(1), 0.01), "NaN"),
        (lambda: certify(np.full(3, 0.5), np.ones(3), 0.01, method="tango"), "scores of 0 and 1"),
        (lambda: certify(np.ones(3), np.ones(3), 0.01, confidence=95), "between 0.5 and 1"),
        (lambda: certify(np.ones(3), np.ones(3), 0.01, method="tangoo"), "did you mean 'tango'"),
        (lambda: certify(np.ones(3), np.ones(3), 0.01, confidence=None), "between 0.5 and 1"),
        (lambda: certify(np.ones(3), np.ones(3), np.nan), "give a finite number, or None"),
        (lambda: certify(np.array(["a"]), np.ones(1), 0.01), "must be numbers, not <U1"),
        (lambda: certify(np.ones(3) * 1j, np.ones(3), 0.01), "is complex"),
        (lambda: certify(np.ones(3), np.ones(3), 0.01, seed=-1), "seed is -1"),
        (lambda: certify(np.ones(3), np.ones(3), 0.01, score_range=(1, 0)), "give the lowest and the highest score"),
        (lambda: certify(np.ones(3), np.ones(3), 0.01, score_range=3), "give the lowest and the highest score"),
        (lambda: certify(np.ones(3), np.ones(3), 0.01, score_range=(0, np.inf)), "the lowest and the highest score"),
        (lambda: certify(np.ones(3), np.ones(3), 0.01, groups=np.ones(2)), "give a group per sample"),
        (lambda: certify(np.ones(3) / 2, np.ones(3), 0.01, binary=True), "not all 0 or 1"),
        (lambda: certify(np.ones(3), np.ones(3), 0.01, metric="m", method="betting"), "needs to know the range"),
    ],
)
def test_mistakes_are_one_sentence(call, said):
    with pytest.raises(SlimlineError, match=said) as caught:
        call()
    assert "\n" not in str(caught.value)
