"""Building blocks of public model zoos: each is pruned by the rules alone, and computes removed what it does masked."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm

from slimline.frameworks.base import adapter
from slimline.graph.units import Units
from slimline.model import Model
from slimline.plans import Plan
from slimline.steps.channels.selection import plan
from slimline.steps.channels.step import ChannelPruning

TORCH = adapter("torch")
RNG = np.random.default_rng(0)
TOKENS = RNG.standard_normal((2, 8, 16)).astype(np.float32)
IMAGES = RNG.standard_normal((2, 3, 8, 8)).astype(np.float32)
Function = Callable[..., Tensor]


class Block(nn.Module):
    """A function of a block's own layers (``b.layers``) and of what a first layer made of 16 channels."""

    def __init__(self, function: Function, images: bool, width: int = 16, **layers: nn.Module | Tensor) -> None:
        super().__init__()
        self.first: nn.Module = nn.Conv2d(3, 16, 3, padding=1) if images else nn.Linear(16, 16)
        self.function, self.images = function, images
        self.last = nn.Linear(width, 5)
        for name, layer in layers.items():
            if isinstance(layer, nn.Module):
                self.add_module(name, layer)
            elif layer.requires_grad:
                self.register_parameter(name, nn.Parameter(layer.detach()))
            else:
                self.register_buffer(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(self, self.first(x))
        return self.last(y.mean((2, 3)) if self.images else y)


def learned(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()


class Standardised(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        variance, mean = torch.var_mean(weight, dim=(1, 2, 3), keepdim=True, unbiased=False)
        return (weight - mean) / torch.sqrt(variance + 1e-5)


def standardised() -> nn.Module:
    conv = nn.Conv2d(16, 16, 3, padding=1)
    parametrize.register_parametrization(conv, "weight", Standardised())
    return conv


def by_batch_norm(b, x):
    weight = b.conv.weight.reshape(1, 16, -1)
    weight = F.batch_norm(weight, None, None, b.gain, training=True, momentum=0.0).reshape_as(b.conv.weight)
    return b.after(F.relu(F.conv2d(x, weight, b.conv.bias, padding=1)))


def by_deviation(b, x):
    return b.after(b.scale * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-3))


def channel_attention(b, x):
    scale = b.up(F.relu(b.down(F.adaptive_max_pool2d(x, 1)))).sigmoid() * x
    maps = torch.cat([scale.mean(1, keepdim=True), scale.max(1, keepdim=True)[0]], 1)
    return scale * b.map(maps).sigmoid()


def unpooled(b, x):
    y, places = F.max_pool2d(b.conv(x), 2, return_indices=True)
    return F.max_unpool2d(y, places, 2)


def batch_in_groups(b, x):
    n, c, h, w = x.shape
    mixed = (b.route(x.mean((2, 3))).sigmoid() @ b.experts).view(n * 16, c, 3, 3)
    return F.conv2d(x.reshape(1, n * c, h, w), mixed, padding=1, groups=n).view(n, 16, h, w)


def fourier(b, x):
    y = torch.fft.rfft2(b.conv(x), norm="ortho") * torch.view_as_complex(b.filter)[:, None]
    return torch.fft.irfft2(y, s=x.shape[-2:], norm="ortho")


def rotated(b, x):
    table = torch.outer(torch.arange(8.0), 10 ** -torch.arange(2.0))
    turn = torch.polar(torch.ones_like(table), table)[:, None]

    def spin(y: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2))) * turn).flatten(3)

    q, k, v = (f(x).unflatten(-1, (4, 4)) for f in (b.q, b.k, b.v))
    y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (spin(q), spin(k), v)))
    return x + b.o(y.transpose(1, 2).flatten(2))


