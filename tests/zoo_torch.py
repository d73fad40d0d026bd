"""Small versions of the network families that slimline claims, with random weights and random statistics.

``ZOO[name]`` is ``(factory, example)``: ``factory()`` gives a module in evaluation mode, ``example()`` its
inputs as arrays of batch 2. Both are seeded.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn(i: int, o: int, k: int = 3, s: int = 1, groups: int = 1, act: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(i, o, k, s, k // 2, groups=groups, bias=False), nn.BatchNorm2d(o), act or nn.ReLU(inplace=True)
    )


class Head(nn.Module):
    def __init__(self, width: int, classes: int = 5) -> None:
        super().__init__()
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class PlainCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 16, 3, dilation=2)
        self.fc1, self.fc2 = nn.Linear(16 * 5 * 5, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2, ceil_mode=True)
        x = F.relu(self.conv2(F.pad(x, (1, 1, 1, 1))))
        return self.fc2(F.dropout(torch.tanh(self.fc1(x.view(x.size(0), -1))), 0.2, self.training))


def vgg() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 10), conv_bn(10, 12), nn.MaxPool2d(2), conv_bn(12, 16), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(16 * 16, 24), nn.ReLU(), nn.Dropout(0.5), nn.Linear(24, 5),
    )  # fmt: skip


class Residual(nn.Module):
    def __init__(self, i: int, o: int, stride: int = 1, mid: int | None = None, groups: int = 1) -> None:
        super().__init__()
        if mid is None:
            self.body = nn.Sequential(conv_bn(i, o, 3, stride), conv_bn(o, o, act=nn.Identity()))
        else:
            self.body = nn.Sequential(
                conv_bn(i, mid, 1), conv_bn(mid, mid, 3, stride, groups), conv_bn(mid, o, 1, act=nn.Identity())
            )
        self.short = nn.Identity() if i == o and stride == 1 else conv_bn(i, o, 1, stride, act=nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        y += self.short(x)
        return F.relu(y)


def resnet() -> nn.Module:
    return nn.Sequential(conv_bn(3, 10), Residual(10, 10), Residual(10, 16, 2), Residual(16, 16), Head(16))


def bottleneck(groups: int = 1) -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 16), Residual(16, 24, 1, 12, groups), Residual(24, 24, 1, 12, groups),
        Residual(24, 32, 2, 16, groups), Head(32),
    )  # fmt: skip


class DenseLayer(nn.Module):
    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, 2 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * growth), nn.Conv2d(2 * growth, growth, 3, 1, 1, bias=False)

    def forward(self, *features: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(F.relu(self.norm2(y)))


class DenseBlock(nn.Module):
    def __init__(self, width: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DenseLayer(width + k * growth, growth) for k in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(*features))
        return torch.cat(features, 1)


def densenet() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 10), DenseBlock(10, 6, 3), nn.BatchNorm2d(28), nn.ReLU(inplace=True), nn.Conv2d(28, 14, 1),
        nn.AvgPool2d(2), DenseBlock(14, 6, 2), nn.BatchNorm2d(26), nn.ReLU(), Head(26),
    )  # fmt: skip


class InceptionBlock(nn.Module):
    def __init__(self, i: int) -> None:
        super().__init__()
        self.a = conv_bn(i, 6, 1)
        self.b = nn.Sequential(conv_bn(i, 5, 1), conv_bn(5, 8))
        self.c = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_bn(i, 7, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x), self.c(x), F.avg_pool2d(x, 3, 1, 1)], 1)


def inception() -> nn.Module:
    return nn.Sequential(conv_bn(3, 8), InceptionBlock(8), InceptionBlock(29), Head(50))


class SqueezeExcite(nn.Module):
    def __init__(self, width: int, mid: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, mid, 1), nn.Conv2d(mid, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


class InvertedResidual(nn.Module):
    def __init__(self, i: int, mid: int, o: int, stride: int, act: Callable[[], nn.Module], squeeze: bool) -> None:
        super().__init__()
        self.expand, self.depthwise = conv_bn(i, mid, 1, act=act()), conv_bn(mid, mid, 3, stride, mid, act())
        self.squeeze = SqueezeExcite(mid, 6) if squeeze else nn.Identity()
        self.project = conv_bn(mid, o, 1, act=nn.Identity())
        self.skip = i == o and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.squeeze(self.depthwise(self.expand(x))))
        return x + y if self.skip else y


def mobilenet(act: Callable[[], nn.Module], squeeze: bool) -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 8, act=act()), InvertedResidual(8, 16, 10, 2, act, squeeze),
        InvertedResidual(10, 20, 10, 1, act, squeeze), InvertedResidual(10, 24, 12, 1, act, squeeze),
        conv_bn(12, 30, 1, act=act()), Head(30),
    )  # fmt: skip


class ShuffleUnit(nn.Module):
    def __init__(self, width: int, down: bool) -> None:
        super().__init__()
        half, stride = width // 2, 2 if down else 1
        i = width if down else half
        o = width if down else half
        self.down = down
        self.right = nn.Sequential(conv_bn(i, o, 1), conv_bn(o, o, 3, stride, o, nn.Identity()), conv_bn(o, o, 1))
        if down:
            self.left = nn.Sequential(conv_bn(i, i, 3, stride, i, nn.Identity()), conv_bn(i, o, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.down:
            y = torch.cat((self.left(x), self.right(x)), 1)
        else:
            a, b = x.chunk(2, 1)
            y = torch.cat((a, self.right(b)), 1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def shufflenet() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 8),
        ShuffleUnit(8, True),
        ShuffleUnit(16, False),
        ShuffleUnit(16, False),
        conv_bn(16, 24, 1),
        Head(24),
    )


class ConvNeXtBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width, 1e-6)
        self.fc1, self.fc2 = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.gamma = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.fc2(F.gelu(self.fc1(y)))
        return x + y.permute(0, 3, 1, 2)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 12, 4, 4), LayerNorm2d(12), ConvNeXtBlock(12), LayerNorm2d(12), nn.Conv2d(12, 20, 2, 2),
            ConvNeXtBlock(20),
        )  # fmt: skip
        self.norm, self.head = nn.LayerNorm(20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x).mean([-2, -1])))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = conv_bn(3, 8), conv_bn(8, 12), conv_bn(12, 20)
        self.up2, self.up1 = nn.ConvTranspose2d(20, 12, 2, 2), nn.ConvTranspose2d(12, 8, 2, 2)
        self.merge2, self.merge1 = conv_bn(24, 12), conv_bn(16, 8)
        self.final = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        y = self.up2(self.middle(F.max_pool2d(b, 2)))
        y = self.up1(self.merge2(torch.cat([y, b], 1)))
        y = self.merge1(torch.cat([F.interpolate(y, scale_factor=1.0, mode="bilinear"), a], 1))
        return self.final(y)


class FusedAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.head_width).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(b, n, c))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = FusedAttention(width, heads), MLP(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, width: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.cls, self.pos = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 17, width))
        self.blocks = nn.Sequential(Block(width, heads), Block(width, heads))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
        return self.head(self.norm(self.blocks(x))[:, 0])


class BertLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out, self.norm1 = nn.Linear(width, width), nn.LayerNorm(width)
        self.mlp, self.norm2 = MLP(width, 2 * width), nn.LayerNorm(width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = (f(x).view(b, n, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        scores = torch.matmul(q, k.transpose(-1, -2)) / (c // self.heads) ** 0.5 + mask
        y = torch.matmul(self.drop(torch.softmax(scores, -1)), v).permute(0, 2, 1, 3).contiguous().view(b, n, -1)
        x = self.norm1(x + self.drop(self.out(y)))
        return self.norm2(x + self.mlp(x))


class Bert(nn.Module):
    def __init__(self, width: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(30, width), nn.Embedding(12, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(BertLayer(width, heads) for _ in range(2))
        self.pooler, self.head = nn.Linear(width, width), nn.Linear(width, 3)
        self.register_buffer("ids", torch.arange(12)[None], persistent=False)

    def forward(self, tokens: Tensor, attend: Tensor) -> Tensor:
        mask = (1.0 - attend[:, None, None, :].to(torch.float32)) * -1e4
        x = self.norm(self.words(tokens) + self.positions(self.ids[:, : tokens.shape[1]]))
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(torch.tanh(self.pooler(x[:, 0])))


class TiedLM(nn.Module):
    """An encoder of torch's own layers whose output projection is the embedding."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.encoder = nn.TransformerEncoderLayer(width, 4, 32, batch_first=True, norm_first=True)
        self.head = nn.Linear(width, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(tokens)))


