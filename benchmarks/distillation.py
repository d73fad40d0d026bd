"""Fashion-MNIST: a student 8.5× smaller than its teacher learns by every loss, beside plain training.

    python benchmarks/distillation.py [--quick] [--fresh] [plain | kl | dkd | … | "pruned, kl" …]

The teacher is the ResNet 32-64-128 of the other benchmarks; the student is the same at widths 12-20-44, an eighth of
the multiplications. It begins with random weights of the seed, or, where the name says *pruned*, as what optimal brain
surgery leaves of the teacher at these widths. Every student is trained for as many epochs with the same optimizer,
samples and augmentation. Accuracy is that of the model on the test images. What a teacher answers is kept on disk for
the seed's other losses, so times are measured apart, on a few samples and with nothing kept.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import CACHE, Row, cached, fashion, log, options, write
from fashion_torch import distil, original

import slimline as sl
from slimline.training.loop import recover
from slimline.zoo.torch import ResidualCNN

CASE = "Fashion-MNIST, ResNet 12-20-44, taught by ResNet 32-64-128"
WIDTHS = (12, 20, 44)
PRUNING = sl.ChannelPruning(target_macs=0.125, criterion="obs", round_to=4)
SEEDS = (0, 1, 2)
EPOCHS, ROUNDS = 4, 1
COMPILED, LOOP = "kl, compiled", "kl, a plain loop of PyTorch"


def recipes(epochs: int) -> dict[str, sl.Distillation]:
    """By name."""

    def step(**fields: Any) -> sl.Distillation:
        shared = {"epochs": epochs, "batch_size": 128, "learning_rate": 4e-3, "precision": "bfloat16", "compiled": True}
        return sl.Distillation.model_validate({**shared, **fields})

    return {
        "plain": step(alpha=0.0),
        "kl": step(),
        "logit-standard": step(loss="logit-standard", temperature=2.0),
        "dkd": step(loss="dkd", alpha=0.5),
        "dist": step(loss="dist", alpha=2 / 3, temperature=1.0),
        "mse": step(loss="mse"),
        "hint": step(features=["hint"]),
        "attention": step(features=["attention"]),
        "fsp": step(features=["fsp"]),
        "similarity": step(features=["similarity"]),
        "rkd": step(features=["rkd"]),
        "crd": step(features=["crd"]),
        "review": step(features=["review"]),
        "simkd": step(features=["simkd"], output_weights={"0": 0}),
        "pruned, plain": step(alpha=0.0),
        "pruned, kl": step(),
        "pruned, dkd": step(loss="dkd", alpha=0.5),
    }


def student(name: str, seed: int, teacher: sl.Model, data: sl.Data) -> sl.Model:
    """With random weights, or with what pruning leaves of the teacher's."""
    if name.startswith("pruned"):
        return sl.apply(teacher, PRUNING, data, seed=seed)
    torch.manual_seed(seed)
    return sl.load(ResidualCNN(WIDTHS).eval(), teacher.example)


def teaching(name: str, step: sl.Distillation) -> list[Any]:
    """The steps; a student of SimKD ends as its teacher does."""
    return [sl.TeacherHead(), step] if name == "simkd" else [step]


def seconds(steps: dict[str, sl.Distillation], teacher: sl.Model) -> dict[str, float]:
    """By name those of an epoch of a few thousand samples, the least of several: of every loss without compilation, and
    of the plain one of Hinton et al. compiled, and in a plain loop of PyTorch, channels last and in bfloat16 too."""
    few = fashion(channels_last=False, quick=True)
    every = {name: step.model_copy(update={"epochs": 3, "compiled": False}) for name, step in steps.items()}
    plain = every["kl"]
    every[COMPILED] = plain.model_copy(update={"compiled": True})
    times: dict[str, list[float]] = {name: [] for name in (*every, LOOP)}
    for _ in range(ROUNDS):
        for name, step in every.items():
            start = student("random", 0, teacher, few)
            if len(teaching(name, step)) > 1:  # nothing but the training is timed
                first = step.model_copy(update={"epochs": 1})
                start = sl.apply(start, teaching(name, first), few, teacher=teacher, seed=0)
            records = recover(start, teacher, step, few, seed=0).records
            times[name] += [record["seconds"] for record in records[2:]]  # the first compiles
        both = []
        for epochs in (1, 3):
            begin = time.perf_counter()
            distil(ResidualCNN(WIDTHS), few, plain.model_copy(update={"epochs": epochs}))
            both.append(time.perf_counter() - begin)
        times[LOOP].append((both[1] - both[0]) / 2)
    return {name: min(each) for name, each in times.items()}


