"""How often certificates are false where the true drop is exactly the budget: simulated, of every kind.

The cases are those of tests/measure/test_certificate_validity.py. Run it in the repository: it needs no other data.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from slimline.measure import environment, paired  # noqa: E402
from slimline.measure.named_metrics import auc, f1_macro, pearson  # noqa: E402
from slimline.measure.set_certificate import certify_set  # noqa: E402
from slimline.measure.set_metrics import SetScores  # noqa: E402
from tests.measure.test_certificate_validity import CASES, RISK, SIZES, false_rate, heavy  # noqa: E402


def bootstrap_below(rate: float, n: int, times: int) -> float:
    """How often the bound of the BCa bootstrap, which gives no verdict, is below the true drop."""
    drop, draw = heavy(rate)
    rng = np.random.default_rng((7, n, round(1000 * rate)))
    below = 0
    for seed in range(times):
        before, after = draw(rng, n)["scores"]
        below += paired.bootstrap(before - after, 1 - RISK, seed)[1] <= drop
    return below / times


Pairs = tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def rare_class(rng: np.random.Generator, n: int) -> Pairs:
    """Predictions and labels of both models: of a class that is in 10 % of the samples, 5 % are lost."""
    labels = (rng.random(n) < 0.1).astype(int)
    before = np.where(rng.random(n) < 0.95, labels, 1 - labels)
    after = np.where((labels == 1) & (rng.random(n) < 0.05), 0, before)
    return (before, labels), (after, labels)


def misranked(rng: np.random.Generator, n: int) -> Pairs:
    """Scores and truth of both models: 10 % are positive, and 1 % of all get the lowest score."""
    truth = rng.random((n, 1)) < 0.1
    before = 2.0 * truth + rng.standard_normal((n, 1))
    return (before, truth), (np.where(rng.random((n, 1)) < 0.01, -10.0, before), truth)


def outliers(rng: np.random.Generator, n: int) -> Pairs:
    """Outputs and labels of both models: 1 % of the outputs are ten times too far off."""
    labels = rng.standard_normal((n, 1))
    before = labels + 0.5 * rng.standard_normal((n, 1))
    after = before + np.where(rng.random((n, 1)) < 0.01, 5.0 * rng.standard_normal((n, 1)), 0.0)
    return (before, labels), (after, labels)


SET_CASES: dict[str, tuple[Callable[..., float], Callable[[np.random.Generator, int], Pairs]]] = {
    "F1, a class of 10 %, of which 5 % are lost": (f1_macro, rare_class),
    "AUC, 10 % positive, 1 % ranked last": (auc, misranked),
    "correlation, 1 % outliers": (pearson, outliers),
}


def set_bootstrap_below(case: str, n: int, times: int) -> float:
    """How often the bound of a metric over the whole set is below the true drop, or there is none."""
    function, draw = SET_CASES[case]
    rng = np.random.default_rng((11, n, list(SET_CASES).index(case)))
    before, after = draw(np.random.default_rng(5), 1_000_000)
    drop = function(*before) - function(*after)
    below = 0
    for seed in range(times):
        pairs = draw(rng, n)
        while case.startswith("AUC") and not pairs[0][1].any():  # no positive sample, no metric
            pairs = draw(rng, n)
        original, compressed = (SetScores(function, case, *pair) for pair in pairs)
        below += certify_set(original, compressed, drop, 1 - RISK, seed=seed, resamples=500).bound <= drop
    return below / times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=1000, help="certificates of each kind")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the results hold already")
    args = parser.parse_args()
    path = HERE / "results/certificates.json"
    held = json.loads(path.read_text())["rows"] if args.resume else []
    rows = []

    def row(case: str, method: str, times: int, rate: Callable[[int, int], float]) -> None:
        """Draw `times` certificates of every number of samples."""
        measured = [each for each in held if (each["case"], each["method"]) == (case, method)]
        if not measured:
            measured = [
                {"case": case, "method": method, "times": times, "false": {str(n): rate(n, times) for n in SIZES}}
            ]
        rows.extend(measured)
        print(rows[-1], flush=True)

    for case in CASES:
        row(case, "certificate", args.times, functools.partial(false_rate, case, seed=2))
    for rate in (0.01, 0.003):
        case = f"heavy losses in {100 * rate:g} %"
        row(case, "bootstrap", min(args.times, 300), functools.partial(bootstrap_below, rate))
    for case in SET_CASES:
        row(case, "set bootstrap", min(args.times, 100), functools.partial(set_bootstrap_below, case))
    path.write_text(json.dumps({"environment": environment(1), "rows": rows}, indent=1) + "\n")
    head = ["# certificates", "", "False certificates where the true drop is exactly the budget, in percent; 5 % are"]
    head += ["allowed. A bootstrap gives no verdict: how often its bound is not above the true drop.", ""]
    table = [
        "| case | method | drawn | " + " | ".join(f"n = {n:,}" for n in SIZES) + " |",
        "|---" * (3 + len(SIZES)) + "|",
    ]
    for each in rows:
        cells = " | ".join(f"{100 * each['false'][str(n)]:.1f}" for n in SIZES)
        table.append(f"| {each['case']} | {each['method']} | {each['times']:,} | {cells} |")
    path.with_suffix(".md").write_text("\n".join([*head, *table]) + "\n")


if __name__ == "__main__":
    main()