def one_key_head(b, x):
    q, k, v = b.q(x).unflatten(-1, (4, 4)).transpose(1, 2), b.k(x)[:, None], b.v(x)[:, None]
    return b.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def joined_bias(b, x):
    bias = torch.cat([b.query_bias, torch.zeros_like(b.value_bias), b.value_bias])
    q, k, v = F.linear(x, b.qkv.weight, bias).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
    return b.o(((F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


def sinusoids(b, x):
    angle = torch.arange(8)[:, None] / 100 ** (torch.arange(0, 16, 2) / 16)
    return b.o(x + torch.cat([angle.sin(), angle.cos()], -1))


def recurrence(b, x):
    state, outputs = torch.zeros(x.shape[0], 24), []
    for t in range(4):
        state = torch.tanh(b.into(x[:, t]) + b.gate * state)
        outputs.append(state)
    return b.o(torch.stack(outputs, 1))


def masked(b, x):
    return b.attention(x, x, x, key_padding_mask=x[..., 0] > 9, need_weights=False)[0]


def linears(*names: str, wide: int = 16) -> dict[str, nn.Module]:
    return {name: nn.Linear(16, wide if name != "o" else 16) for name in names}


def conv(i: int = 16, o: int = 16, k: int = 3) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "weight standardisation": lambda: Block(
        lambda b, x: b.after(F.relu(b.conv(x))), True, conv=standardised(), after=conv(k=1)
    ),
    "weights by a batch norm": lambda: Block(by_batch_norm, True, conv=conv(), after=conv(k=1), gain=learned(16)),
    "spectral norm": lambda: Block(
        lambda b, x: b.new(F.relu(b.old(x))),
        True,
        old=spectral_norm(conv()),
        new=parametrizations.spectral_norm(conv()),
    ),
    "orthogonal": lambda: Block(lambda b, x: b.inner(x), False, inner=parametrizations.orthogonal(nn.Linear(16, 16))),
    "norm by deviation": lambda: Block(by_deviation, False, scale=learned(16), after=nn.Linear(16, 16)),
    "channel and spatial attention": lambda: Block(
        channel_attention, True, down=conv(16, 8, 1), up=conv(8, 16, 1), map=nn.Conv2d(2, 1, 7, padding=3)
    ),
    "max unpooling": lambda: Block(unpooled, True, conv=conv()),
    "batch in groups": lambda: Block(batch_in_groups, True, route=nn.Linear(16, 4), experts=learned(4, 16 * 16 * 9)),
    "global filter": lambda: Block(fourier, True, conv=conv(), filter=learned(16, 5, 2)),
    "complex rotary": lambda: Block(rotated, False, **linears("q", "k", "v", "o")),
    "one key head": lambda: Block(
        one_key_head, False, q=nn.Linear(16, 16), k=nn.Linear(16, 4), v=nn.Linear(16, 4), o=nn.Linear(16, 16)
    ),
    "a bias joined of three": lambda: Block(
        joined_bias, False, qkv=nn.Linear(16, 48, False), query_bias=learned(16), value_bias=learned(16), **linears("o")
    ),
    "sinusoidal positions": lambda: Block(sinusoids, False, **linears("o")),
    "a loop from a state of zeros": lambda: Block(
        recurrence, False, into=nn.Linear(16, 24), gate=learned(24), o=nn.Linear(24, 16)
    ),
    "padding mask": lambda: Block(masked, False, attention=nn.MultiheadAttention(16, 4, batch_first=True)),
    "bilinear": lambda: Block(lambda b, x: b.o(b.both(x, x)), False, both=nn.Bilinear(16, 16, 16), **linears("o")),
    "cosine similarity": lambda: Block(
        lambda b, x: x * F.cosine_similarity(b.q(x), b.k(x), dim=-1)[..., None], False, **linears("q", "k")
    ),
    "shortcut of zeros": lambda: Block(
        lambda b, x: b.conv(x) + torch.cat([x, x.new_zeros(x.shape[0], 8, 8, 8)], 1), True, 24, conv=conv(16, 24)
    ),
    "product with a vector": lambda: Block(
        lambda b, x: x * (b.q(x) @ b.vector)[..., None], False, vector=learned(16), **linears("q")
    ),
    "blur of every channel": lambda: Block(
        lambda b, x: F.conv2d(b.conv(x), b.blur.repeat(16, 1, 1, 1), groups=16),
        True,
        conv=conv(),
        blur=torch.rand(1, 1, 3, 3),
    ),
    "encoder with a causal mask": lambda: Block(
        lambda b, x: b.encoder(x, mask=nn.Transformer.generate_square_subsequent_mask(8)),
        False,
        encoder=nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True), 1, enable_nested_tensor=False
        ),
    ),
    "additive mask in a buffer": lambda: Block(
        lambda b, x: b.attention(x, x, x, attn_mask=b.mask, need_weights=False)[0],
        False,
        attention=nn.MultiheadAttention(16, 4, batch_first=True),
        mask=torch.full((8, 8), -math.inf).triu(1),
    ),
}


