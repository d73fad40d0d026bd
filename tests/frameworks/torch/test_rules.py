"""Operators that take some dimensions whole: what passes is pruned exactly, what they rank or mix stays."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import slimline as sl
from slimline.frameworks.base import adapter
from slimline.graph.units import Units
from slimline.model import Model
from slimline.plans import Plan

TORCH = adapter("torch")
TOKENS = np.random.default_rng(0).standard_normal((2, 6, 8)).astype(np.float32)
IMAGES = np.random.default_rng(0).standard_normal((2, 3, 6, 6)).astype(np.float32)


class Between(nn.Module):
    """A linear layer over tokens, any function of its 12 channels, and another layer."""

    def __init__(self, function, width: int, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.function = layer or nn.Linear(8, 12), function
        self.last = nn.Linear(width, 5)

    def forward(self, x):
        return self.last(self.function(self.first(x)))


def model_of(module: nn.Module, *inputs: np.ndarray) -> Model:
    torch.manual_seed(0)
    for p in module.parameters():
        nn.init.normal_(p, 0, 0.5)
    return Model(TORCH, *TORCH.load(module.eval(), inputs))


def exact(model: Model, removed: dict[str, tuple[int, ...]]) -> Plan:
    """`apply` computes what `mask` does, and something else than the model."""
    plan = Plan(Units(model.graph), removed)
    inputs = tuple(np.resize(x * 0.7, (3, *x.shape[1:])).astype(x.dtype) for x in model.example)
    before, small, masked = (m.predict(*inputs) for m in (model, plan.apply(model), plan.mask(model)))
    assert np.abs(small - masked).max() <= 1e-5 * np.abs(masked).max()
    assert np.abs(before - masked).max() > 1e-3 * np.abs(before).max()
    return plan


PASSES = {
    "max over tokens": (lambda x: x.max(1)[0], 12),
    "max with its place": (lambda x: x.max(1, keepdim=True)[0][:, 0], 12),
    "sorted tokens": (lambda x: x.sort(1)[0][:, 0], 12),
    "top tokens": (lambda x: x.topk(2, 1)[0].sum(1), 12),
    "deviation over tokens": (lambda x: x.std(1), 12),
    "median over tokens": (lambda x: x.median(1)[0], 12),
    "einsum with dots": (lambda x: torch.einsum("...c,...c->...c", x, x.tanh()), 12),
    "einsum without an output": (lambda x: torch.einsum("...c,...d", x[..., :6], x[..., 6:]).flatten(2), 36),
    "sliding windows": (lambda x: x.unfold(1, 3, 1).mean(-1), 12),
    "divided by its length": (lambda x: x / x.norm(dim=1, keepdim=True), 12),
    "one over it": (lambda x: (x.square() + x.amax(1, keepdim=True).square()).rsqrt(), 12),
    "resized with antialiasing": (
        lambda x: F.interpolate(x.mT[..., None], (4, 1), mode="bilinear", antialias=True)[..., 0].mT,
        12,
    ),
    "resized exactly": (lambda x: F.interpolate(x.mT, 4, mode="nearest-exact").mT, 12),
    "a window of one": (lambda x: F.avg_pool2d(x[:, None], (2, 1), (2, 1))[:, 0], 12),
    "overlapping windows of one": (lambda x: F.max_pool2d(x[:, None], (3, 1), 1)[:, 0], 12),
    "what torch calls pointwise": (lambda x: torch.special.i0e(x) + torch.xlogy(x.abs() + 1, x.cosh()), 12),
    "by another name": (lambda x: torch.multiply(x, 2).subtract(x.absolute()).divide(3), 12),
    "outer product": (lambda x: torch.outer(torch.ones(6), x.mean((0, 1)))[None], 12),
    "two indices": (lambda x: x[torch.tensor([0, 1, 1])[:2], torch.tensor([4, 2])], 12),
}


@pytest.mark.parametrize("name", PASSES)
def test_other_dimensions_pass(name):
    function, width = PASSES[name]
    model = model_of(Between(function, width), TOKENS)
    if name == "two indices":  # it fixes the batch
        plan = Plan(Units(model.graph), {"first": (1, 4, 9)})
        np.testing.assert_allclose(plan.apply(model).predict(TOKENS), plan.mask(model).predict(TOKENS), rtol=1e-4)
        return
    units = {u.name: u.size for u in Units(model.graph).units}
    assert sum(units.values()) == 12
    exact(model, {name: (1, size - 2) for name, size in units.items()})


@pytest.mark.parametrize(
    ("function", "width", "said"),
    [
        (lambda x: x.max(-1, keepdim=True)[1].float(), 1, "aten.max"),
        (lambda x: x.sort(-1)[0], 12, "aten.sort"),
        (lambda x: x.topk(4, -1)[0], 4, "aten.topk"),
        (lambda x: x.median(-1, keepdim=True)[0], 1, "aten.median"),
        (lambda x: x.unfold(-1, 4, 4).mean(-1), 3, "aten.unfold"),
        (lambda x: F.avg_pool1d(x, 1, 2), 6, "aten.avg_pool1d"),
        (lambda x: F.max_pool2d(x, (1, 3), (1, 1)), 10, "aten.max_pool2d"),
        (lambda x: F.max_pool1d(x, 1, dilation=2, padding=0, stride=3), 4, "aten.max_pool1d"),
        (lambda x: torch.frexp(x).mantissa, 12, "aten.frexp"),
        (lambda x: x[..., torch.tensor([[1, 2], [3, 4]])].flatten(2), 4, "aten.index"),
    ],
)
def test_the_dimension_that_is_ranked_or_mixed_stays_whole(function, width, said):
    units = Units(model_of(Between(function, width), TOKENS).graph)
    assert units.units == ()
    assert units.frozen[0].name == "first (o)" and units.frozen[0].reason.startswith(said)


def test_a_token_picked_by_a_computed_index_keeps_its_width_prunable():
    class Picked(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.first, self.last = nn.Embedding(9, 8), nn.Linear(8, 12), nn.Linear(12, 5)

        def forward(self, tokens):
            x = self.first(self.embed(tokens))
            return self.last(x[torch.arange(x.shape[0]), tokens.argmax(-1)])

    tokens = np.random.default_rng(0).integers(0, 9, (2, 6))
    plan = exact(model_of(Picked(), tokens), {"first": (0, 5), "embed": (3,)})
    assert plan.shape("last.weight") == (5, 10)


def test_gather_passes_the_dimensions_its_index_goes_over():
    class Gathered(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.at, self.last = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 5)

        def forward(self, x):
            return self.last(self.first(x).gather(1, (self.at(x) > 0).long()))

    exact(model_of(Gathered(), TOKENS), {"first": (1, 7)})


def test_patches_of_an_image_keep_its_channels():
    def patches(x):
        return F.unfold(x, 3, padding=1).transpose(1, 2)

    model = model_of(Between(patches, 8 * 9, nn.Conv2d(3, 8, 1)), IMAGES)
    assert exact(model, {"first": (2, 3)}).shape("last.weight") == (5, 54)

    def back(x):
        return F.fold(F.unfold(x, 2, stride=2), (6, 6), 2, stride=2).flatten(2).transpose(1, 2)

    exact(model_of(Between(back, 8, nn.Conv2d(3, 8, 1)), IMAGES), {"first": (2, 3)})


def test_query_groups_share_keys_and_values():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = nn.Linear(8, 24), nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(24, 5)

        def forward(self, x):
            q, k, v = (f(x).unflatten(-1, (-1, 3)).transpose(1, 2) for f in (self.q, self.k, self.v))
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            return self.o(y.transpose(1, 2).flatten(2))

    model = model_of(Grouped(), TOKENS)
    sizes = {u.name: u.size for u in Units(model.graph).units}
    heads = [name for name, size in sizes.items() if size in (2, 4)]
    assert sorted(sizes.values()) == [2, 3, 3, 4]
    for name in sizes:
        exact(model, {name: (1,)})
    exact(model, dict.fromkeys(heads, (1,)))


def test_a_product_added_to_a_bias_is_masked_in_its_sum():
    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.last = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(6, 5)

        def forward(self, x):
            return self.last(torch.baddbmm(torch.ones(1, 6, 6), self.q(x), self.k(x).transpose(1, 2)))

    exact(model_of(Scores(), TOKENS), {"q": (0, 3, 11)})


def mixed(kernel: int, **how: int):
    """A model whose tokens are 12 channels of a linear layer to a convolution in one dimension, and its input."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.mix, self.last = nn.Linear(8, 12), nn.Conv1d(6, 10, kernel, **how), nn.LazyLinear(5)

        def forward(self, x):
            return self.last(self.mix(self.first(x)))

    module = Mixed()
    module(torch.from_numpy(TOKENS))
    return model_of(module, TOKENS)