def accuracy(model: sl.Model, data: sl.Data) -> float:
    """On the test images."""
    test = data.split("certification")
    right = [model.predict(*inputs).argmax(1) == labels for inputs, labels in test.batches(1000)]
    return float(sum(map(sum, right)) / len(test))


def summary(rows: list[Row], times: dict[str, float]) -> str:
    """Over the seeds: accuracy, the part of what plain training leaves to the teacher that is closed, and the time."""
    by_name: dict[str, list[float]] = {}
    for row in rows:
        by_name.setdefault(row.recipe.rpartition(", seed")[0] or row.recipe, []).append(100 * (row.accuracy or 0))
    mean = {name: statistics.mean(scores) for name, scores in by_name.items()}
    lines = [
        "## Over the seeds (mean, least to most)\n",
        "| loss | seeds | accuracy | of the gap closed | time of an epoch, of kl's |\n|---|---|---|---|---|",
    ]
    for name, scores in by_name.items():
        closed = "–"
        if "plain" in mean and name not in ("plain", "teacher"):
            closed = f"{100 * (mean[name] - mean['plain']) / (mean['teacher'] - mean['plain']):.0f} %"
        spread = f"{mean[name]:.2f} ({min(scores):.2f} to {max(scores):.2f})"
        step = name.removeprefix("pruned, ")
        time_of = f"{times[step] / times['kl']:.2f}" if step in times else "–"
        lines.append(f"| {name} | {len(scores)} | {spread} | {closed} | {time_of} |")
    lines += [f"| {name} | – | – | – | {times[name] / times['kl']:.2f} |" for name in (COMPILED, LOOP) if name in times]
    return "\n".join(lines) + "\n"


def main() -> None:
    args = options(__doc__, tuple(recipes(EPOCHS)))
    steps = recipes(1 if args.quick else EPOCHS)
    steps = {name: step for name, step in steps.items() if name in (args.names or steps)}
    data = fashion(channels_last=False, quick=args.quick)
    teacher = sl.load(original(), (data.split("calibration").inputs[0][:2],))
    rows = [Row(CASE, "original", "teacher", accuracy=accuracy(teacher, data))]
    for seed in SEEDS[:1] if args.quick else SEEDS:
        for name, step in steps.items():
            answers = {} if step.features or step.alpha == 0 else {"cache": str(CACHE / f"answers-{seed}")}
            own = step.model_copy(update=answers)

            def train(
                artifact: Path,
                _: Path,
                name: str = name,
                own: Any = own,
                seed: int = seed,
            ) -> None:
                start = student(name, seed, teacher, data)
                sl.apply(start, teaching(name, own), data, teacher=teacher, seed=seed).save(artifact)

            recipe = f"{name}, seed {seed}"
            facts = {"step": step.model_dump(mode="json"), "seed": seed, "quick": args.quick}
            entry = cached("slimline", f"distil {recipe}", ".pt2", facts, train, args.fresh)
            rows.append(Row(CASE, "slimline", recipe, accuracy=accuracy(sl.load(entry.artifact), data)))
            log.info("%s: %.2f %%", recipe, 100 * (rows[-1].accuracy or 0))
    page = write("distillation", rows, args.quick)
    timed = {name: step for name, step in steps.items() if not name.startswith("pruned")}
    times = seconds(timed, teacher) if "kl" in timed else {}
    page.write_text(page.read_text() + "\n" + summary(rows, times))
    print(page.read_text())


if __name__ == "__main__":
    main()
