"""A model by parts: what the user's module computes, with small parts inside."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest

import slimline as sl

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from tests.zoo_torch import conv_bn  # noqa: E402


class Backbone(nn.Module):
    """Two levels of features, the coarse one pooled to the size of the fine one, in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep, self.lateral = conv_bn(3, 12), conv_bn(12, 16, s=2), nn.Conv2d(12, 16, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a = self.stem(x)
        b = self.deep(a)
        return {"fine": self.lateral(a) + F.interpolate(b, size=a.shape[-2:]), "coarse": b}


class BoxHead(nn.Module):
    """Called with a list of features and a keyword; has an attribute and a method that others use."""

    classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = conv_bn(16, 14), nn.Conv2d(14, self.classes, 1)

    def forward(self, features: list[Tensor], scale: float) -> list[Tensor]:
        scores = []
        for x in features:
            y = self.out(self.conv(x)) * scale
            n, c, h, w = y.shape
            scores.append(y.permute(0, 2, 3, 1).reshape(n, h * w, c))
        return scores

    def loss(self, scores: Tensor) -> Tensor:
        return scores.square().mean() * self.classes


class Detector(nn.Module):
    """Keeps the boxes over a threshold: how many there are depends on the image."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.heads = Backbone(), nn.ModuleDict({"box": BoxHead()})
        self.unused, self.final = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        features = list(self.backbone(torch.stack(images)).values())
        scores = torch.cat(self.heads["box"](features, scale=0.5), 1)
        return [{"scores": self.final(s[s.amax(1) > s.mean()])} for s in scores]


IMAGES = [torch.randn(3, 16, 20, generator=torch.Generator().manual_seed(k)) for k in range(3)]
PARTS = ["backbone", "heads.box"]
STEP = sl.ChannelPruning(ratio=0.3)


@functools.cache
def detector() -> Detector:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Detector().eval()
        for m in module.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.normal_(m.running_mean, 0, 0.2)
                nn.init.uniform_(m.running_var, 0.5, 1.5)
    return module


@functools.cache
def parted() -> sl.PartedModel:
    return sl.load(detector(), IMAGES[:1], parts=PARTS)


def same(left, right, tolerance=1e-5):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a["scores"].shape == b["scores"].shape and len(a["scores"])
        torch.testing.assert_close(a["scores"], b["scores"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("images", [IMAGES[:1], IMAGES, [torch.ones(3, 24, 12), torch.randn(3, 24, 12)]])
def test_it_computes_what_the_users_module_does_for_any_number_and_size_of_images(images):
    with torch.no_grad():
        same(parted().native(images), detector()(images))


def test_pruned_parts_stand_in_the_users_module_and_masked_ones_compute_the_same():
    plan = sl.plan(parted(), STEP)
    assert set(plan.plans) == set(PARTS)
    small, masked = plan.apply(parted()), plan.mask(parted())
    with torch.no_grad():
        same(small.native(IMAGES), masked.native(IMAGES), 1e-4)
    assert small.size < 0.75 * parted().size == 0.75 * sum(p.numel() for name, p in detector().named_parameters())
    removed = plan.plans["backbone"].removed
    assert set(removed) == {"backbone.stem.0"} and len(removed["backbone.stem.0"]) == 3
    assert small.parts["heads.box"].parameters()["heads.box.conv.0.weight"].shape == (10, 16, 3, 3)
    again = type(plan).from_json(plan.to_json(), parted())
    assert {k: p.removed for k, p in again.plans.items()} == {k: p.removed for k, p in plan.plans.items()}


def test_a_part_of_which_nothing_can_be_pruned_stays_with_a_note():
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = Backbone(), nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.backbone(x)["fine"])

    model = sl.load(Whole().eval(), IMAGES[0][None], parts=["backbone", "head"])
    plan = sl.plan(model, STEP)
    assert not plan.plans["head"].removed and plan.plans["backbone"].removed
    assert plan.plans["head"].notes[0].startswith("Nothing can be pruned: head (o): the model's output")
    small, masked = plan.apply(model), plan.mask(model)
    with torch.no_grad():
        torch.testing.assert_close(small.native(IMAGES[0][None]), masked.native(IMAGES[0][None]), rtol=1e-4, atol=1e-4)
    with pytest.raises(sl.SlimlineError, match=r"In the part 'head': head \(o\) cannot be pruned"):
        sl.plan(model, sl.ChannelPruning(ratio=0.3, layers=("head",)))


def test_what_crosses_a_part_is_frozen_with_its_reason():
    frozen = {f.name: f.reason for f in sl.plan(parted(), STEP).plans["backbone"].units.frozen}
    assert frozen["backbone.deep.0 (o)"] == "the model's output"


def test_saved_without_pickle_and_put_together_in_a_module_of_the_class(tmp_path):
    small = sl.apply(parted(), STEP)
    small.save(tmp_path / "small")
    assert {p.name for p in (tmp_path / "small").iterdir()} == {
        "parts.json", "rest.safetensors", "part-0.pt2", "part-1.pt2",
    }  # fmt: skip
    torch.manual_seed(1)
    again = sl.load(Detector().eval(), parts=tmp_path / "small")
    with torch.no_grad():
        for a, b in zip(again.native(IMAGES), small.native(IMAGES), strict=True):
            assert torch.equal(a["scores"], b["scores"])
    assert again.parts["backbone"].history == small.parts["backbone"].history
    with torch.no_grad():  # sizes are still free
        assert len(again.native([torch.randn(3, 30, 22)])) == 1
    with pytest.raises(sl.SlimlineError, match="no part in a Linear"):
        sl.load(nn.Linear(3, 3), parts=tmp_path / "small")
    with pytest.raises(sl.SlimlineError, match="not a folder that a model by parts was saved to"):
        sl.load(detector(), parts=tmp_path)


def test_it_trains_as_the_users_module_and_keeps_its_methods():
    small = sl.apply(parted(), STEP)
    before = small.parts["backbone"].parameters()["backbone.stem.0.weight"].copy()
    native = small.native.train()
    sum(x["scores"].square().sum() for x in native(IMAGES)).backward()
    reached = {name for name, p in native.named_parameters() if p.grad is not None}
    assert {name for name, _ in native.named_parameters()} - reached == {"unused.weight", "unused.bias"}
    torch.optim.SGD(native.parameters(), 1e-2).step()
    assert native.heads["box"].loss(torch.ones(2)) == 3
    native.eval()
    assert not np.array_equal(small.parts["backbone"].parameters()["backbone.stem.0.weight"], before)
    copied = copy.deepcopy(native)
    with torch.no_grad():
        same(copied(IMAGES), native(IMAGES))
        next(copied.backbone.parameters()).zero_()
        assert not torch.equal(copied(IMAGES)[0]["scores"].sum(), native(IMAGES)[0]["scores"].sum())


def test_the_users_module_stays_as_it_was():
    module = copy.deepcopy(detector()).train()
    state = copy.deepcopy(module.state_dict())
    sl.load(module, IMAGES, parts=["backbone"])
    assert module.training and module.backbone.training
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
    assert "forward" not in vars(module.backbone) and not module.backbone._forward_pre_hooks


def test_globs_are_on_the_whole_models_layers():
    plan = sl.plan(parted(), sl.ChannelPruning(ratio=0.3, layers=("heads.*",)))
    assert set(plan.plans) == {"heads.box"}
    with pytest.raises(sl.SlimlineError, match=r"no layer for keep 'heads\.bix\.conv\.0'; did you mean"):
        sl.plan(parted(), sl.ChannelPruning(ratio=0.3, keep=("heads.bix.conv.0",)))


def test_a_part_that_is_called_in_another_way_says_so():
    with pytest.raises(sl.SlimlineError, match=r"'heads\.box' is called in another way"):
        parted().native.heads["box"]([torch.ones(2, 16, 4, 4)], scale=0.5)


class Meeting(nn.Module):
    """Parts that cannot be taken out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4)
        self.c.weight = self.a.weight
        self.odd = Odd()

    def forward(self, x: Tensor) -> Tensor:
        return self.odd(self.c(self.a(self.b(x))), {1, 2})