def model_of(module: nn.Module) -> Model:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    example = IMAGES if getattr(module, "images", False) else TOKENS
    return Model(TORCH, *TORCH.load(module.eval(), (example,)))


def agree(model: Model, found: Plan) -> None:
    (x,) = model.example
    more = np.concatenate([x, x[:1] * 0.7])
    before, small, masked_ = (m.predict(more) for m in (model, found.apply(model), found.mask(model)))
    assert np.abs(small - masked_).max() <= 1e-5 * np.abs(masked_).max()
    assert np.abs(before - masked_).max() > 1e-3 * np.abs(before).max()


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_pruned_exactly(name):
    model = model_of(BLOCKS[name]())
    found = plan(model, ChannelPruning(ratio=0.4, factors="all"))
    assert found.parameters <= 0.75 * model.graph.size
    agree(model, found)


def test_heads_go_with_the_mask_that_was_expanded_over_them():
    units = Units(model_of(BLOCKS["padding mask"]()).graph).units
    assert sorted(u.size for u in units) == [4, 4, 15, 16]  # heads, their width, the input but the channel that is read


def test_a_table_that_is_computed_from_positions_is_stored_and_sliced():
    model = model_of(BLOCKS["sinusoidal positions"]())
    (table,) = (n for n in model.graph.parameters if model.graph.values[n].shape == (8, 16))
    small = Plan(Units(model.graph), {"first": (1, 5, 9)}).apply(model)
    assert small.graph.values[table].shape == (8, 13)
    angle = np.arange(8)[:, None] / 100 ** (np.arange(0, 16, 2) / 16)
    wanted = np.concatenate([np.sin(angle), np.cos(angle)], -1)
    np.testing.assert_allclose(model.parameters()[table], wanted, rtol=1e-4, atol=1e-6)


def test_spectral_norm_is_the_same_weight_under_its_plain_name():
    module = BLOCKS["spectral norm"]()
    with torch.no_grad():
        wanted = module.eval()(torch.from_numpy(IMAGES)).numpy()
    model = Model(TORCH, *TORCH.load(module, (IMAGES,)))
    assert {"old.weight", "new.weight"} <= set(model.parameters())
    np.testing.assert_allclose(model.predict(IMAGES), wanted, rtol=1e-5, atol=1e-6)
    assert isinstance(module.new.parametrizations.weight[0], nn.Module)  # the user's own is as it was


def test_embedding_bags_keep_their_rows_and_lose_their_width():
    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.last = nn.EmbeddingBag(20, 16), nn.Linear(16, 5)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.last(self.bag(tokens))

    tokens = np.random.default_rng(0).integers(0, 20, (2, 6))
    model = Model(TORCH, *TORCH.load(Bags().eval(), (tokens,)))
    found = Plan(Units(model.graph), {"bag": (0, 3, 7)})
    assert found.shape("bag.weight") == (20, 13)
    np.testing.assert_allclose(
        found.apply(model).predict(tokens), found.mask(model).predict(tokens), rtol=1e-4, atol=1e-6
    )


def test_a_tensor_that_an_input_is_written_into_is_not_stored():
    def write(b: nn.Module, x: Tensor) -> Tensor:
        y = torch.linspace(0, 1, 24).expand(x.shape[0], 8, 24).clone()
        y[:, :, :16] = x
        return b.o(y)

    module = Block(write, False, o=nn.Linear(24, 16))
    model = model_of(module)
    with torch.no_grad():
        np.testing.assert_allclose(model.predict(TOKENS + 1), module(torch.from_numpy(TOKENS + 1)).numpy(), rtol=1e-4)
    assert not np.allclose(model.predict(TOKENS), model.predict(TOKENS + 1))
