"""Fashion-MNIST ResNet, 60 % of its multiplications removed, and then taught for long by the original.

    python benchmarks/patience.py [--quick] [--fresh]

Optimal brain surgery ranks, the network stays in FP32, and a mean of the weights is what counts. Teacher and student
see the same mirrored and shifted images. One seed, as an epoch takes a minute of one core. A run that was stopped goes
on.
"""

from __future__ import annotations

from common import Entry, cached, compare, fashion, options, slimline_entry, write
from fashion_torch import CASE, export, original

import slimline as sl

EPOCHS = 16


def main() -> None:
    args = options(__doc__)
    epochs = 1 if args.quick else EPOCHS
    data = fashion(channels_last=False, quick=args.quick)
    model = sl.load(original(), (data.split("calibration").inputs[0][:2],))
    base = cached("original", "FP32", ".onnx", {}, lambda artifact, _: export(original(), artifact), args.fresh)
    steps = [
        sl.ChannelPruning(target_macs=0.4, criterion="obs", round_to=16),
        sl.Distillation(
            epochs=epochs, learning_rate=3e-3, batch_size=128, precision="bfloat16", compiled=True, ema=0.999
        ),
    ]
    label = f"60 % of the MACs pruned by OBS, taught for {epochs} epochs"
    entry = slimline_entry(model, data, "onnxruntime", ".onnx", label, steps, args.quick, args.fresh)
    original_entry = Entry(base.tool, base.recipe, base.artifact)
    rows = compare(CASE, "onnxruntime", original_entry, [entry], data, quick=args.quick)
    write("patience", rows, args.quick)


if __name__ == "__main__":
    main()
