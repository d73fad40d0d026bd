"""Masks in torch's own form, and pruning in one's own loop."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import slimline as sl
from slimline.frameworks.torch.loop import axes
from slimline.graph.matrix import matrices
from tests import sparse_models as small

X = np.random.default_rng(0).normal(size=(16, 1, 8, 8)).astype(np.float32)


@pytest.fixture
def pruned():
    module = small.torch_net()
    prune.l1_unstructured(module[3], "weight", amount=0.5)
    prune.random_unstructured(module[7], "weight", amount=0.3)
    prune.random_unstructured(module[7], "bias", amount=0.5)
    return module


def test_masks_of_torch_are_kept_and_names_are_plain(pruned):
    before = {n: t.clone() for n, t in pruned.state_dict().items()}
    model = sl.load(pruned, X[:2])
    assert set(model.masks) == {"3.weight", "7.weight", "7.bias"}
    assert "3.weight" in model.parameters()
    assert not any("orig" in n or "mask" in n for n in model.parameters())
    for name, mask in model.masks.items():
        np.testing.assert_array_equal(mask, before[f"{name}_mask"].numpy() != 0)
    with torch.no_grad():
        np.testing.assert_allclose(model.predict(X), pruned(torch.from_numpy(X)), atol=1e-5)
    assert prune.is_pruned(pruned)
    assert set(before) == set(pruned.state_dict())
    found = sl.apply(model, [sl.SparsePruning(amount=0.7, layers=("7",))])
    assert not (found.masks["7.weight"] & ~model.masks["7.weight"]).any()


def test_masks_go_back_to_torch(pruned):
    model = sl.load(pruned, X[:2])
    for module in (sl.to_torch_prune(model), sl.to_torch_prune(model, small.torch_net())):
        assert prune.is_pruned(module)
        state = module.state_dict()
        np.testing.assert_array_equal(state["3.weight_mask"].numpy() != 0, model.masks["3.weight"])
        with torch.no_grad():
            np.testing.assert_allclose(module(torch.from_numpy(X)), model.predict(X), atol=1e-5)
        # Training changes what stays and not what went.
        optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            module(torch.from_numpy(X)).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            assert not np.allclose(module(torch.from_numpy(X)), model.predict(X), atol=1e-4)
        weight = dict(module.named_modules())["3"].weight.detach().numpy()
        assert not weight[~model.masks["3.weight"]].any()


def test_what_has_no_masks_cannot_go_back():
    model = sl.load(small.torch_net(), X[:2])
    with pytest.raises(sl.SlimlineError, match="has no masks"):
        sl.to_torch_prune(model)
    found = sl.apply(model, sl.SparsePruning(amount=0.5))
    with pytest.raises(sl.SlimlineError, match="other parameters"):
        sl.to_torch_prune(found, nn.Linear(3, 4))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 4),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.Conv1d(4, 8, 3, groups=4),
        nn.ConvTranspose2d(4, 6, 2, groups=2),
    ],
)
def test_axes_of_modules_are_those_of_the_graph(layer):
    shape = {2: (2, 6), 3: (2, 4, 9), 4: (2, 4, 9, 9)}[layer.weight.ndim]
    model = sl.load(layer, np.zeros(shape, np.float32))
    (found,) = matrices(model.graph)
    weight = model.parameters()[found.weight]
    assert axes(layer).shape == found.shape
    np.testing.assert_array_equal(axes(layer).matrix(weight), found.matrix(weight))
    np.testing.assert_array_equal(axes(layer).tensor(found.matrix(weight), weight.shape), weight)


@pytest.mark.parametrize(
    "fields",
    [{"schedule": "polynomial"}, {"schedule": "constant", "regrow": 0.3, "begin": 1, "end": 9}, {"schedule": "acdc"}],
)
def test_ones_own_loop_prunes_in_place(fields):
    module = small.torch_net().train()
    optimizer = torch.optim.SGD(module.parameters(), 0.05, momentum=0.9)
    before = copy.deepcopy(module.state_dict())
    step = sl.SparsePruning(amount=0.75, frequency=2, **fields)
    with sl.pruning(module, step, total=12) as p:
        for _ in range(12):
            optimizer.zero_grad()
            module(torch.from_numpy(X)).square().mean().backward()
            optimizer.step()
            p.step()
    assert p.sparsity == pytest.approx(0.75, abs=0.01)
    assert set(p.masks) == {"0.weight", "3.weight", "7.weight", "9.weight"}
    for name, mask in p.masks.items():
        weight = module.get_parameter(name).detach().numpy()
        assert not weight[~mask].any()
        assert not np.allclose(weight[mask], before[name].numpy()[mask])


def test_a_loop_that_is_too_short_says_so(caplog):
    module = small.torch_net()
    with sl.pruning(module, sl.SparsePruning(amount=0.5, schedule="polynomial"), total=10):
        pass
    assert "ended before the pruning" in caplog.text
    with pytest.raises(sl.SlimlineError, match="unknown length"):
        sl.pruning(module, sl.SparsePruning(amount=0.5, schedule="polynomial"))
    with pytest.raises(sl.SlimlineError, match="takes a torch module"):
        sl.pruning("module", sl.SparsePruning(amount=0.5, schedule="polynomial"))
    with (
        pytest.raises(sl.SlimlineError, match="no gradient"),
        sl.pruning(module, sl.SparsePruning(amount=0.5, criterion="taylor", schedule="constant"), total=10) as p,
    ):
        p.step()
