"""What kind of axis each unit is, in the two frameworks; and pruning one kind alone."""

from __future__ import annotations

import numpy as np
import pytest

import slimline as sl
from slimline.graph.kinds import kind
from slimline.graph.units import Units
from tests.test_compensation import made


def kinds(model):
    units = Units(model.graph)
    return {u.name: kind(units, u) for u in units.units}


@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_kinds_of_a_transformer(framework):
    model, _ = made(framework, "attention")
    found = kinds(model)
    assert sorted(set(found.values())) == ["embedding", "head_width", "heads", "mlp"]
    assert list(found.values()).count("embedding") == 1
    assert list(found.values()).count("mlp") == 1


@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_kinds_of_a_convolutional_network(framework):
    model, _ = made(framework, "residual")
    assert set(kinds(model).values()) == {"filters"}


@pytest.mark.parametrize("axis", ["heads", "head_width", "mlp", "embedding"])
def test_only_the_named_kind_is_pruned(axis):
    model, x = made("torch", "attention")
    found = kinds(model)
    plan = sl.plan(model, sl.ChannelPruning(ratio=0.34, axes=(axis,), criterion="l1"))
    assert plan.removed
    assert {found[name] for name in plan.removed} == {axis}
    np.testing.assert_allclose(plan.apply(model).predict(x), plan.mask(model).predict(x), atol=1e-4)


def test_a_kind_that_is_not_there_is_refused():
    model, _ = made("torch", "residual")
    with pytest.raises(sl.SlimlineError, match=r"There are no heads to prune.*are filters"):
        sl.plan(model, sl.ChannelPruning(ratio=0.5, axes=("heads",)))
