"""Small torch networks for digits, and the digits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from slimline.zoo.torch import ResidualCNN


class Inverted(nn.Module):
    """MobileNet's block: expand, depthwise with relu6, squeeze-excite gate, project, add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.Hardswish())
        self.expand = nn.Sequential(nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32), nn.ReLU6(inplace=True))
        self.depth = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.BatchNorm2d(32), nn.ReLU6())
        self.squeeze, self.gate = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)
        self.project = nn.Sequential(nn.Conv2d(32, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(16 * 16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.depth(self.expand(x))
        y = y * torch.sigmoid(self.gate(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        y = self.pool(torch.relu(x + self.project(y)))
        return self.head(y.flatten(1))


class Perceptron(nn.Sequential):
    """Three linear layers on flattened images."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 10))


def digits() -> np.ndarray:
    """Images of 8 × 8, from 0 to 1."""
    return (load_digits().images[:, None] / 16.0).astype(np.float32)


def fitted(make: Callable[[], nn.Module]) -> nn.Module:
    """Two dozen steps on digits, so that statistics and logits are those of a network that works."""
    torch.manual_seed(0)
    module = make()
    x, y = torch.from_numpy(digits()[:1024]), torch.from_numpy(load_digits().target[:1024]).long()
    optimizer = torch.optim.AdamW(module.parameters(), 5e-3)
    for step in range(24):
        rows = slice(step % 4 * 256, step % 4 * 256 + 256)
        loss = nn.functional.cross_entropy(module(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module.eval()


NETS = {"residual": lambda: ResidualCNN((16, 32), 1), "inverted": Inverted, "perceptron": Perceptron}


class Recurrent(nn.Module):
    """Two layers both ways, over six steps."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cells, self.head = kind(5, 8, num_layers=2, bidirectional=True, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cells(x)[0][:, -1])