class Odd(nn.Module):
    def forward(self, x: Tensor, things: set[int]) -> Tensor:
        return x * len(things)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (["backbon"], "no part 'backbon'; did you mean 'backbone'"),
        (["unused"], "'unused' never runs on the example inputs"),
        (["backbone", "backbone.stem"], "overlap"),
        ([], "No part was named"),
    ],
)
def test_bad_names_of_parts_are_one_sentence(parts, said):
    with pytest.raises(sl.SlimlineError, match=said):
        sl.load(detector(), IMAGES, parts=parts)


@pytest.mark.parametrize(
    ("parts", "said"), [(["a"], r"shares c\.weight with the rest"), (["odd"], "'odd' receives a set, which")]
)
def test_parts_that_cannot_be_taken_out_are_refused(parts, said):
    with pytest.raises(sl.SlimlineError, match=said):
        sl.load(Meeting(), torch.ones(2, 4), parts=parts)


def test_what_cannot_be_done_by_parts_is_refused():
    with pytest.raises(sl.SlimlineError, match="does not run on the example inputs"):
        sl.load(detector(), [torch.ones(4, 16, 16)], parts=PARTS)
    with pytest.raises(sl.SlimlineError, match="with example_inputs"):
        sl.load(detector(), parts=PARTS)
    with pytest.raises(sl.SlimlineError, match="pruned without data"):
        sl.plan(parted(), sl.ChannelPruning(ratio=0.3, criterion="taylor"))
    with pytest.raises(sl.SlimlineError, match="not pruned along kernel: prune parts"):
        sl.plan(parted(), sl.ChannelPruning(ratio=0.3, axes=("kernel",)))
    with pytest.raises(sl.SlimlineError, match="cannot be done to a model by parts"):
        sl.apply(parted(), sl.Distillation())
    with pytest.raises(sl.SlimlineError, match="In the part 'final': Nothing can be pruned"):
        sl.plan(sl.load(detector(), IMAGES, parts=["final"]), STEP)
    with pytest.raises(sl.SlimlineError, match="model by parts is pruned by"):
        sl.load(parted())
