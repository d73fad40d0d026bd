"""Fashion-MNIST ResNet, much of it removed and then taught for long.

    python benchmarks/patience.py [--quick] [--fresh] [macs | small]

`macs` removes 60 % of the multiplications by optimal brain surgery and stays in FP32; `small` halves depth and widths
(16-32-64, one block a stage) and ends in INT8. Teacher and student see the same mirrored and shifted images, of which
`small` takes random parts too.
One seed each, as an epoch takes a minute of one core. A run that was stopped goes on.
"""

from __future__ import annotations

from typing import Any

from common import Entry, cached, compare, fashion, options, slimline_entry, write
from fashion_torch import CASE, export, original

import slimline as sl

EPOCHS = {"macs": 16, "small": 24}
NAMES = {
    "macs": "60 % of the MACs pruned by OBS, taught for {} epochs",
    "small": "half of depth and widths, taught for {} epochs, INT8",
}


def taught(epochs: int, rate: float, view: sl.View | None = None) -> sl.Distillation:
    """By the teacher's answers and the labels, with a mean of the weights."""
    return sl.Distillation(
        epochs=epochs, learning_rate=rate, batch_size=128, precision="bfloat16", compiled=True, ema=0.999, view=view
    )


def recipes(quick: bool) -> dict[str, list[Any]]:
    """By name."""
    epochs = {name: 1 if quick else each for name, each in EPOCHS.items()}
    return {
        "macs": [
            sl.ChannelPruning(target_macs=0.4, criterion="obs", round_to=16),
            taught(epochs["macs"], 3e-3),
        ],
        "small": [
            sl.DepthPruning(blocks=3),
            sl.ChannelPruning(ratio=0.5, criterion="obs"),
            taught(epochs["small"], 4e-3, sl.View(crop=0.6)),
            sl.StaticQuantization(),
        ],
    }


def main() -> None:
    args = options(__doc__, tuple(NAMES))
    data = fashion(channels_last=False, quick=args.quick)
    model = sl.load(original(), (data.split("calibration").inputs[0][:2],))
    base = cached("original", "FP32", ".onnx", {}, lambda artifact, _: export(original(), artifact), args.fresh)
    entries = []
    for name, steps in recipes(args.quick).items():
        if args.names and name not in args.names:
            continue
        label = NAMES[name].format(steps[-1 if name == "macs" else -2].epochs)
        entries.append(slimline_entry(model, data, "onnxruntime", ".onnx", label, steps, args.quick, args.fresh))
    rows = compare(CASE, "onnxruntime", Entry(base.tool, base.recipe, base.artifact), entries, data, quick=args.quick)
    write("patience", rows, args.quick)


if __name__ == "__main__":
    main()
