"""The whole job on scikit-learn's real handwritten digits: train, compress, measure, certify.

The factories can be named on the command line too: ``slimline compress slimline.demo:torch_model --data
slimline.demo:torch_data -o RUN``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slimline.basics.errors import require, unknown
from slimline.basics.progress import Progress
from slimline.data import Data
from slimline.data.datasets import Layout, builtin
from slimline.data.splits import Augment
from slimline.methods.schedules import warmup_cosine
from slimline.recipe import Budget, Recipe
from slimline.run.sources import DataSource, ModelSource
from slimline.steps.channels.step import ChannelPruning
from slimline.steps.distillation.step import Distillation
from slimline.steps.quantization.step import StaticQuantization

if TYPE_CHECKING:
    from slimline.run.directory import Run

RECIPE = Recipe(
    description="Half of all channels, recovered by distillation, then INT8.",
    steps=(
        ChannelPruning(ratio=0.5, round_to=16),
        Distillation(epochs=10, batch_size=64, learning_rate=2e-3),
        StaticQuantization(),
    ),
    budget=Budget(max_drop=0.03),
)
WIDTHS = (32, 64, 128)
BLOCKS = 1
EPOCHS = 15
BATCH = 64
RATE = 3e-3
Tell = Callable[[Progress], None]


def run_demo(
    framework: str = "torch", output: Path | None = None, progress: Tell | None = None, device: str | None = None
) -> Run:
    """Train a small residual CNN and compress it; `output` defaults to the first free of ``runs/demo-FRAMEWORK…``.

    `device` is as of `slimline.compress`; what is not there is refused before the training, which is on the CPU.
    """
    makers = {"torch": (torch_model, torch_data), "keras": (keras_model, keras_data)}
    if framework not in makers:
        raise unknown("framework", framework, makers)
    make_model, make_data = makers[framework]
    output = output or _free(Path("runs") / f"demo-{framework}")

    from slimline.frameworks.base import adapter
    from slimline.frameworks.device import on
    from slimline.model.loading import load
    from slimline.run.compress import compress

    with on(adapter(framework), device):
        pass
    data = make_data()
    trained = make_model(progress)
    return compress(
        load(trained, data.example()),
        data,
        recipe=RECIPE,
        output=output,
        progress=progress,
        command=["slimline", "demo", "--framework", framework],
        sources={
            "model": ModelSource(f"slimline.demo:{framework}_model").record(),
            "data": DataSource(f"slimline.demo:{framework}_data").record(),
        },
        device=device,
    )


def _free(path: Path) -> Path:
    numbered = (path.with_name(f"{path.name}-{i}") for i in range(2, 10_000))
    return path if not path.exists() else next(p for p in numbered if not p.exists())


def shift(layout: Layout) -> Augment:
    """Moves every image by up to one pixel in both directions."""
    first = 2 if layout == "channels_first" else 1

    def moved(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        n, height, width = len(x), x.shape[first], x.shape[first + 1]
        padded = np.pad(x, [(0, 0)] * first + [(1, 1), (1, 1)] + [(0, 0)] * (x.ndim - first - 2))
        padded = np.moveaxis(padded, (first, first + 1), (1, 2))
        down, right = rng.integers(0, 3, (2, n, 1))
        rows, columns = down + np.arange(height), right + np.arange(width)
        picked = padded[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
        return np.ascontiguousarray(np.moveaxis(picked, (1, 2), (first, first + 1)))

    return moved


def torch_data() -> Data:
    """The digits, channels first, shifted in training."""
    return builtin("digits", augment=shift("channels_first"))


def keras_data() -> Data:
    """The digits, channels last, shifted in training."""
    return builtin("digits", "channels_last", augment=shift("channels_last"))


def torch_model(progress: Tell | None = None) -> Any:
    """A `slimline.zoo.torch.ResidualCNN` trained on the digits, to about 99 %."""
    torch = require("torch", "torch")
    from slimline.zoo.torch import ResidualCNN

    torch.manual_seed(0)
    model = ResidualCNN(WIDTHS, BLOCKS)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)

    def step(x: np.ndarray, y: np.ndarray, rate: float) -> float:
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = torch.nn.functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    model.train()
    _train(step, torch_data(), progress)
    return model.eval()


def keras_model(progress: Tell | None = None) -> Any:
    """A `slimline.zoo.keras.residual_cnn` trained on the digits, to about 99 %."""
    from slimline.frameworks.base import adapter

    adapter("keras")  # chooses the backend before keras is imported
    keras = require("keras", "keras")
    from slimline.zoo.keras import residual_cnn

    keras.utils.set_random_seed(0)
    model = residual_cnn(WIDTHS, BLOCKS, size=8)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(weight_decay=1e-2), loss)

    def step(x: np.ndarray, y: np.ndarray, rate: float) -> float:
        model.optimizer.learning_rate = rate
        return float(np.ravel(model.train_on_batch(x, y))[0])

    _train(step, keras_data(), progress)
    return model


def _train(step: Callable[[np.ndarray, np.ndarray, float], float], data: Data, progress: Tell | None) -> None:
    train = data.split("train")
    total = EPOCHS * -(-len(train) // BATCH)
    done = 0
    for epoch in range(EPOCHS):
        for (x,), y in train.batches(BATCH, seed=0, epoch=epoch):
            loss = step(x, np.asarray(y), RATE * float(warmup_cosine(done, total, 0.1)))
            done += 1
            if progress is not None:
                progress(Progress("Training a residual CNN on handwritten digits", done, total, {"loss": loss}))
