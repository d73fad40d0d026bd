"""From a step to a plan: goals that are met, ranking against closed forms, refusals in words."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import slimline as sl
from slimline.methods.structured import lowest, round_width, select_global, select_local, slice_scores


def chain(widths=(8, 16, 12), classes=5):
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers, inputs = [], 3
    for w in widths:
        layers += [nn.Conv2d(inputs, w, 3, padding=1), nn.ReLU()]
        inputs = w
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)).eval()


@pytest.fixture(scope="module")
def model():
    return sl.load(chain(), np.zeros((2, 3, 8, 8), np.float32))


def test_scores_sum_over_every_slice_of_the_unit(model):
    plan = sl.plan(model, sl.ChannelPruning(ratio=0.5, criterion="l1"))
    w = model.parameters()
    expected = np.abs(w["0.weight"]).sum((1, 2, 3)) + np.abs(w["0.bias"]) + np.abs(w["2.weight"]).sum((0, 2, 3))
    assert plan.removed["0"] == tuple(sorted(np.argsort(expected)[:4].tolist()))


@pytest.mark.parametrize("goal", [{"target_macs": 0.4}, {"target_parameters": 0.3}])
@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
def test_targets_are_met_and_not_by_much_more(model, goal, scope):
    plan = sl.plan(model, sl.ChannelPruning(scope=scope, **goal))
    before = plan.summary()
    (name, target), *_ = goal.items()
    what = before["macs" if name == "target_macs" else "parameters"]
    assert what["after"] <= target * what["before"]
    assert what["after"] >= 0.6 * target * what["before"]


def test_keep_and_layers_choose_units_by_the_users_names(model):
    assert set(sl.plan(model, sl.ChannelPruning(ratio=0.5, keep=("2",))).removed) == {"0", "4"}
    assert set(sl.plan(model, sl.ChannelPruning(ratio=0.5, layers=("4",))).removed) == {"4"}


def test_widths_are_rounded(model):
    plan = sl.plan(model, sl.ChannelPruning(ratio=0.3, round_to=8))
    assert [plan.shape(f"{k}.weight")[0] for k in (0, 2, 4)] == [8, 16, 8]  # 12 of 16 lies in the middle and goes up


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        ({"ratio": 0.5, "keep": ("nothing*",)}, "There is no layer for keep 'nothing"),
        ({"ratio": 0.5, "layers": ("8",)}, "8 \\(o\\) cannot be pruned: the model's output"),
        ({"target_macs": 0.0001}, "Pruning cannot reach 0% of the MACs"),
        ({"ratio": 0.5, "criterion": "taylor"}, "needs data"),
    ],
)
def test_what_cannot_be_done_is_said(model, step, sentence):
    with pytest.raises(sl.SlimlineError, match=sentence):
        sl.plan(model, sl.ChannelPruning(**step))


def test_taylor_follows_the_gradient(model):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 3, 8, 8)).astype(np.float32)
    data = sl.Data(train=(x, rng.integers(0, 5, 64)))
    plan = sl.plan(model, sl.ChannelPruning(ratio=0.5, criterion="taylor"), data)
    import torch

    split = data.split("calibration")
    module = chain()
    torch.nn.functional.cross_entropy(
        module(torch.from_numpy(split.inputs[0])), torch.from_numpy(split.labels)
    ).backward()
    p = dict(module.named_parameters())
    score = sum(
        (p[n] * p[n].grad).abs().sum([d for d in range(p[n].ndim) if d != dim]).detach().numpy()
        for n, dim in (("0.weight", 0), ("0.bias", 0), ("2.weight", 1))
    )
    assert plan.removed["0"] == tuple(sorted(np.argsort(score)[:4].tolist()))


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 32))
def test_rounded_widths_are_legal(size, kept, multiple):
    kept = min(kept, size)
    width = round_width(kept, size, multiple)
    assert 1 <= width <= size
    if size >= multiple:
        assert width % multiple == 0
        assert abs(width - kept) <= multiple


@given(st.lists(st.floats(0, 10), min_size=2, max_size=30), st.floats(0, 0.99))
def test_local_selection_takes_the_lowest(scores, ratio):
    s = np.array(scores)
    (gone,) = select_local([s], [0], ratio, 1)
    assert len(gone) == min(int(ratio * len(s) + 1e-9), len(s) - 1)
    if gone:
        left = np.delete(s, gone)
        assert s[list(gone)].max() <= left.min()


def test_global_selection_spares_units_that_matter():
    gone = select_global([np.array([1.0, 1, 1, 1]), np.array([0.1, 0.1, 2, 2])], [0, 0], 0.25, 1)
    assert gone == [(), (0, 1)]


def peaked(weight):
    score = np.ones(weight.shape[:2])
    score[:, :2] = 100 if weight.shape[1] == 16 else 1
    return score


def test_a_unit_that_would_become_empty_keeps_the_smallest_width_and_says_so():
    from torch import nn

    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    model = sl.load(net, np.zeros((2, 3), np.float32))
    plan = sl.plan(model, sl.ChannelPruning(ratio=0.9, scope="global", criterion=peaked))
    assert plan.shape("0.weight")[0] == 1
    assert plan.shape("2.weight")[0] == 2
    assert plan.notes == ("0 keeps 1 of 4, the smallest legal width",)


def test_slice_scores_closed_forms():
    w = np.arange(-6.0, 6).reshape(3, 4)
    np.testing.assert_allclose(slice_scores(w, 0, "l1"), [18, 4, 14])
    np.testing.assert_allclose(slice_scores(w, 1, "l2"), (w**2).sum(0))
    np.testing.assert_allclose(slice_scores(w, 0, "taylor", np.ones_like(w)), [18, 4, 14])
    assert lowest(np.array([1.0, 1.0, 0.0]), 2) == (1, 2)
