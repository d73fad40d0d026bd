"""How often certificates are false where the true drop is exactly the budget: at most as often as they say.

Each case draws samples, asks for a certificate of the true drop, and counts those that certify it. (A drop equal to the
budget is the worst case: any larger one is certified less often.)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import multinomial

from slimline.measure import certify, exact, paired

Draw = Callable[[np.random.Generator, int], dict]
RISK = 0.05


def binary(drop: float, gain: float) -> tuple[float, Draw]:
    """0/1 scores that are lost in ``drop + gain`` of the samples and won in ``gain``."""

    def draw(rng: np.random.Generator, n: int) -> dict:
        kind = rng.choice(3, n, p=[drop + gain, gain, 1 - drop - 2 * gain])
        return {"scores": ((kind != 1), (kind != 0)), "metric": "accuracy"}

    return drop, draw


def heavy(rate: float, noise: float = 0.0) -> tuple[float, Draw]:
    """Scores in [0, 1] that fall to 0 in a `rate` of the samples, and else differ by noise around nothing."""

    def draw(rng: np.random.Generator, n: int) -> dict:
        before = 0.8 + rng.uniform(-0.1, 0.1, n)
        after = before + rng.uniform(-noise, noise, n)
        return {"scores": (before, np.where(rng.random(n) < rate, 0.0, after)), "metric": "iou", "score_range": (0, 1)}

    return rate * 0.8, draw


def grouped(rate: float) -> tuple[float, Draw]:
    """Groups of one to thirty samples, all of whose scores are lost together, for a `rate` of the groups."""

    def draw(rng: np.random.Generator, n: int) -> dict:
        groups = np.repeat(np.arange(n), rng.integers(1, 31, n))
        lost = rng.random(n) < rate
        right = rng.random(len(groups)) < 0.9
        return {"scores": (right, right & ~lost[groups]), "metric": "accuracy", "groups": groups}

    return rate * 0.9, draw


CASES = {
    "accuracy, 1 point, no gains": binary(0.01, 0.0),
    "accuracy, 1 point, few gains": binary(0.01, 0.003),
    "accuracy, 5 points": binary(0.05, 0.03),
    "accuracy, no drop": binary(0.0, 0.02),
    "heavy losses in 1 %": heavy(0.01),
    "heavy losses in 0.3 %": heavy(0.003),
    "heavy losses in 1 %, noise": heavy(0.01, 0.05),
    "heavy losses in 20 %": heavy(0.2, 0.1),
    "groups lost in 5 %": grouped(0.05),
    "groups lost in 0.3 %": grouped(0.003),
}
SIZES = (50, 200, 1000)


def false_rate(case: str, n: int, times: int, seed: int) -> float:
    drop, draw = CASES[case]
    rng = np.random.default_rng((seed, n, list(CASES).index(case)))
    wrong = 0
    for _ in range(times):
        drawn = draw(rng, n)
        wrong += certify(*drawn.pop("scores"), drop, **drawn).verdict == "certified"
    return wrong / times


def allowed(times: int) -> float:
    """The risk and three standard deviations of its simulation."""
    return RISK + 3 * (RISK * (1 - RISK) / times) ** 0.5


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_false_certificates_are_rare(case: str, n: int) -> None:
    assert false_rate(case, n, 40, seed=1) <= allowed(40)


@pytest.mark.slow
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_false_certificates_are_rare_in_a_thousand(case: str, n: int) -> None:
    assert false_rate(case, n, 1000, seed=2) <= allowed(1000)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("rate", [0.01, 0.003])
def test_without_a_range_nothing_is_certified(rate: float, n: int) -> None:
    """The bootstrap is below the true drop most of the time here, so its bound is no certificate."""
    drop, draw = heavy(rate)
    rng = np.random.default_rng(n)
    for _ in range(4):
        (before, after) = draw(rng, n)["scores"]
        assert certify(before, after, drop, metric="iou").verdict == "measured"
        assert certify(before, after, 1.0, metric="iou").verdict == "measured"


@pytest.mark.parametrize("case", ["accuracy, 1 point, few gains", "heavy losses in 1 %", "groups lost in 5 %"])
def test_a_drop_that_is_far_over_the_budget_is_refuted_and_never_by_chance(case: str) -> None:
    drop, draw = CASES[case]
    rng = np.random.default_rng(5)
    drawn = [draw(rng, 200) for _ in range(60)]
    verdicts = [certify(*d.pop("scores"), drop, **d).verdict for d in drawn]
    assert verdicts.count("refuted") / 60 <= allowed(60)


@pytest.mark.parametrize(("n", "drop"), [(20, 0.1), (50, 0.05), (60, 0.03)])
@pytest.mark.parametrize("gain", [0.0, 0.01, 0.1, 0.3])
def test_the_exact_bound_by_enumeration(n: int, drop: float, gain: float) -> None:
    """Every outcome of `n` samples with its probability: no simulation, no noise."""
    law = multinomial(n, [gain + drop, gain, 1 - 2 * gain - drop])
    outcomes = [(b, c) for c in range(n + 1) for b in range(n + 1 - c)]
    chances = law.pmf([[b, c, n - b - c] for b, c in outcomes])
    wrong = sum(
        chance
        for (b, c), chance in zip(outcomes, chances, strict=True)
        if chance > 1e-9 and exact.rejects(b, c, n, 1 - RISK, drop)
    )
    assert wrong <= RISK


def test_tangos_interval_is_why_there_is_an_exact_one() -> None:
    """268 samples without a loss, which a true drop of one point gives in 6.8 % of cases."""
    assert paired.tango(0, 0, 268, 0.95) <= 0.01
    assert RISK < 0.99**268
    assert not exact.rejects(0, 0, 268, 0.95, 0.01)


def test_choosing_among_many_models_on_the_same_samples_is_paid_for() -> None:
    """Twenty models, each with a drop of exactly the budget, tried one after the other until one is certified."""
    rng, times, n, drop = np.random.default_rng(0), 100, 200, 0.03
    wrong = 0
    for _ in range(times):
        losses = rng.binomial(n, drop, 20)
        wrong += any(exact.rejects(int(b), 0, n, 1 - certify_risk(k + 1), drop) for k, b in enumerate(losses))
    assert wrong / times <= allowed(times)


def certify_risk(use: int) -> float:
    from slimline.measure.certificate import share

    return RISK * share(use)
