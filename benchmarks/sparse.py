"""Fashion-MNIST ResNet: single weights removed, without training and with; all sparsities are of all weights.

    python benchmarks/sparse.py [--quick] [--train]

Without training everything sees the same 512 unlabelled calibration images and has its batch norms re-estimated on
them: magnitude (global), SparseGPT-style (every layer alike, blocks of 128 columns), and slimline's exact OBS (global,
layer by layer). With ``--train`` also the cubic schedule to 90 % during six epochs of distillation, the epochs of
`fashion_torch`. Accuracy is that of the model in PyTorch on the test images: zeros change no latency on ONNX Runtime
(see `zeros`).
"""

from __future__ import annotations

import argparse
import logging
import time
from typing import Any

import numpy as np
from common import MAX_DROP, Row, fashion, log, write
from fashion_torch import CASE, RECOVERY, original

import slimline as sl
from slimline.data.proof import Proof
from slimline.recipe import Step


def recipes(amount: float) -> list[tuple[str, str, list[Step]]]:
    """Tool, recipe and steps, none of which trains."""
    block = sl.SparsePruning(amount=amount, criterion="obs", compensate=True, exact=0)
    exact = sl.SparsePruning(amount=amount, criterion="obs", compensate=True, scope="global")
    percent = f"{100 * amount:.0f} %"
    return [
        ("magnitude", f"{percent}, global", [sl.SparsePruning(amount=amount, scope="global")]),
        ("SparseGPT-style", f"{percent}, uniform", [block]),
        ("slimline", f"{percent}, exact OBS, global", [exact]),
    ]


def trained(amount: float, recovery: sl.Distillation) -> list[tuple[str, str, list[Step]]]:
    """The same while training."""
    step = sl.SparsePruning(amount=amount, scope="erk", schedule="polynomial", end=0.7)
    return [("slimline", f"{100 * amount:.0f} %, cubic, ERK, {recovery.epochs} epochs", [step, recovery])]


def answers(model: sl.Model, x: np.ndarray) -> np.ndarray:
    """Outputs, a few hundred images at a time."""
    return np.concatenate([model.predict(x[i : i + 500]) for i in range(0, len(x), 500)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images; results go to .cache/quick")
    parser.add_argument("--train", action="store_true", help="also 90 %% with gradual training")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)8d ms  %(message)s")
    data = fashion(channels_last=False, quick=args.quick)
    test = data.split("certification")
    model = sl.load(original(), test.inputs[0][:2])
    right = answers(model, test.inputs[0]).argmax(1) == test.labels
    rows = [Row(CASE, "original", "none", accuracy=float(right.mean()))]
    entries = [entry for amount in (0.5, 0.7) for entry in recipes(amount)]
    if args.train:
        entries += trained(0.9, RECOVERY.model_copy(update={"epochs": 1}) if args.quick else RECOVERY)
    for tool, name, steps in entries:
        start = time.perf_counter()
        pruned = sl.apply(model, steps, data)
        seconds = time.perf_counter() - start
        rows.append(_row(tool, name, pruned, right, test, data.proof(), seconds))
        log.info("%s, %s: %.2f %% in %.0f s", tool, name, 100 * (rows[-1].accuracy or 0), seconds)
    write("sparse", rows, args.quick)


def _row(tool: str, name: str, pruned: sl.Model, right: np.ndarray, test: Any, proof: Proof, seconds: float) -> Row:
    right_pruned = answers(pruned, test.inputs[0]).argmax(1) == test.labels
    certificate = proof.certify(right, right_pruned, MAX_DROP, metric="accuracy", score_range="known")
    return Row(
        CASE,
        tool,
        name,
        accuracy=float(right_pruned.mean()),
        drop=certificate.observed_drop,
        bound=certificate.bound,
        seconds_to_compress=seconds,
    )


if __name__ == "__main__":
    main()
