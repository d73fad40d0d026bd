"""Batch norms that become a part of convolutions: the same answers, where and only where that can be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import slimline as sl
from slimline.frameworks.torch.norms import fold_norms


def drawn(module: nn.Module) -> nn.Module:
    """With statistics, scales and shifts that are not those of the start."""
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 2)
                nn.init.normal_(norm.bias)
    return module.eval()


class Read(nn.Module):
    """Something else reads what is normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class Shared(nn.Module):
    """One convolution called twice, with a norm behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.conv(torch.relu(self.one(self.conv(x)))))


CASES = {
    "bare": (nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), 0),
    "with a bias, without a scale": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)), 0),
    "grouped, dilated, padded": (
        nn.Sequential(nn.Conv2d(3, 6, 3, 2, "valid", 2, groups=3), nn.BatchNorm2d(6, eps=0.1), nn.ReLU()), 0
    ),
    "padded alike": (nn.Sequential(nn.Conv2d(3, 6, 3, padding="same"), nn.BatchNorm2d(6)), 0),
    "called twice": (Shared(), 0),
    "read by others": (Read(), 1),
    "before the convolution": (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), 1),
    "of the batch's own statistics": (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), 1
    ),
    "transposed": (nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4)), 1),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_answers_stay(case: str) -> None:
    torch.manual_seed(0)
    module, left = CASES[case]
    x = np.random.default_rng(0).normal(size=(5, 3, 9, 9)).astype(np.float32)
    native = sl.load(drawn(module), x[:2]).native
    expected = native(torch.from_numpy(x)).detach()
    fold_norms(native)
    norms = native.graph.find_nodes(op="call_function", target=torch.ops.aten.batch_norm.default)
    assert len(norms) == left
    np.testing.assert_allclose(native(torch.from_numpy(x)).detach(), expected, rtol=1e-4, atol=1e-5)
