"""The bounds against published figures, brute force and simulated coverage."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest, multinomial
from scipy.stats import bootstrap as scipy_bootstrap

from slimline.measure import exact, paired


def interval(losses, gains, n, level, bound=paired.tango):
    one_sided = (1 + level) / 2
    return -bound(gains, losses, n, one_sided), bound(losses, gains, n, one_sided)


@pytest.mark.parametrize(
    ("losses", "gains", "n", "low", "high"),
    [
        # Fagerland, Lydersen and Laake, Statistical Analysis of Contingency Tables, ch. 8: Cavo et al. 2012.
        (6, 16, 161, -0.1240, -0.0054),
        # The same authors, Statistics in Medicine 33 (2014), table of intervals: Bentur et al. 2009.
        (1, 7, 21, -0.517, -0.026),
    ],
)
def test_tango_published(losses, gains, n, low, high):
    found = interval(losses, gains, n, 0.95)
    digits = 4 if n == 161 else 3
    assert tuple(round(x, digits) for x in found) == (low, high)


def score_statistic(losses, gains, n, delta):
    """Tango's statistic with the nuisance found by numeric maximisation of the multinomial likelihood."""

    def minus_log_likelihood(gain):
        cells = [(losses, gain + delta), (gains, gain), (n - losses - gains, 1 - 2 * gain - delta)]
        return -sum(k * np.log(p) if k else 0.0 for k, p in cells)

    low, high = max(0.0, -delta) + 1e-12, (1 - delta) / 2 - 1e-12
    gain = minimize_scalar(minus_log_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return (losses - gains - n * delta) / np.sqrt(n * (2 * gain + delta - delta**2))


@pytest.mark.parametrize(
    ("losses", "gains", "n"), [(6, 16, 161), (3, 0, 40), (0, 3, 40), (10, 10, 50), (80, 40, 10_000)]
)
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_tango_inverts_the_score_test(losses, gains, n, confidence):
    bound = paired.tango(losses, gains, n, confidence)
    assert score_statistic(losses, gains, n, bound) == pytest.approx(-NormalDist().inv_cdf(confidence), abs=2e-3)


@pytest.mark.parametrize("n", [1, 10, 1000, 10_000])
def test_tango_without_discordance(n):
    z = NormalDist().inv_cdf(0.95)
    assert paired.tango(0, 0, n, 0.95) == pytest.approx(z**2 / (n + z**2), rel=1e-6)


def test_tango_extremes():
    assert paired.tango(5, 0, 5, 0.95) == 1.0
    assert -1 < paired.tango(0, 5, 5, 0.95) < 0


@pytest.mark.parametrize(("losses", "gains", "n"), [(6, 16, 161), (0, 0, 30), (30, 0, 30), (0, 30, 30), (5, 2, 1000)])
def test_clopper_pearson_is_scipys(losses, gains, n):
    lost = binomtest(losses, n).proportion_ci(0.95, "exact").high  # two-sided 95 % is one-sided 97.5 %
    gained = binomtest(gains, n).proportion_ci(0.95, "exact").low
    assert paired.clopper_pearson(losses, gains, n, 0.95) == pytest.approx(lost - gained, abs=1e-9)


def exact_coverage(bound, n, loss, gain, confidence):
    """P(bound >= true drop), summed over every outcome."""
    law = multinomial(n, [loss, gain, 1 - loss - gain])
    return sum(
        law.pmf([b, c, n - b - c])
        for b in range(n + 1)
        for c in range(n + 1 - b)
        if bound(b, c, n, confidence) >= loss - gain - 1e-9
    )


@pytest.mark.parametrize(("loss", "gain"), [(0.05, 0.02), (0.2, 0.1), (0.1, 0.1), (0.02, 0.1), (0.4, 0.3)])
def test_coverage_of_small_samples(loss, gain):
    assert exact_coverage(paired.clopper_pearson, 20, loss, gain, 0.9) >= 0.9
    assert exact_coverage(exact.upper, 20, loss, gain, 0.9) >= 0.9
    # Score intervals hold their level on average, not at every point.
    assert exact_coverage(paired.tango, 20, loss, gain, 0.9) >= 0.85


@pytest.mark.parametrize(("loss", "gain"), [(0.012, 0.006), (0.015, 0.005), (0.03, 0.025), (0.01, 0.0)])
def test_coverage_of_a_test_set(loss, gain):
    """Ten thousand images and a drop near one point: the case of the certificates slimline gives."""
    n, rng = 10_000, np.random.default_rng(0)
    draws = rng.multinomial(n, [loss, gain, 1 - loss - gain], 4000)
    for bound, least in [(paired.tango, 0.94), (paired.clopper_pearson, 0.95)]:
        covered = np.mean([bound(b, c, n, 0.95) >= loss - gain for b, c, _ in draws])
        # Four standard errors of the simulation below the least.
        assert covered >= least - 4 * np.sqrt(least * (1 - least) / len(draws))
    assert np.mean([paired.tango(b, c, n, 0.95) >= loss - gain for b, c, _ in draws]) <= 0.975


counts = st.integers(1, 3000).flatmap(
    lambda n: st.integers(0, n).flatmap(lambda b: st.tuples(st.just(b), st.integers(0, n - b), st.just(n)))
)


@pytest.mark.parametrize("bound", [paired.tango, paired.clopper_pearson, exact.upper])
@settings(max_examples=60, deadline=None)
@given(counts, st.floats(0.6, 0.999))
def test_bounds_are_monotone(bound, table, confidence):
    b, c, n = table
    here = bound(b, c, n, confidence)
    assert (b - c) / n - 1e-9 <= here <= 1
    assert bound(b, c, n, confidence + (1 - confidence) / 2) >= here - 1e-9
    if b + c < n:
        assert bound(b + 1, c, n, confidence) >= here - 1e-9
        assert bound(b, c + 1, n, confidence) <= here + 1e-9
    assert -bound(c, b, n, confidence) <= (b - c) / n + 1e-9


def test_bootstrap_is_scipys():
    drops = np.random.default_rng(0).gamma(1.0, 1.0, 60)
    low, high = paired.bootstrap(drops, 0.95, seed=1)
    theirs = scipy_bootstrap((drops,), np.mean, confidence_level=0.9, method="BCa", n_resamples=9999, random_state=2)
    interval = theirs.confidence_interval
    assert (low, high) == pytest.approx((interval.low, interval.high), abs=0.02)
    assert paired.bootstrap(drops, 0.95, seed=1) == (low, high)


def test_bootstrap_of_equal_drops():
    assert paired.bootstrap(np.full(40, 0.3), 0.95, seed=0) == pytest.approx((0.3, 0.3))


def test_bootstrap_chunks_give_all_resamples():
    drops = np.random.default_rng(3).normal(0.1, 1.0, 5000)
    low, high = paired.bootstrap(drops, 0.95, seed=0)
    error = drops.std() / np.sqrt(len(drops)) * NormalDist().inv_cdf(0.95)
    assert (low, high) == pytest.approx((drops.mean() - error, drops.mean() + error), abs=0.1 * error)


def test_bootstrap_coverage():
    rng = np.random.default_rng(5)
    covered = [paired.bootstrap(rng.exponential(1.0, 80) - 1.0, 0.9, seed=i, resamples=500)[1] >= 0 for i in range(500)]
    assert 0.85 <= np.mean(covered) <= 0.95


def test_exact_coverage_oracle_itself():
    """The enumeration sums to one and falls short for a bound known to be too low."""
    assert exact_coverage(lambda *_: 1.0, 20, 0.2, 0.1, 0.9) == pytest.approx(1.0)
    short = exact_coverage(lambda b, c, n, _: (b - c) / n, 20, 0.2, 0.1, 0.9)
    assert short < 0.7


@pytest.mark.parametrize(
    ("losses", "gains", "n"),
    [(0, 1, 1), (0, 5, 5), (5, 0, 5), (1, 4, 5), (0, 0, 299), (3, 1, 300), (100, 63, 10_000), (0, 300, 10_000)],
)
def test_the_exact_bound_and_the_exact_test_agree(losses, gains, n):
    bound = exact.upper(losses, gains, n, 0.95)
    assert not exact.rejects(losses, gains, n, 0.95, bound - 1e-6)
    assert bound == 1 or exact.rejects(losses, gains, n, 0.95, bound + 1e-6)


def test_the_exact_bound_by_hand():
    """All that can be seen of n samples without a loss is (1 - drop)^n; of n gains, the probability of a gain."""
    assert exact.upper(0, 0, 100, 0.95) == pytest.approx(1 - 0.05 ** (1 / 100), rel=1e-3)
    gain = 0.05 ** (1 / 5)
    assert exact.upper(0, 5, 5, 0.95) == pytest.approx(1 - 2 * gain, abs=1e-3)


def test_the_exact_bound_is_as_tight_as_tangos_on_a_test_set():
    for losses, gains in [(100, 63), (60, 40), (300, 200)]:
        drop = (losses - gains) / 10_000
        wide, usual = (f(losses, gains, 10_000, 0.95) - drop for f in (exact.upper, paired.tango))
        assert wide == pytest.approx(usual, rel=0.02)