class WindowAttention(nn.Module):
    def __init__(self, width: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        at = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        relative = (at[:, :, None] - at[:, None, :]).permute(1, 2, 0) + window - 1
        self.register_buffer("index", relative[..., 0] * (2 * window - 1) + relative[..., 1])

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        s, short = self.window, x
        x = self.norm(x)
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        x = x.view(b, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, c)
        qkv = self.qkv(x).reshape(x.shape[0], s * s, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * (c // self.heads) ** -0.5, qkv[1], qkv[2]
        bias = self.table[self.index.view(-1)].view(s * s, s * s, -1).permute(2, 0, 1).contiguous()
        scores = F.softmax(q @ k.transpose(-2, -1) + bias.unsqueeze(0), -1)
        x = self.proj((scores @ v).transpose(1, 2).reshape(-1, s * s, c))
        x = x.view(b, h // s, w // s, s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        if self.shift:
            x = torch.roll(x, (self.shift, self.shift), (1, 2))
        return short + x


class Swin(nn.Module):
    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 2, 2)
        self.attn1, self.mlp1 = WindowAttention(width, heads, 4, 0), MLP(width, 32)
        self.attn2, self.mlp2 = WindowAttention(width, heads, 4, 2), MLP(width, 32)
        self.merge_norm, self.merge = nn.LayerNorm(4 * width), nn.Linear(4 * width, 20, bias=False)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).permute(0, 2, 3, 1)
        x = self.attn1(x)
        x = x + self.mlp1(x)
        x = self.attn2(x)
        x = x + self.mlp2(x)
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.head(self.merge(self.merge_norm(x)).mean((1, 2)))


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.tokens = nn.LayerNorm(width), MLP(tokens, 20)
        self.norm2, self.channels = nn.LayerNorm(width), MLP(width, 40)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self, width: int = 20) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, width, 4, 4), nn.Sequential(MixerBlock(16, width), MixerBlock(16, width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x).flatten(2).transpose(1, 2))).mean(1))


