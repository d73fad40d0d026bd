"""Residual blocks: which there are, and that leaving one out is the model with a silent branch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import slimline as sl
from slimline.graph.blocks import blocks
from slimline.graph.edits import PutTensors
from slimline.measure import outputs
from slimline.methods.depth import block_influence, relative_error
from slimline.steps.depth.plan import DepthPlan
from tests.frameworks.torch.test_rewrite import batch, captured, close
from tests.zoo_keras import SMALL as KERAS
from tests.zoo_torch import conv_bn

WITH_BLOCKS = ("resnet", "bottleneck", "mobilenet_v2", "mobilenet_v3", "convnext", "vit", "bert", "swin", "mixer")


class Twice(nn.Module):
    """Two blocks after another, with operations in place as torchvision writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 6)
        self.one = nn.Sequential(conv_bn(6, 6), nn.Conv2d(6, 6, 3, padding=1))
        self.two = nn.Sequential(conv_bn(6, 6), nn.Conv2d(6, 6, 3, padding=1))
        self.wide = nn.Sequential(conv_bn(6, 8, s=2), nn.Conv2d(8, 8, 3, padding=1))
        self.short = nn.Conv2d(6, 8, 1, 2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        kept = x * 2
        y = self.one(x)
        y += x
        y = nn.functional.relu(y, inplace=True)
        y = torch.relu_(y + self.two(y))
        y = self.wide(y) + self.short(y)
        return self.head(y.mean((2, 3))) + kept.mean()


@pytest.fixture(scope="module")
def twice() -> sl.Model:
    torch.manual_seed(0)
    return sl.load(Twice(), np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32))


def test_blocks_are_found_with_all_that_serves_them(twice):
    found = {b.name: b for b in blocks(twice.graph)}
    assert list(found) == ["one", "two", "wide"]
    for name, block in found.items():
        assert {p.partition(".")[0] for p in block.parameters} == {name}
        assert {layer.partition(".")[0] for layer in block.layers} >= {name}


@pytest.mark.parametrize("names", [["one"], ["two"], ["wide"], ["one", "two"], ["one", "two", "wide"]])
def test_without_a_block_is_with_a_silent_branch(twice, names):
    found = DepthPlan(twice.graph, names)
    small, masked = found.apply(twice), found.mask(twice)
    x = batch(twice)
    close(small.predict(*x), masked.predict(*x), 1e-6)
    assert small.graph.size == found.parameters < twice.graph.size
    assert not any(name.partition(".")[0] in names for name in small.parameters())
    before = twice.predict(*x)
    assert np.abs(before - small.predict(*x)).max() > 1e-3
    np.testing.assert_array_equal(before, twice.predict(*x))  # the model itself is as it was


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_every_block_of_a_family_can_go(name, tmp_path):
    model = captured(name)
    found = blocks(model.graph)
    assert found, name
    for block in found:
        planned = DepthPlan(model.graph, [block.name])
        close(planned.apply(model).predict(*batch(model)), planned.mask(model).predict(*batch(model)))
    small = DepthPlan(model.graph, [b.name for b in found]).apply(model)
    again = sl.load(small.save(tmp_path / "small.pt2"))
    np.testing.assert_array_equal(again.predict(*batch(model)), small.predict(*batch(model)))
    narrow = sl.apply(sl.apply(model, sl.DepthPruning(blocks=1, criterion="l2")), sl.ChannelPruning(ratio=0.3))
    assert narrow.graph.size < model.graph.size


@pytest.mark.parametrize("name", ["residual", "vit"])
def test_keras_blocks_go(name, tmp_path):
    model = sl.load(KERAS[name]())
    found = blocks(model.graph)
    assert len(found) >= 1
    x = tuple(np.random.default_rng(0).normal(size=a.shape).astype(np.float32) for a in model.example)
    for names in ([found[0].name], [b.name for b in found]):
        planned = DepthPlan(model.graph, names)
        small = planned.apply(model)
        close(small.predict(*x), planned.mask(model).predict(*x))
        assert small.graph.size == planned.parameters < model.graph.size
    again = sl.load(small.save(tmp_path / "small.keras"))
    np.testing.assert_allclose(again.predict(*x), small.predict(*x), atol=1e-6)


def test_the_artifact_is_the_model_without_the_block(twice, tmp_path):
    small = sl.apply(twice, sl.DepthPruning(blocks=("one",)))
    x = batch(twice)
    np.testing.assert_allclose(
        outputs(sl.export(small, "onnxruntime", tmp_path), x), small.predict(*x), atol=1e-5, rtol=1e-4
    )


def test_what_does_little_goes_first(twice):
    stored = twice.parameters()
    weak = {"two.1.weight": 1e-3 * stored["two.1.weight"], "two.1.bias": 0 * stored["two.1.bias"]}
    model = sl.Model(twice.adapter, twice.edit(PutTensors(weak)), twice.example)
    data = sl.Data(train=(np.random.default_rng(0).normal(size=(64, 3, 8, 8)).astype(np.float32), None))
    for criterion in ("similarity", "error"):
        found = sl.plan(model, sl.DepthPruning(blocks=1, criterion=criterion, keep=("wide",)), data)
        assert [b.name for b in found.removed] == ["two"], criterion
        assert found.scores["two"] < 1e-4 < found.scores["one"]
    assert len(sl.plan(model, sl.DepthPruning(blocks=0.7, criterion="random")).removed) == 2
    again = DepthPlan.from_json(found.to_json(), model)
    assert again.summary() == found.summary()
    assert "two: removed" in str(found)


def test_formulas():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(3, 4, 5))
    np.testing.assert_allclose(block_influence(a, 2 * a), 0, atol=1e-12)
    np.testing.assert_allclose(block_influence(a, -a), 2)
    np.testing.assert_allclose(block_influence(np.array([[1.0, 0.0]]), np.array([[0.0, 3.0]])), 1)
    np.testing.assert_allclose(block_influence(0 * a, a), 0)
    assert relative_error(a, 1.5 * a) == pytest.approx(0.25)
    assert relative_error(a, np.full_like(a, np.nan)) == float("inf")


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({"blocks": 9, "criterion": "l2"}, "remove 9 blocks, but only 3 may go"),
        ({"blocks": ("tow",)}, "did you mean 'two'"),
        ({"blocks": 1}, "needs data"),
        ({"blocks": 1, "criterion": "l2", "keep": ("nothing",)}, "nothing"),
        ({"blocks": 0}, "greater than or equal to 1"),
        ({"blocks": 1.5}, "DepthPruning"),
    ],
)
def test_bad_requests_are_one_sentence(twice, step, said):
    with pytest.raises(sl.SlimlineError, match=said):
        sl.plan(twice, sl.DepthPruning(**step))


def test_a_model_without_blocks_is_refused():
    with pytest.raises(sl.SlimlineError, match="no residual block"):
        sl.plan(captured("vgg"), sl.DepthPruning(blocks=1, criterion="l2"))
