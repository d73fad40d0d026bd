"""Fashion-MNIST, Keras to LiteRT: slimline beside what a user can build today.

    python benchmarks/fashion_keras.py [--quick] [--fresh]

No tool prunes Keras 3 models (TFMOT refuses them), so the peer is TensorFlow's own full-integer converter. All
artifacts are timed in one run. The weights are those of the PyTorch benchmark.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import tensorflow as tf
from common import WEIGHTS, Entry, cached, compare, fashion, options, slimline_entry, write

import slimline as sl
from slimline.zoo.keras import load_torch_weights, residual_cnn

CASE = "Fashion-MNIST, ResNet 32-64-128 of 70 M MACs, Keras"
RECOVERY = sl.Distillation(epochs=6, batch_size=256, learning_rate=4e-3, precision="bfloat16")


def slimline_recipes(recovery: sl.Distillation) -> dict[str, list[Any]]:
    """By name."""
    int8 = sl.StaticQuantization()
    return {
        "50 % pruned, recovered, INT8": [sl.ChannelPruning(ratio=0.5, round_to=16), recovery, int8],
    }


def original() -> keras.Model:
    """The trained network."""
    model = residual_cnn(size=28)
    load_torch_weights(model, WEIGHTS)
    return model


def convert(model: keras.Model, path: Path, calibration: np.ndarray | None = None) -> None:
    """TensorFlow's converter as its documentation shows it: float, or full integer with `calibration`."""
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    if calibration is not None:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([row[None]] for row in calibration)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    path.write_bytes(converter.convert())


def peer_entries(data: sl.Data, quick: bool, fresh: bool) -> list[Entry]:
    """The converter alone."""
    calibration = data.split("calibration").inputs[0]

    def integer(artifact: Path, _: Path) -> None:
        convert(original(), artifact, calibration)

    return [cached("TFLite converter", "full integer", ".tflite", {"quick": quick}, integer, fresh)]


def main() -> None:
    args = options(__doc__)
    recovery = RECOVERY.model_copy(update={"epochs": 1}) if args.quick else RECOVERY
    data = fashion(channels_last=True, quick=args.quick)
    base = cached("original", "FP32", ".tflite", {}, lambda artifact, _: convert(original(), artifact), args.fresh)
    base = Entry(base.tool, base.recipe, base.artifact)
    peers = peer_entries(data, args.quick, args.fresh)
    model = sl.load(original(), (data.split("calibration").inputs[0][:2],))
    recipes = list(slimline_recipes(recovery).items())
    ours = [
        slimline_entry(model, data, "litert", ".tflite", name, steps, args.quick, args.fresh)
        for name, steps in (recipes[:2] if args.quick else recipes)
    ]
    rows = compare(CASE, "litert", base, [*ours, *peers], data, quick=args.quick)
    print(write("fashion_keras", rows, args.quick).read_text())


if __name__ == "__main__":
    main()
