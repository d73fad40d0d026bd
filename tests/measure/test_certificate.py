"""Verdicts, how many more samples, what people read, and how often the certificate is wrong."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimline.errors import SlimlineError
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
@pytest.mark.parametrize("method", ["tango", "clopper-pearson"])
def test_verdicts(losses, gains, n, verdict, method):
    found = certify(*scores(losses, gains, n), max_drop=0.01, method=method)
    assert (found.verdict, found.losses, found.gains, found.n) == (verdict, losses, gains, n)
    assert found.observed_drop == pytest.approx((losses - gains) / n)
    assert found.lower_bound <= found.observed_drop <= found.bound


def test_without_a_budget():
    found = certify(*scores(60, 40, 10_000), max_drop=None)
    assert found.verdict == "measured" and found.max_drop is None and found.more_samples is None
    assert found.sentence().startswith("Measured: accuracy fell by 0.20 points; the true drop is at most 0.3")


@pytest.mark.parametrize("bound", [paired.tango, paired.clopper_pearson])
@pytest.mark.parametrize(("losses", "gains", "n"), [(25, 10, 1000), (8, 2, 1000), (3, 1, 300), (0, 0, 100), (1, 2, 90)])
def test_more_samples_by_exhaustive_search(losses, gains, n, bound):
    def settled(size):
        more, fewer = losses * size / n, gains * size / n
        return bound(more, fewer, size, 0.95) <= 0.01 or -bound(fewer, more, size, 0.95) > 0.01

    method = "tango" if bound is paired.tango else "clopper-pearson"
    found = certify(*scores(losses, gains, n), max_drop=0.01, method=method)
    assert found.verdict == "inconclusive"
    assert n + found.more_samples == next(size for size in range(n, 50_000) if settled(size))


def test_zero_discordance_needs_the_closed_form():
    """z²/(n + z²) <= 0.01 from n = 268 on."""
    found = certify(*scores(0, 0, 100), max_drop=0.01)
    assert found.more_samples == 268 - 100
    assert certify(*scores(0, 0, 268), max_drop=0.01).verdict == "certified"
    assert certify(*scores(0, 0, 267), max_drop=0.01).verdict == "inconclusive"


def test_hopeless_says_so():
    found = certify(*scores(150, 50, 10_000), max_drop=0.01)
    assert found.verdict == "inconclusive" and found.more_samples is None
    assert "no number of samples would settle it" in found.sentence()


def test_sentences():
    good = certify(*scores(60, 40, 10_000), max_drop=0.01)
    assert good.sentence() == (
        "Certified: accuracy fell by 0.20 points; the true drop is at most 0.37 points with 95 % confidence, "
        "within the budget of 1.00 points (10,000 samples, Tango score interval)."
    )
    bad = certify(*scores(400, 100, 10_000), max_drop=0.01)
    assert bad.sentence().startswith("Refuted: accuracy fell by 3.00 points; the true drop is at least 2.6")
    open_ = certify(*scores(130, 40, 10_000), max_drop=0.01)
    assert f"about {open_.more_samples:,} more samples would settle it" in open_.sentence()


def test_a_gain_reads_as_a_rise():
    assert "accuracy rose by 0.20 points" in certify(*scores(40, 60, 10_000), max_drop=0.01).sentence()
    assert "the true rise is at least 0.04 points" in certify(*scores(40, 60, 10_000), max_drop=0.01).sentence()
    assert "accuracy did not change" in certify(*scores(40, 40, 10_000), max_drop=0.01).sentence()


def test_real_scores_are_bootstrapped():
    rng = np.random.default_rng(0)
    original = rng.normal(0, 1, 2000)
    compressed = original - rng.normal(0.02, 0.1, 2000)
    found = certify(original, compressed, max_drop=0.05, metric="closeness")
    assert (found.method, found.verdict, found.losses) == ("bootstrap", "certified", None)
    assert found == certify(original, compressed, max_drop=0.05, metric="closeness")
    # The mean's normal interval is right for so many samples.
    drops = original - compressed
    assert found.bound == pytest.approx(drops.mean() + 1.645 * drops.std() / 2000**0.5, abs=5e-4)
    assert "closeness fell by 0.0" in found.sentence()


def test_bootstrap_more_samples():
    rng = np.random.default_rng(1)
    drops = rng.normal(0, 1, 100)
    drops += 0.02 - drops.mean()
    found = certify(drops, np.zeros(100), max_drop=0.05, metric="m")
    # 1.645 * sd / sqrt(n) = 0.03
    assert found.verdict == "inconclusive"
    assert found.n + found.more_samples == pytest.approx((1.645 * drops.std() / 0.03) ** 2, rel=0.15)


def test_a_few_real_scores_give_no_verdict():
    found = certify(np.full(5, 0.5), np.full(5, 0.5), max_drop=0.1, metric="m")
    assert found.verdict == "inconclusive" and found.more_samples == 25
    assert certify(np.full(30, 0.5), np.full(30, 0.5), max_drop=0.1, metric="m").verdict == "certified"


def test_methods_agree_on_large_samples():
    pair = scores(300, 200, 10_000)
    tango, exact, resampled = (
        certify(*pair, max_drop=0.02, method=m).bound for m in ("tango", "clopper-pearson", "bootstrap")
    )
    assert tango == pytest.approx(resampled, abs=3e-4)
    assert tango < exact < tango + 0.003


@pytest.mark.parametrize("drop", [0.0101, 0.02])
def test_a_false_certificate_is_rare(drop):
    """True drop just over the budget: at most 5 % of the certificates may say otherwise."""
    rng = np.random.default_rng(0)
    draws = rng.multinomial(5000, [drop + 0.005, 0.005, 1 - drop - 0.01], 600)
    for method in ("tango", "clopper-pearson"):
        wrong = [certify(*scores(b, c, 5000), max_drop=0.01, method=method).verdict == "certified" for b, c, _ in draws]
        assert np.mean(wrong) <= 0.05 + 4 * (0.05 * 0.95 / 600) ** 0.5


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
    ],
)
def test_mistakes_are_one_sentence(call, said):
    with pytest.raises(SlimlineError, match=said) as caught:
        call()
    assert "\n" not in str(caught.value)