def groupnorm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 24, 3, 1, 1, groups=2),
        nn.GroupNorm(8, 24), nn.ReLU(), nn.Conv2d(24, 12, 1), nn.InstanceNorm2d(12, affine=True), nn.PReLU(12),
        Head(12),
    )  # fmt: skip


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.stem, self.rnn = conv_bn(3, 10), kind(10, 12, batch_first=True)
        self.fc = nn.Sequential(nn.Linear(12, 14), nn.ReLU(), nn.Linear(14, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(self.stem(x).mean(2).transpose(1, 2))[0][:, -1])


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(12, 32), nn.Linear(16, 40), nn.Linear(20, 5)
        self.norm = nn.RMSNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).chunk(2, -1)
        return self.down(F.glu(self.mid(self.norm(F.silu(a) * b)), -1))


class SuperResolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 12, 3, 1, 1), nn.Conv2d(12, 24, 3, 1, 1), nn.Conv2d(6, 3, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(F.pixel_shuffle(self.b(F.leaky_relu(self.a(x), 0.1)), 2)))


class PaddedShortcut(nn.Module):
    """Channels padded with zeros instead of a projected shortcut, and embeddings of unit length."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.fc = conv_bn(3, 8), nn.Conv2d(8, 14, 3, 2, 1), nn.Linear(14, 6)
        self.embed = nn.utils.parametrizations.weight_norm(nn.Linear(14, 14))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.relu(self.conv(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 3, 3)))
        return self.fc(F.normalize(self.embed(y.amax((2, 3))), dim=1))


Factory = Callable[[], nn.Module]
Example = Callable[[], tuple[np.ndarray, ...]]


def _images() -> tuple[np.ndarray, ...]:
    return (np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32),)


def _tokens() -> tuple[np.ndarray, ...]:
    return (np.random.default_rng(0).integers(0, 20, (2, 9)),)


def _masked_tokens() -> tuple[np.ndarray, ...]:
    attend = np.ones((2, 9), np.int64)
    attend[1, 6:] = 0
    return (*_tokens(), attend)


def _vectors() -> tuple[np.ndarray, ...]:
    return (np.random.default_rng(0).standard_normal((2, 12)).astype(np.float32),)


def _seeded(factory: Factory) -> Factory:
    """The module with seeded weights, and norms whose statistics and affine parameters are not 0 and 1."""

    def make() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = factory().eval()
            for m in module.modules():
                if isinstance(m, nn.BatchNorm2d):
                    nn.init.normal_(m.running_mean, 0, 0.2)
                    nn.init.uniform_(m.running_var, 0.5, 1.5)
                if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)):
                    nn.init.uniform_(m.weight, 0.5, 1.5)
                    nn.init.normal_(m.bias, 0, 0.2)
        return module

    return make


ZOO: dict[str, tuple[Factory, Example]] = {
    name: (_seeded(factory), example)
    for name, factory, example in (
        ("plain", PlainCNN, _images),
        ("vgg", vgg, _images),
        ("resnet", resnet, _images),
        ("bottleneck", bottleneck, _images),
        ("resnext", lambda: bottleneck(4), _images),
        ("densenet", densenet, _images),
        ("inception", inception, _images),
        ("mobilenet_v2", lambda: mobilenet(nn.ReLU6, False), _images),
        ("mobilenet_v3", lambda: mobilenet(nn.Hardswish, True), _images),
        ("efficientnet", lambda: mobilenet(nn.SiLU, True), _images),
        ("shufflenet", shufflenet, _images),
        ("convnext", ConvNeXt, _images),
        ("unet", UNet, _images),
        ("vit", ViT, _images),
        ("bert", Bert, _masked_tokens),
        ("tied_lm", TiedLM, _tokens),
        ("swin", Swin, _images),
        ("mixer", Mixer, _images),
        ("groupnorm", groupnorm, _images),
        ("lstm", lambda: Recurrent(nn.LSTM), _images),
        ("gru", lambda: Recurrent(nn.GRU), _images),
        ("gated_mlp", GatedMLP, _vectors),
        ("pixel_shuffle", SuperResolution, _images),
        ("padded", PaddedShortcut, _images),
    )
}
