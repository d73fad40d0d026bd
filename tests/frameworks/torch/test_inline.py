"""Blocks without gradients or autocasting are read like the rest, and the former still let no gradient through."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from slimline.graph.units import Units
from tests.frameworks.torch.test_rules import TOKENS, exact, model_of


class Quiet(nn.Module):
    """Positions that are looked up, a scale that is measured and a weight that is written, all without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.places, self.last = nn.Linear(8, 12), nn.Embedding(6, 12), nn.Linear(12, 5)

    def forward(self, x):
        with torch.no_grad():
            self.last.weight.mul_(1.0)
            places = self.places(torch.arange(x.shape[1]))
            x = x * 2
            with torch.enable_grad():
                y = self.first(x)
        return self.last((y + places).relu())


def test_blocks_are_read_and_pruned():
    module = Quiet()
    model = model_of(module, TOKENS)
    with torch.no_grad():
        np.testing.assert_allclose(
            model.predict(TOKENS), module(torch.from_numpy(TOKENS)).numpy(), rtol=1e-5, atol=1e-6
        )
    (unit,) = Units(model.graph).units
    plan = exact(model, {unit.name: (0, 3, 11)})
    assert plan.shape("places.weight") == (6, 9) and plan.shape("last.weight") == (5, 9)


def test_gradients_stop_where_they_did():
    module = Quiet()
    native = copy.deepcopy(model_of(module, TOKENS).native)
    x = torch.from_numpy(TOKENS)
    for net in (native, module):
        net(x).square().sum().backward()
    found = {name: p.grad for name, p in native.named_parameters()}
    assert found.pop("places.weight") is None and module.places.weight.grad is None
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, module.get_parameter(name).grad)


class Cast(nn.Module):
    """A sum in full precision, or in half, wherever the rest runs."""

    def __init__(self, enabled: bool) -> None:
        super().__init__()
        self.first, self.last, self.enabled = nn.Linear(8, 12), nn.Linear(12, 5), enabled

    def forward(self, x):
        y = self.first(x)
        with torch.autocast("cpu", torch.bfloat16, self.enabled):
            y = y.mT @ (y @ y.mT)
        return self.last(y.mT.float())


def test_a_block_without_autocasting_is_read_and_one_that_casts_is_frozen():
    module = Cast(enabled=False)
    model = model_of(module, TOKENS)
    with torch.no_grad():
        np.testing.assert_allclose(model.predict(TOKENS), module(torch.from_numpy(TOKENS)).numpy(), rtol=1e-5)
    exact(model, {"first": (0, 3, 11)})
    model.native(torch.from_numpy(TOKENS)).square().sum().backward()
    assert all(p.grad is not None for p in model.native.parameters())
    units = Units(model_of(Cast(enabled=True), TOKENS).graph)
    assert units.units == () and "wrap_with_autocast" in units.frozen[0].reason
