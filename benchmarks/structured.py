"""Channels removed without training, from 512 unlabelled images: slimline's ways side by side, as ONNX artifacts.

    python benchmarks/structured.py [--quick] [--fresh]

Plain L1 (one shot, nothing repaired) is the baseline of the field; the others repair what follows by least squares.
"""

from __future__ import annotations

from pathlib import Path

from common import cached, compare, fashion, options, write
from fashion_torch import CASE, original

import slimline as sl

LEFT = (0.7, 0.5)


def steps(left: float) -> dict[str, sl.ChannelPruning]:
    """By name; all leave at most the same MACs."""
    return {
        "L1": sl.ChannelPruning(target_macs=left, criterion="l1"),
        "L1, compensated": sl.ChannelPruning(target_macs=left, criterion="l1", scope="global", compensate=True),
        "OBS": sl.ChannelPruning(target_macs=left, criterion="obs", scope="global"),
        "OBS, in 16s": sl.ChannelPruning(target_macs=left, criterion="obs", scope="global", round_to=16),
        "OBS, widths measured": sl.ChannelPruning(target_macs=left, criterion="obs", scope="global", round_to="auto"),
    }


def main() -> None:
    args = options(__doc__)
    data = fashion(channels_last=False, quick=args.quick)
    model = sl.load(original(), (data.split("calibration").inputs[0][:2],))

    def export(model: sl.Model, artifact: Path) -> None:
        sl.export(model, "onnxruntime", artifact.parent / "out").replace(artifact)

    base = cached("original", "FP32", ".onnx", {}, lambda artifact, _: export(model, artifact), args.fresh)
    entries = []
    for left in LEFT:
        for name, step in steps(left).items():

            def make(artifact: Path, folder: Path, step: sl.ChannelPruning = step) -> None:
                export(sl.apply(model, step, data), artifact)

            recipe = f"{name}, {1 - left:.0%} of the MACs gone"
            config = {"step": step.model_dump(mode="json"), "quick": args.quick}
            entries.append(cached("slimline", recipe, ".onnx", config, make, args.fresh))
    rows = compare(CASE, "onnxruntime", base, entries, data, quick=args.quick)
    print(write("structured", rows, args.quick).read_text())


if __name__ == "__main__":
    main()
