"""Fashion-MNIST ResNet, much smaller, and then taught for long by the original.

    python benchmarks/patience.py [--quick] [--fresh] [macs] [erased] [small]

*macs* removes 60 % of the multiplications by optimal brain surgery and stays in FP32; *erased* is the same for half as
long, with rectangles of noise in every second image; *small* leaves one block of each
stage and half of all channels, in INT8. Teacher and student see the same mirrored and shifted images, and the student
learns as the original did: SGD with Nesterov momentum, weight decay, and a rate that rises high and falls to zero.
A run that was stopped goes on.
"""

from __future__ import annotations

from typing import Any

from common import Entry, cached, compare, fashion, options, slimline_entry, write
from fashion_torch import CASE, export, original

import slimline as sl

EPOCHS = {"macs": 48, "erased": 24, "small": 40}
SEEDS = {"macs": (0,), "erased": (0,), "small": (0, 1)}
LABELS = {
    "macs": "60 % of the MACs pruned by OBS, taught for {} epochs",
    "erased": "60 % of the MACs pruned by OBS, taught with erased parts for {} epochs",
    "small": "half of depth and widths, taught for {} epochs, INT8",
}


def recipe(name: str, epochs: int) -> list[Any]:
    """The steps."""
    teaching = sl.Distillation(
        epochs=epochs,
        optimizer="sgd",
        learning_rate=0.1,
        weight_decay=5e-4,
        schedule="one-cycle",
        warmup=0.2,
        batch_size=128,
        precision="bfloat16",
        compiled=True,
        view=sl.View(erase=0.2) if name == "erased" else None,
    )
    if name != "small":
        return [sl.ChannelPruning(target_macs=0.4, criterion="obs", round_to=16), teaching]
    halving = [sl.DepthPruning(blocks=3), sl.ChannelPruning(ratio=0.5, criterion="obs")]
    return [*halving, teaching, sl.StaticQuantization()]


def main() -> None:
    args = options(__doc__, tuple(EPOCHS))
    data = fashion(channels_last=False, quick=args.quick)
    model = sl.load(original(), (data.split("calibration").inputs[0][:2],))
    base = cached("original", "FP32", ".onnx", {}, lambda artifact, _: export(original(), artifact), args.fresh)
    entries = []
    for name in args.names or EPOCHS:
        epochs = 1 if args.quick else EPOCHS[name]
        for seed in SEEDS[name][: 1 if args.quick else None]:
            label = f"{LABELS[name].format(epochs)}, seed {seed}"
            steps = recipe(name, epochs)
            entries.append(
                slimline_entry(model, data, "onnxruntime", ".onnx", label, steps, args.quick, args.fresh, seed)
            )
    rows = compare(CASE, "onnxruntime", Entry(base.tool, base.recipe, base.artifact), entries, data, quick=args.quick)
    write("patience", rows, args.quick)


if __name__ == "__main__":
    main()