@pytest.mark.parametrize("how", [{}, {"groups": 2}, {"bias": False}, {"padding": "same"}])
def test_a_convolution_that_looks_at_one_place_passes_the_places(how):
    model = mixed(1, **how)
    plan = exact(model, {"first": (1, 7, 8)})
    assert plan.shape("last.weight") == (5, 9) and plan.shape("mix.weight") == model.graph.values["mix.weight"].shape
    data = sl.Data(calibration=np.random.default_rng(3).standard_normal((40, 6, 8)).astype(np.float32))
    for criterion in ("obs", "l2"):
        found = sl.plan(model, sl.ChannelPruning(ratio=0.5, criterion=criterion), data)
        np.testing.assert_allclose(found.apply(model).predict(TOKENS), found.mask(model).predict(TOKENS), atol=1e-4)


@pytest.mark.parametrize(("kernel", "how"), [(3, {"padding": 1}), (1, {"stride": 2}), (1, {"padding": 1})])
def test_a_convolution_that_moves_places_keeps_them(kernel, how):
    units = Units(mixed(kernel, **how).graph)
    assert units.frozen[0].name == "first (o)" and units.frozen[0].reason == "aten.conv1d in mix"


def test_a_divisor_of_what_goes_is_no_zero():
    """Sinusoidal tables divide by powers that are stored: by a zero they would be no number."""

    class Divided(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.scale, self.last = nn.Linear(8, 12), nn.Parameter(torch.ones(12)), nn.Linear(12, 5)
            self.register_buffer("powers", torch.arange(1.0, 13.0))

        def forward(self, x):
            y = self.first(x).abs()
            angles = x.mean(-1, keepdim=True) / self.powers
            scale = self.scale.abs()
            return self.last(angles.sin() + y.rsqrt() + y.log() + y / scale + 2 / scale + y.pow(-1))

    model = model_of(Divided(), TOKENS)
    (unit,) = Units(model.graph).units
    exact(model, {unit.name: (0, 7)})


def test_complex_pairs_behind_a_cut_of_odd_width():
    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.down = nn.Linear(8, 6 + 4), nn.Linear(6, 3)
            self.last = nn.Linear(4, 3)

        def forward(self, x):
            low, pairs = self.first(x).split([6, 4], -1)
            turned = torch.view_as_complex(pairs.unflatten(-1, (2, 2))) * torch.polar(torch.ones(2), torch.arange(2.0))
            return self.down(low) + self.last(torch.view_as_real(turned).flatten(-2))

    model = model_of(Pairs(), TOKENS)
    name = next(u.name for u in Units(model.graph).units if u.size == 6)
    exact(model, {name: (1, 2, 5)})


def test_complex_numbers_that_move_are_exported(tmp_path):
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 3)
            self.register_buffer("turns", torch.polar(torch.ones(6, 2), torch.arange(12.0).reshape(6, 2)))

        def forward(self, x):
            pairs = torch.view_as_complex(self.first(x).unflatten(-1, (3, 2, 2)))  # batch, tokens, heads, pairs
            turned = pairs * self.turns.unsqueeze(-2)
            turned = turned + pairs.select(-2, 1).unsqueeze(2).expand(-1, -1, 3, -1)
            return self.last(torch.view_as_real(turned).flatten(2))

    model = model_of(Turned(), TOKENS)
    path = sl.export(model, "onnxruntime", tmp_path)
    tokens = np.asarray(model.example[0])
    np.testing.assert_allclose(sl.load(path).outputs(tokens)[0], model.outputs(tokens)[0], rtol=1e-4, atol=1e-6)


