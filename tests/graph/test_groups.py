"""Groups against plans: a group is what goes when its position is pruned."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import slimline as sl
from slimline.graph.groups import Groups
from slimline.graph.units import Units
from slimline.plans import Plan


class Net(nn.Module):
    """Convolutions, one of them grouped, a residual addition and a flattened reader."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.two = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.head = nn.Linear(6 * 16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.one(x)).relu()
        return self.head((y + self.two(y)).flatten(1))


@pytest.fixture(scope="module")
def model() -> sl.Model:
    torch.manual_seed(0)
    return sl.load(Net().eval(), np.zeros((2, 2, 4, 4), np.float32))


def removed(units: Units, unit: str, position: int, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By parameter, True for what a plan that removes the position takes away."""
    plan = Plan(units, {unit: (position,)})
    found = {}
    for name in units.graph.trainable:
        stays = np.ones(arrays[name].shape, bool)
        for dim, kept in enumerate(plan.retained(name)):
            if kept is not None:
                stays &= np.isin(np.arange(stays.shape[dim]), kept).reshape(
                    [-1 if d == dim else 1 for d in range(stays.ndim)]
                )
        found[name] = ~stays
    return found


def test_a_group_is_what_a_plan_removes(model):
    arrays, units = model.parameters(), Units(model.graph)
    groups = Groups.of(units, units.units)
    assert groups.count == sum(u.size for u in units.units) > 3
    squares = groups.sums(lambda name, dim: np.square(arrays[name]).sum(tuple({*range(arrays[name].ndim)} - {dim})))
    number = 0
    for index, unit in enumerate(units.units):
        for position in range(unit.size):
            gone = removed(units, unit.name, position, arrays)
            factors = np.ones(groups.count)
            factors[number] = 0
            scaled = groups.scaled(arrays, factors)
            for name, mask in gone.items():
                expected = np.where(mask, 0, arrays[name])
                np.testing.assert_array_equal(scaled.get(name, arrays[name]), expected)
            factors[number] = 2
            twice = groups.scaled(arrays, factors)
            # A weight that the position reads and makes counts twice.
            counted = 0.0
            for name, array in twice.items():
                at = array != arrays[name]
                counted += float(np.log2(array[at] / arrays[name][at]) @ np.square(arrays[name][at]))
            assert squares[number] == pytest.approx(counted, rel=1e-4)
            assert groups.units[number] == index
            number += 1


def test_sizes_count_weights(model):
    arrays, units = model.parameters(), Units(model.graph)
    unit = units.units[0]
    sizes = Groups.of(units, [unit]).sizes({name: a.shape for name, a in arrays.items()})
    for position in range(unit.size):
        gone = removed(units, unit.name, position, arrays)
        assert sizes[position] >= sum(int(mask.sum()) for mask in gone.values())


def test_some_positions_alone(model):
    units = Units(model.graph)
    unit = units.units[0]
    groups = Groups.of(units, [unit], {unit.name: (1,)})
    assert groups.count == 1
    arrays = model.parameters()
    scaled = groups.scaled(arrays, np.zeros(1))
    gone = removed(units, unit.name, 1, arrays)
    assert all((scaled[name][mask] == 0).all() for name, mask in gone.items() if name in scaled)
    assert all((scaled[name][~gone[name]] == arrays[name][~gone[name]]).all() for name in scaled)
