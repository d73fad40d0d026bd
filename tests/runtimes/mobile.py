"""Small networks, float and on integer grids, for the targets that take exported programs or TensorRT's ONNX."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

import slimline as sl
from slimline.steps.quantization.calibration import calibrate


class Residual(nn.Module):
    """A residual block, pooling, padding and two linear layers: what is rounded, moved and shared."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.first = nn.Conv2d(16, 16, 3)
        self.second = nn.Conv2d(16, 16, 1)
        self.hidden = nn.Linear(16, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        y = self.second(torch.relu(self.first(nn.functional.pad(x, [1, 1, 1, 1]))))
        x = nn.functional.max_pool2d(torch.relu(x + y), 2)
        return self.head(torch.relu(self.hidden(x.mean((2, 3)))))


def images(count: int = 4) -> np.ndarray:
    """``(count, 3, 8, 8)``, normal."""
    return np.random.default_rng(0).normal(size=(count, 3, 8, 8)).astype(np.float32)


def model() -> sl.Model:
    """A `Residual` with spread batch-norm statistics."""
    torch.manual_seed(0)
    net = Residual()
    net.train()(torch.randn(32, 3, 8, 8))
    return sl.load(net.eval(), (images(),))


def quantized(target: str, **options: Any) -> sl.Model:
    """`model`, calibrated on 64 images."""
    return calibrate(model(), sl.StaticQuantization(**options), [(images(64),)], target)
