"""Fashion-MNIST ResNet, much smaller, and then taught for long by the original.

    python benchmarks/patience.py [--quick] [--fresh] [macs] [labels] [small]

*macs* removes 60 % of the multiplications by optimal brain surgery and stays in FP32; *labels* is the same without a
teacher; *small* leaves one block of each stage and half of all channels, in INT8. Teacher and student see the same
mirrored and shifted images, of the first two with a rectangle of noise in every second one, and the student learns as
the original did: SGD with Nesterov momentum, weight decay, and a rate that rises high and falls to zero. A training
takes an hour of a core and some minutes of a GPU. So the students are kept apart (``--train`` ends there): copy
``.cache`` to the machine that shall quantize, export and measure them.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import Entry, cached, compare, fashion, options, write
from fashion_torch import CASE, export, original

import slimline as sl
from slimline.frameworks.base import adapter
from slimline.frameworks.device import wish

EPOCHS = 45
SEEDS = (0, 1, 2)
TRAINED_ON = "device.txt"
LABELS = {
    "macs": "60 % of the MACs pruned by OBS, taught for {} epochs",
    "labels": "60 % of the MACs pruned by OBS, trained without a teacher for {} epochs",
    "small": "half of depth and widths, taught for {} epochs, INT8",
}


def teaching(name: str, epochs: int) -> list[Any]:
    """The steps that make a student."""
    step = sl.Distillation(
        alpha={"macs": 0.3, "labels": 0.0, "small": 0.5}[name],
        epochs=epochs,
        optimizer="sgd",
        learning_rate=0.2,
        weight_decay=5e-4,
        schedule="one-cycle",
        warmup=0.2,
        batch_size=256,
        precision="bfloat16",
        compiled=True,
        view=None if name == "small" else sl.View(erase=0.4),
    )
    if name != "small":
        return [sl.ChannelPruning(target_macs=0.4, criterion="obs", round_to=16), step]
    return [sl.DepthPruning(blocks=3), sl.ChannelPruning(ratio=0.5, criterion="obs"), step]


def device() -> str:
    """Where steps train here."""
    where = adapter("torch").device(wish())
    return torch.cuda.get_device_name(where) if where.startswith("cuda") else where


def main() -> None:
    args = options(__doc__, tuple(LABELS), {"--train": "make the students alone"})
    data = fashion(channels_last=False, quick=args.quick)
    model = sl.load(original(), (data.split("calibration").inputs[0][:2],))
    entries = []
    epochs = 1 if args.quick else EPOCHS
    for name, seed in product(args.names or LABELS, SEEDS[: 1 if args.quick else None]):
        label = f"{LABELS[name].format(epochs)}, seed {seed}"
        steps = teaching(name, epochs)
        facts = {"steps": [step.model_dump(mode="json") for step in steps], "seed": seed, "quick": args.quick}

        def train(artifact: Path, folder: Path, steps: Any = steps, seed: int = seed) -> None:
            sl.apply(model, steps, data, seed=seed).save(artifact)
            (folder / TRAINED_ON).write_text(device())

        student = cached("slimline", f"student, {label}", ".pt2", facts, train, args.fresh)
        if args.train:
            continue

        def lower(artifact: Path, _: Path, name: str = name, student: Path = student.artifact) -> None:
            small = sl.load(student)
            small = sl.apply(small, sl.StaticQuantization(), data) if name == "small" else small
            sl.export(small, "onnxruntime", artifact)

        entry = cached("slimline", label, ".onnx", facts, lower, args.fresh)
        where = (student.artifact.parent / TRAINED_ON).read_text()
        entries.append(replace(entry, seconds=student.seconds, device=where))
    if args.train:
        return
    base = cached("original", "FP32", ".onnx", {}, lambda artifact, _: export(original(), artifact), args.fresh)
    rows = compare(CASE, "onnxruntime", Entry(base.tool, base.recipe, base.artifact), entries, data, quick=args.quick)
    write("patience", rows, args.quick)


if __name__ == "__main__":
    main()
