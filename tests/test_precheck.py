"""What a recipe asks for in vain is refused before the first step, with nothing left behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import slimline as sl
from slimline.run.compress import check

X = np.zeros((4, 3, 8, 8), np.float32)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(216, 4)).eval()


@pytest.fixture(scope="module")
def model() -> sl.Model:
    return sl.load(small(), X[:2])


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (sl.ChannelPruning(ratio=0.5, layers=("nosuch*",)), "There is no layer for layers 'nosuch\\*'"),
        (sl.ChannelPruning(ratio=0.5, axes=("heads",), criterion="taylor"), "There are no heads to prune"),
        (sl.ChannelPruning(target_macs=0.001, criterion="obs", round_to="auto"), "cannot"),
        (sl.ChannelPruning(ratio=0.5, axes=("kernel",), layers=("2",)), "no kernel"),
        (sl.SparsePruning(amount=0.5, layers=("nosuch",)), "nosuch"),
        (sl.DepthPruning(blocks=1), "no residual block"),
        (sl.ActivationPruning(sparsity=0.5), "no ReLU"),
    ],
)
def test_a_step_in_vain_is_refused_even_when_it_is_the_last(tmp_path, model, step, said):
    before = sl.SparsePruning(amount=0.1)
    with pytest.raises(sl.SlimlineError, match=said):
        sl.apply(model, [before, step], sl.Data(calibration=X))
    data = sl.Data(train=(X, np.arange(4)), test=(X, np.arange(4)), calibration=X, overlap="allow")
    with pytest.raises(sl.SlimlineError, match=said):
        sl.compress(small(), data, recipe=[step], output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_patterns_are_asked_of_the_widths_they_will_meet(model):
    pattern = sl.SparsePruning(amount=0.5, pattern="1x16", layers=("2",))
    with pytest.raises(sl.SlimlineError, match="1x16"):
        check([pattern], model)
    check([sl.ChannelPruning(ratio=0.3, round_to=4), pattern], model)


def test_goals_are_asked_of_the_sizes_they_will_meet(model):
    tight = sl.ChannelPruning(target_macs=0.001)
    with pytest.raises(sl.SlimlineError, match="cannot"):
        check([tight], model)
    check([sl.ChannelPruning(ratio=0.3), tight], model)
