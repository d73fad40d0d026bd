"""A whole compression of a tiny network, for a process of its own that tests may kill: FRAMEWORK OUTPUT."""

from __future__ import annotations

import sys

import slimline as sl
from slimline.demo import keras_data, torch_data

STEPS = [
    sl.ChannelPruning(ratio=0.5),
    sl.Distillation(epochs=2, batch_size=256, refresh_batches=2),
    sl.StaticQuantization(undo=False, samples=64),
]
SETTINGS = {"batch_sizes": (1, 8), "seed": 3}


def model(framework: str):
    if framework == "torch":
        import torch

        from slimline.zoo.torch import ResidualCNN

        torch.manual_seed(0)
        return ResidualCNN((16, 32), 1).eval()
    from slimline.frameworks.base import adapter

    adapter("keras")
    import keras

    from slimline.zoo.keras import residual_cnn

    keras.utils.set_random_seed(0)
    return residual_cnn((16, 32), 1, size=8)


def data(framework: str) -> sl.Data:
    return torch_data() if framework == "torch" else keras_data()


def main(framework: str, output: str) -> None:
    sl.compress(
        model(framework),
        data(framework),
        recipe=STEPS,
        budget=sl.Budget(max_drop=0.5),
        output=output,
        **SETTINGS,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
