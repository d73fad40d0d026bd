"""How often certificates are false where the true drop is exactly the budget: simulated, of every kind.

The cases are those of tests/measure/test_certificate_validity.py. Run it in the repository: it needs no other data.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from slimline.measure import environment, paired  # noqa: E402
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=1000, help="certificates of each kind")
    times = parser.parse_args().times
    rows = []
    for case in CASES:
        rates = {str(n): false_rate(case, n, times, seed=2) for n in SIZES}
        rows.append({"case": case, "method": "certificate", "times": times, "false": rates})
        print(case, rates, flush=True)
    for rate in (0.01, 0.003):
        case, fewer = f"heavy losses in {100 * rate:g} %", min(times, 300)
        rates = {str(n): bootstrap_below(rate, n, fewer) for n in SIZES}
        rows.append({"case": case, "method": "bootstrap", "times": fewer, "false": rates})
        print(case, "bootstrap", rates, flush=True)
    path = HERE / "results/certificates.json"
    path.write_text(json.dumps({"environment": environment(1), "rows": rows}, indent=1) + "\n")
    head = ["# certificates", "", "False certificates where the true drop is exactly the budget, in percent; 5 % are"]
    head += ["allowed. The bootstrap gives no verdict: how often its bound is below the true drop.", ""]
    table = [
        "| case | method | drawn | " + " | ".join(f"n = {n:,}" for n in SIZES) + " |",
        "|---" * (3 + len(SIZES)) + "|",
    ]
    for row in rows:
        cells = " | ".join(f"{100 * row['false'][str(n)]:.1f}" for n in SIZES)
        table.append(f"| {row['case']} | {row['method']} | {row['times']:,} | {cells} |")
    path.with_suffix(".md").write_text("\n".join([*head, *table]) + "\n")


if __name__ == "__main__":
    main()
