"""Fashion-MNIST: a student 9× smaller than its teacher learns by every loss, beside plain training, three seeds.

    python benchmarks/distillation.py [--quick] [--fresh] [plain | kl | dkd | …]

The teacher is the ResNet 32-64-128 of the other benchmarks; the student has half of its widths and one block a stage,
and begins with random weights of the seed. Every student is trained for as many epochs with the same optimizer, samples
and augmentation, but the patient one, which sees mixed images without labels for four times as long. Accuracy is that
of the model on the test images.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from common import Row, cached, fashion, log, options, write
from fashion_torch import RECOVERY, original

import slimline as sl
from slimline.zoo.torch import ResidualCNN

CASE = "Fashion-MNIST, ResNet 16-32-64 of one block a stage, taught by ResNet 32-64-128 of two"
SEEDS = (0, 1, 2)
EPOCHS, PATIENCE = 6, 4


def recipes(epochs: int) -> dict[str, sl.Distillation]:
    """By name."""

    def step(**fields: Any) -> sl.Distillation:
        return sl.Distillation.model_validate({**RECOVERY.model_dump(), "epochs": epochs, **fields})

    return {
        "plain": step(alpha=0.0),
        "kl": step(),
        "logit-standard": step(loss="logit-standard", temperature=2.0),
        "dkd": step(loss="dkd", alpha=0.5),
        "dist": step(loss="dist", alpha=2 / 3, temperature=1.0),
        "mse": step(loss="mse"),
        "hint": step(features=["hint"]),
        "attention": step(features=["attention"]),
        "similarity": step(features=["similarity"]),
        "rkd": step(features=["rkd"]),
        "crd": step(features=["crd"]),
        "patient": step(alpha=1.0, epochs=PATIENCE * epochs, view=sl.View(mixup=1.0)),
    }


def student(seed: int, data: sl.Data) -> sl.Model:
    """With random weights."""
    torch.manual_seed(seed)
    return sl.load(ResidualCNN((16, 32, 64), 1).eval(), (data.split("calibration").inputs[0][:2],))


def accuracy(model: sl.Model, data: sl.Data) -> float:
    """On the test images."""
    test = data.split("certification")
    right = [model.predict(*inputs).argmax(1) == labels for inputs, labels in test.batches(1000)]
    return float(sum(map(sum, right)) / len(test))


def summary(rows: list[Row]) -> str:
    """Over the seeds: accuracy, the part of what plain training leaves to the teacher that is closed, and the time."""
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row.recipe.partition(", seed")[0], []).append(row)
    mean = {name: statistics.mean(r.accuracy or 0 for r in own) for name, own in by_name.items()}
    times = {name: [r.seconds_to_compress for r in own if r.seconds_to_compress] for name, own in by_name.items()}
    seconds = {name: statistics.mean(every) for name, every in times.items() if every}
    lines = [
        "## Over the seeds (mean, least to most)\n",
        "| loss | accuracy | of the gap closed | time, of kl's |\n|---|---|---|---|",
    ]
    for name, own in by_name.items():
        scores = [100 * (r.accuracy or 0) for r in own]
        closed = "–"
        if {"plain", "teacher"} <= mean.keys() and name not in ("plain", "teacher"):
            closed = f"{100 * (mean[name] - mean['plain']) / (mean['teacher'] - mean['plain']):.0f} %"
        time = f"{seconds[name] / seconds['kl']:.2f}" if name in seconds and "kl" in seconds else "–"
        spread = f"{100 * mean[name]:.2f} ({min(scores):.2f} to {max(scores):.2f})"
        lines.append(f"| {name} | {spread} | {closed} | {time} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    args = options(__doc__, tuple(recipes(EPOCHS)))
    steps = recipes(1 if args.quick else EPOCHS)
    data = fashion(channels_last=False, quick=args.quick)
    teacher = sl.load(original(), (data.split("calibration").inputs[0][:2],))
    rows = [Row(CASE, "original", "teacher", accuracy=accuracy(teacher, data))]
    for seed in SEEDS[:1] if args.quick else SEEDS:
        for name, step in steps.items():
            if args.names and name not in args.names:
                continue

            def train(artifact: Path, _: Path, step: Any = step, seed: int = seed) -> None:
                sl.apply(student(seed, data), step, data, teacher=teacher, seed=seed).save(artifact)

            facts = {"step": step.model_dump(mode="json"), "seed": seed, "quick": args.quick}
            entry = cached("slimline", f"distil {name}, seed {seed}", ".pt2", facts, train, args.fresh)
            score = accuracy(sl.load(entry.artifact), data)
            recipe = f"{name}, seed {seed}"
            rows.append(Row(CASE, "slimline", recipe, accuracy=score, seconds_to_compress=entry.seconds))
            log.info("%s, seed %d: %.2f %%", name, seed, 100 * score)
    page = write("distillation", rows, args.quick)
    page.write_text(page.read_text() + "\n" + summary(rows))
    print(summary(rows))


if __name__ == "__main__":
    main()
