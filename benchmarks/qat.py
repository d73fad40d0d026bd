"""Fashion-MNIST ResNet, trained in few bits: W4A4, ternary and binary weights.

    python benchmarks/qat.py [--quick] [--fresh] [NAME ...]

The first and the last layer have INT8 weights. Accuracy and latency are those of ONNX Runtime artifacts. The file is
the `.slim` archive of the model, network and biases included; how much smaller is of the weights alone, as the archive
codes them, scales and biases included, against float32.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import CACHE, Row, cached, compare, fashion, log, options, slimline_entry, write
from fashion_torch import CASE, export, original

import slimline as sl
from slimline.files.slim import arrays
from slimline.files.slim.arrays import Grid
from slimline.methods.formats import Format, IntegerGrid, Levels


def recipes(quick: bool) -> dict[str, sl.QuantizationAwareTraining]:
    """By name."""
    ends = {name: {"weights": "int8"} for name in ("stem", "head")}

    def trained(epochs: int, **fields: Any) -> sl.QuantizationAwareTraining:
        return sl.QuantizationAwareTraining(
            epochs=1 if quick else epochs,
            batch_size=256,
            alpha=0.5,
            overrides=ends,
            learning_rate=2e-3,
            precision="bfloat16",
            **fields,
        )

    return {
        "W4A4": trained(3, weights="int4", activations="uint4"),
        "ternary": trained(5, weights="ternary", activations="float32"),
        "binary": trained(6, weights="binary", activations="float32"),
    }


def weight_bytes(model: sl.Model) -> float:
    """Of all that was trained, as an archive codes it."""
    assert model.quantization is not None
    stored, formats = model.parameters(), model.quantization.weights
    coded = sum(_coded(each.round(stored[name]), each) for name, each in formats.items())
    return coded + 4 * sum(stored[name].size for name in model.graph.trainable if name not in formats)


def _coded(weight: np.ndarray, each: Format) -> float:
    grid = each.grid if isinstance(each, Levels) else each
    assert isinstance(grid, IntegerGrid)
    axis = None if grid.axis is None else 0 if grid.axis == 0 else -1
    code = arrays.encode(weight.tobytes(), weight.shape, 4, [Grid(axis, grid.scale.ravel())])
    return weight.nbytes if code is None else code.bytes


def main() -> None:
    args = options(__doc__, list(recipes(True)))
    data = fashion(channels_last=False, quick=args.quick)
    model = sl.load(original(), data.split("certification").inputs[0][:2])
    base = cached("original", "FP32", ".onnx", {}, lambda artifact, _: export(original(), artifact), args.fresh)
    chosen = {n: step for n, step in recipes(args.quick).items() if not args.names or n in args.names}
    entries = [
        slimline_entry(model, data, "onnxruntime", ".onnx", name, [step], args.quick, args.fresh)
        for name, step in chosen.items()
    ]
    sizes: dict[str, dict[str, Any]] = {"FP32": {"file_bytes": _packed(model), "size_ratio": 1.0}}
    for entry in entries:
        small = sl.load(entry.artifact.parent / "run" / "model.pt2")
        whole = 4 * sum(a.size for name, a in model.parameters().items() if name in model.graph.trainable)
        sizes[entry.recipe] = {"file_bytes": _packed(small), "size_ratio": whole / weight_bytes(small)}
        log.info("%s: weights %.1f times smaller", entry.recipe, sizes[entry.recipe]["size_ratio"])
    measured = compare(CASE, "onnxruntime", base, entries, data, quick=args.quick)
    rows: list[Row] = [replace(row, **sizes[row.recipe]) for row in measured]
    print(write("qat", rows, args.quick).read_text())


def _packed(model: sl.Model) -> int:
    CACHE.mkdir(exist_ok=True)
    path = Path(CACHE, "packed.slim")
    return sl.pack(model, path).packed_bytes


if __name__ == "__main__":
    main()
