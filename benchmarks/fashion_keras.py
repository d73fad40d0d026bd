"""Fashion-MNIST, Keras to LiteRT: slimline beside what a user can build today.

    python benchmarks/fashion_keras.py [--quick] [--fresh]

No tool prunes Keras 3 models (TFMOT refuses them), so the peer is a narrower network built by hand and distilled
from the original by the same training budget, with the same samples in the same order, and TensorFlow's own
full-integer converter. All artifacts are timed in one run. The weights are those of the PyTorch benchmark.
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
from slimline.methods.schedules import warmup_cosine
from slimline.zoo.keras import load_torch_weights, residual_cnn

CASE = "Fashion-MNIST, ResNet 32-64-128 of 70 M MACs, Keras"
RECOVERY = sl.Distillation(epochs=8, batch_size=256, learning_rate=4e-3)
PEER_WIDTHS = ((16, 32, 64), (8, 16, 32))


def slimline_recipes(recovery: sl.Distillation) -> dict[str, list[Any]]:
    """By name; `recovery` is the training budget that every tool gets."""
    int8 = sl.StaticQuantization()
    return {
        "INT8": [int8],
        "50 % pruned, recovered, INT8": [sl.ChannelPruning(ratio=0.5, round_to=8), recovery, int8],
        "75 % pruned, recovered, INT8": [sl.ChannelPruning(ratio=0.75, round_to=8), recovery, int8],
    }


def original() -> keras.Model:
    """The trained network."""
    model = residual_cnn(size=28)
    load_torch_weights(model, WEIGHTS)
    return model


def distil(widths: tuple[int, ...], data: sl.Data, step: sl.Distillation, seed: int = 0) -> keras.Model:
    """A narrower network trained towards the original with everything as in `step`; the best epoch is kept."""
    keras.utils.set_random_seed(seed)
    student, teacher = residual_cnn(widths=widths, size=28), original()
    optimizer = keras.optimizers.AdamW(step.learning_rate, weight_decay=step.weight_decay)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    optimizer.build(student.trainable_variables)
    t = step.temperature

    @tf.function(reduce_retracing=True)
    def train(x: tf.Tensor, y: tf.Tensor) -> None:
        wanted = teacher(x, training=False)
        with tf.GradientTape() as tape:
            given = student(x, training=True)
            soft = keras.losses.kl_divergence(tf.nn.softmax(wanted / t), tf.nn.softmax(given / t))
            hard = keras.losses.sparse_categorical_crossentropy(y, given, from_logits=True)
            loss = tf.reduce_mean(step.alpha * t**2 * soft + (1 - step.alpha) * hard)
        gradients = tape.gradient(loss, student.trainable_variables)
        optimizer.apply_gradients(zip(gradients, student.trainable_variables, strict=True))

    samples, selection = data.split("train"), data.split("selection")
    total = step.epochs * -(-len(samples) // step.batch_size)
    best, kept, done = -1.0, student.get_weights(), 0
    for epoch in range(1, step.epochs + 1):
        for (x,), y in samples.batches(step.batch_size, seed=seed, epoch=epoch):
            optimizer.learning_rate = step.learning_rate * float(warmup_cosine(done, total, step.warmup))
            train(tf.constant(x), tf.constant(y))
            done += 1
        predicted = student.predict(selection.inputs[0], batch_size=500, verbose=0).argmax(1)
        score = float((predicted == selection.labels).mean())
        if score >= best:
            best, kept = score, student.get_weights()
    student.set_weights(kept)
    return student


def convert(model: keras.Model, path: Path, calibration: np.ndarray | None = None) -> None:
    """TensorFlow's converter as its documentation shows it: float, or full integer with `calibration`."""
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    if calibration is not None:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([row[None]] for row in calibration)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    path.write_bytes(converter.convert())


def peer_entries(data: sl.Data, recovery: sl.Distillation, quick: bool, fresh: bool) -> list[Entry]:
    """The converter alone, and narrower networks distilled and converted, in float and in integers."""
    calibration = data.split("calibration").inputs[0]
    config = {"recovery": recovery.model_dump(mode="json"), "quick": quick}

    def integer(artifact: Path, _: Path) -> None:
        convert(original(), artifact, calibration)

    found = [cached("TFLite converter", "full integer", ".tflite", config, integer, fresh)]
    for widths in PEER_WIDTHS[:1] if quick else PEER_WIDTHS:

        def narrow(artifact: Path, folder: Path, widths: tuple[int, ...] = widths) -> None:
            model = distil(widths, data, recovery)
            model.save(folder / "model.keras")
            convert(model, artifact)

        recipe = f"{'-'.join(map(str, widths))} by hand, distilled"
        in_float = cached("TFLite converter", recipe, ".tflite", config, narrow, fresh)

        def quantized(artifact: Path, _: Path, source: Path = in_float.artifact) -> None:
            convert(keras.models.load_model(source.with_suffix(".keras")), artifact, calibration)

        in_int8 = cached("TFLite converter", f"{recipe}, full integer", ".tflite", config, quantized, fresh)
        seconds = (in_float.seconds or 0) + (in_int8.seconds or 0)
        found += [in_float, Entry(in_int8.tool, in_int8.recipe, in_int8.artifact, seconds)]
    return found


def main() -> None:
    args = options(__doc__)
    recovery = RECOVERY.model_copy(update={"epochs": 1}) if args.quick else RECOVERY
    data = fashion(channels_last=True, quick=args.quick)
    base = cached("original", "FP32", ".tflite", {}, lambda artifact, _: convert(original(), artifact), args.fresh)
    base = Entry(base.tool, base.recipe, base.artifact)
    peers = peer_entries(data, recovery, args.quick, args.fresh)
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
