"""The demo's network on handwritten digits: half of every width cut at once, after training with a penalty or without.

    python benchmarks/sparse_training.py [--quick]

Nothing is recovered after the cut. Accuracy is that of the model in PyTorch on the test images, before and after it.
"""

from __future__ import annotations

import time
from typing import Any

from common import Row, log, options, write

import slimline as sl
from slimline.demo import torch_data, torch_model

CASE = "Digits, the demo's ResNet, half of the positions cut"


def recipes(quick: bool) -> dict[str, tuple[sl.SparseTraining | None, sl.ChannelPruning]]:
    """By name the training and the cut."""

    def trained(penalty: str, epochs: int, **fields: Any) -> sl.SparseTraining:
        return sl.SparseTraining(penalty=penalty, epochs=1 if quick else epochs, batch_size=64, **fields)

    plain: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 0.05, "alpha": 0}
    half = sl.ChannelPruning(ratio=0.5)
    everywhere = sl.ChannelPruning(ratio=0.5, scope="global")
    scales = sl.ChannelPruning(ratio=0.5, scope="global", criterion="batch_norm")
    return {
        "no training": (None, half),
        "growing, 6 epochs": (trained("growing", 6), half),
        "group_lasso 0.01, 8 epochs": (trained("group_lasso", 8, strength=0.01, **plain), everywhere),
        "group_lasso 0.02, 8 epochs": (trained("group_lasso", 8, strength=0.02, **plain), everywhere),
        "batch_norm 0.02, 24 epochs": (trained("batch_norm", 24, strength=0.02, **plain), scales),
    }


def main() -> None:
    args = options(__doc__)
    data = torch_data()
    test = data.split("certification")
    model = sl.load(torch_model(), test.inputs[0][:2])

    def accuracy(model: sl.Model) -> float:
        return float((model.predict(test.inputs[0]).argmax(1) == test.labels).mean())

    rows = [Row(CASE, "original", "none", accuracy=accuracy(model))]
    for name, (training, cut) in recipes(args.quick).items():
        start = time.perf_counter()
        small = sl.apply(model, cut if training is None else [training, cut], data)
        rows.append(Row(CASE, "slimline", f"{name}, cut", accuracy=accuracy(small)))
        if training is not None and training.penalty != "growing":  # which needs the cut that it prepares
            whole = sl.apply(model, training, data)
            rows.append(Row(CASE, "slimline", f"{name}, not cut", accuracy=accuracy(whole)))
        log.info("%s: %.2f %% in %.0f s", name, 100 * (rows[-1].accuracy or 0), time.perf_counter() - start)
    print(write("sparse_training", rows, args.quick).read_text())


if __name__ == "__main__":
    main()
