"""Every model of `keras.applications`, with random weights, pruned at 30 %: what is covered, and what not and why.

    python benchmarks/zoo_keras.py [--resume] [MODEL ...]

Every class at the smallest image it takes; of a family that differs in depth or width alone, the largest are left out.
"""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import zoo
from zoo import LESS, TOLERANCE, Case, exported, pruned

SIZES = {
    **dict.fromkeys(("VGG16", "VGG19"), 32),
    **dict.fromkeys(("ResNet50", "ResNet101", "ResNet152", "ResNet50V2", "ResNet101V2", "ResNet152V2"), 32),
    "Xception": 71,
    "InceptionV3": 75,
    "InceptionResNetV2": 75,
    **dict.fromkeys(("MobileNet", "MobileNetV2", "MobileNetV3Small", "MobileNetV3Large"), 32),
    **dict.fromkeys(("DenseNet121", "DenseNet169", "DenseNet201"), 32),
    **dict.fromkeys(("NASNetMobile", "NASNetLarge"), 32),
    **{f"EfficientNetB{i}": 32 for i in range(8)},
    **{f"EfficientNetV2{size}": 32 for size in ("B0", "B1", "B2", "B3", "S", "M", "L")},
    **{f"ConvNeXt{size}": 32 for size in ("Tiny", "Small", "Base", "Large")},
}
SKIPPED = {"ConvNeXtXLarge": "350 million parameters; it differs from ConvNeXtLarge in its widths alone"}


def build(name: str) -> Any:
    """The network with ten classes, seeded, and with norms whose statistics and affine parameters are not 0 and 1."""
    import slimline.frameworks.keras  # noqa: F401  # isort: skip
    import keras

    keras.utils.set_random_seed(0)
    size = SIZES[name]
    model = getattr(keras.applications, name)(weights=None, input_shape=(size, size, 3), classes=10)
    rng = np.random.default_rng(0)
    for variable in model.variables:
        kind, shape = variable.path.rpartition("/")[2], tuple(variable.shape)
        if kind in ("gamma", "moving_variance") or "layer_scale" in variable.path:
            variable.assign(rng.uniform(0.7, 1.4, shape))
        elif kind in ("beta", "moving_mean"):
            variable.assign(rng.normal(0, 0.1, shape))
    return model


def check(case: Case) -> dict[str, Any]:
    """Everything that is asked of one model."""
    import slimline as sl

    source = case.make()
    row: dict[str, Any] = {"covered": False, "failure": "", "parts": []}
    clock = time.perf_counter()
    model = sl.load(source)
    row["seconds_to_load"] = round(time.perf_counter() - clock, 1)
    plan, small, masked, facts = pruned(model)
    row |= facts
    x = np.random.default_rng(1).uniform(0, 255, (3, *model.example[0].shape[1:])).astype(np.float32)
    # Softmax hides differences: the logits are compared.
    before, removed, zeroed = (np.log(np.maximum(m.predict(x), 1e-30)) for m in (model, small, masked))
    row["error"] = float(np.abs(removed - zeroed).max() / np.abs(zeroed).max())
    row["moved"] = float(np.abs(before - zeroed).max() / np.abs(zeroed).max())
    row["exact"] = row["error"] <= TOLERANCE
    row["counted"] = small.graph.size == plan.parameters
    with tempfile.TemporaryDirectory() as folder:
        again = sl.load(small.save(Path(folder) / "small.keras"))
    row["saved"] = bool(np.allclose(again.predict(x), small.predict(x), atol=1e-6))
    row |= exported(small)
    row["trained"] = _trains(small.native, x)
    row["peak_megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    missing = [what for what in ("exact", "counted", "saved", "trained") if not row[what]]
    if row["less"] < LESS:
        missing.append(f"{row['less']:.0%} of the parameters")
    if not row["moved"] > 1e-3:
        missing.append("moved")
    row["failure"] = f"not {', '.join(missing)}" if missing else ""
    row["covered"] = not missing
    return row


def _trains(native: Any, x: np.ndarray) -> bool:
    """One step of gradient descent moves every kernel and leaves nothing that is not a number."""
    import keras

    native.compile(optimizer=keras.optimizers.SGD(1e-2), loss="sparse_categorical_crossentropy")
    before = [np.array(v) for v in native.trainable_variables]
    native.train_on_batch(x, np.arange(len(x)))
    moved = [not np.array_equal(a, v) for a, v in zip(before, native.trainable_variables, strict=True) if a.ndim > 1]
    return all(moved) and all(np.isfinite(np.array(v)).all() for v in native.trainable_variables)


def main() -> None:
    cases = {name: Case(lambda name=name: build(name)) for name in SIZES}  # type: ignore[misc]
    zoo.main("keras", cases, SKIPPED, __doc__, check)


if __name__ == "__main__":
    main()