def grouped(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """As transformers registers it: rows sorted by expert, each run times its matrix."""
    starts = [0, *ends.tolist()]
    runs = [rows[a:b] @ w for a, b, w in zip(starts, starts[1:], weight, strict=False)]
    return torch.cat([*runs, rows.new_zeros(len(rows) - starts[-1], weight.shape[2])])


@pytest.fixture(scope="module")
def experts():
    try:
        return torch.ops.transformers.grouped_mm_fallback  # transformers is here
    except AttributeError:
        library = torch.library.Library("transformers", "FRAGMENT")
        library.define("grouped_mm_fallback(Tensor input, Tensor weight, Tensor offs) -> Tensor")
        library.impl("grouped_mm_fallback", grouped, "CPU")
        library.impl("grouped_mm_fallback", lambda x, w, _: x.new_empty(x.shape[0], w.shape[2]), "Meta")
        yield torch.ops.transformers.grouped_mm_fallback
        library._destroy()


class Routed(nn.Module):
    """Each row goes to one of three experts."""

    def __init__(self, experts) -> None:
        super().__init__()
        self.first, self.router, self.last = nn.Linear(8, 12), nn.Linear(12, 3), nn.Linear(12, 5)
        self.up, self.down = nn.Parameter(torch.randn(3, 12, 9)), nn.Parameter(torch.randn(3, 12, 9))
        self.experts = experts

    def forward(self, x):
        rows = self.first(x).flatten(0, 1)
        chosen, order = self.router(rows).argmax(-1).sort()
        ends = torch.histc(chosen.float(), 3, 0, 2).cumsum(0).int()
        wide = self.experts(rows[order], self.up, ends)
        back = self.experts(F.relu(wide), self.down.transpose(-1, -2), ends)
        return self.last(back[order.argsort()]).unflatten(0, (-1, 6))


def test_experts_lose_their_widths_and_none_of_them_goes(experts):
    model = model_of(Routed(experts), TOKENS)
    units = Units(model.graph)
    sizes = {u.size: u.name for u in units.units}
    assert set(sizes) == {9, 12} and len(units.units) == 3
    for unit in units.units:
        exact(model, {unit.name: (2, 5)})
    plan = exact(model, {sizes[9]: (0,)})
    assert plan.shape("up") == (3, 12, 8) and plan.shape("down") == (3, 12, 8)


def test_experts_are_saved_and_exported(experts, tmp_path, monkeypatch):
    model = model_of(Routed(experts), TOKENS)
    saved = model.save(tmp_path / "model.pt2")
    assert np.array_equal(sl.load(saved).predict(TOKENS), model.predict(TOKENS))
    sl.export(model, "onnxruntime", tmp_path)  # which compares the answers

    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 8, 5))
            self.register_buffer("ends", torch.tensor([1, 1, 4]))

        def forward(self, x):
            return experts(x.flatten(0, 1), self.weight, self.ends).unflatten(0, (-1, 6))

    direct = model_of(Direct(), TOKENS)
    assert not direct.predict(TOKENS)[0, 4:].any(), "past the last expert's rows"
    sl.export(direct, "onnxruntime", tmp_path)
    empty = SimpleNamespace(aten=torch.ops.aten, transformers=SimpleNamespace())  # as where nobody imported it
    monkeypatch.setattr("slimline.frameworks.torch.allowed.torch", SimpleNamespace(ops=empty))
    with pytest.raises(sl.SlimlineError, match="import transformers"):
        sl.load(saved)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_view_takes_any_memory_layout_also_where_it_was_written(in_place):
    class Viewed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 1), nn.Linear(8, 5)

        def forward(self, x):
            y = self.first(x)
            flat = y.view(x.shape[0], 8, 36)
            if in_place:
                flat.mul_(2.0)
            return self.last((flat if not in_place else y.flatten(2)).mean(-1))

    plan = exact(model_of(Viewed(), IMAGES), {"first": (1, 4)})
    last = torch.from_numpy(IMAGES).to(memory_format=torch.channels_last)
    for native in (plan.apply(model_of(Viewed(), IMAGES)).native, plan.mask(model_of(Viewed(), IMAGES)).native):
        assert not native.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default)
        torch.testing.assert_close(native(last), native(last.contiguous()))


def test_a_scale_in_bfloat16_is_cut_like_any_other():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 5)
            self.register_buffer("scale", torch.linspace(1, 2, 12, dtype=torch.bfloat16))

        def forward(self, x):
            return self.last(self.first(x) * self.scale.float())

    model = model_of(Scaled(), TOKENS)
    assert model.parameters()["scale"].dtype == np.float32
    (unit,) = Units(model.graph).units
    small = exact(model, {unit.name: (2, 3)}).apply(model)
    assert small.native.scale.dtype == torch.bfloat16 and small.native.scale.shape == (10,)
