"""Architectures of the zoo as torch modules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimline.zoo import blocks
from slimline.zoo.blocks import Architecture, Block

P = ParamSpec("P")

_ACTIVATIONS: dict[blocks.Function, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hard_swish": nn.Hardswish,
    "hard_sigmoid": nn.Hardsigmoid,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
}


class _Composite(nn.Module):
    """What hands a mask on to its parts."""

    def __init__(self, parts: Iterable[tuple[str, Block]]) -> None:
        super().__init__()
        for name, part in parts:
            self.add_module(name, _module(part))


def _call(module: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    y: Tensor = module(x, mask) if isinstance(module, _Composite) else module(x)
    return y


class Serial(_Composite):
    """Modules one after the other."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for module in self.children():
            x = _call(module, x, mask)
        return x


class Network(Serial):
    """A network of the zoo.

    Parameters
    ----------
    architecture : what is built.

    Images ``(batch, channels, size, size)`` float32, or tokens ``(batch, length)`` int64 and a float32 mask of this
    shape come in; ``(batch, classes)`` logits come out.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture.network.parts)
        self.architecture = architecture


class Parallel(_Composite):
    """Modules that read the same input."""

    def __init__(self, block: blocks.Parallel) -> None:
        super().__init__(block.branches)
        self.function = block.function

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        outputs = [_call(module, x, mask) for module in self.children()]
        if self.function == "concat":
            return torch.cat(outputs, 1)
        return functools.reduce(torch.add if self.function == "sum" else torch.mul, outputs)


class Attention(_Composite):
    """Multi-head self-attention."""

    def __init__(self, block: blocks.Attention) -> None:
        super().__init__(block.projections)
        self.heads, self.head_width = block.heads, block.width // block.heads

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, width = x.shape
        query, key, value = (
            self.get_submodule(name)(x).reshape(batch, length, self.heads, self.head_width).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        bias = None if mask is None else (1.0 - mask[:, None, None, :]) * blocks.MASKED
        y = F.scaled_dot_product_attention(query, key, value, bias)
        return _call(self.get_submodule("out"), y.transpose(1, 2).reshape(batch, length, width), None)


class GlobalPool(nn.Module):
    """The mean over the places of an image."""

    def __init__(self, places: bool) -> None:
        super().__init__()
        self.places = places

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3), keepdim=self.places)


class Shuffle(nn.Module):
    """Channels in turn from each group."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        x = x.reshape(batch, self.groups, channels // self.groups, height, width)
        return x.transpose(1, 2).reshape(batch, channels, height, width)


class Channels(nn.Module):
    """Some channels of an image."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.start : self.stop]


class Places(nn.Module):
    """An image as a sequence of its places."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class First(nn.Module):
    """The first vector of a sequence."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


class ClassToken(nn.Module):
    """A learned vector before the first of a sequence."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 1, width) * blocks.DEVIATION)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.weight.expand(x.shape[0], -1, -1), x], 1)


class Positions(nn.Module):
    """A learned vector added to each of a sequence."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, length, width) * blocks.DEVIATION)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight


def _module(block: Block) -> nn.Module:
    match block:
        case blocks.Serial(parts):
            return Serial(parts)
        case blocks.Parallel():
            return Parallel(block)
        case blocks.Attention():
            return Attention(block)
        case blocks.Identity():
            return nn.Identity()
        case blocks.Conv(inputs, outputs, kernel, stride, groups, bias):
            return nn.Conv2d(inputs, outputs, kernel, stride, block.pad, groups=groups, bias=bias)
        case blocks.BatchNorm(width, epsilon, momentum):
            return nn.BatchNorm2d(width, epsilon, momentum)
        case blocks.LayerNorm(width, epsilon):
            return nn.LayerNorm(width, epsilon)
        case blocks.Activation(function):
            return _ACTIVATIONS[function]()
        case blocks.Pool("max", kernel, stride, padding, ceil):
            return nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil)
        case blocks.Pool(_, kernel, stride, padding, ceil):
            return nn.AvgPool2d(kernel, stride, padding, ceil)
        case blocks.GlobalPool(places):
            return GlobalPool(places)
        case blocks.Shuffle(groups):
            return Shuffle(groups)
        case blocks.Channels(start, stop):
            return Channels(start, stop)
        case blocks.Linear(inputs, outputs):
            return nn.Linear(inputs, outputs)
        case blocks.Dropout(rate):
            return nn.Dropout(rate)
        case blocks.Places():
            return Places()
        case blocks.Embedding(count, width):
            embedding = nn.Embedding(count, width)
            nn.init.normal_(embedding.weight, std=blocks.DEVIATION)
            return embedding
        case blocks.ClassToken(width):
            return ClassToken(width)
        case blocks.Positions(length, width):
            return Positions(length, width)
        case blocks.First():
            return First()


def builds(describe: Callable[P, Architecture]) -> Callable[P, Network]:
    """A factory of modules, with the settings of the function that describes their architecture."""

    @functools.wraps(describe)
    def factory(*args: P.args, **kwargs: P.kwargs) -> Network:
        return Network(describe(*args, **kwargs))

    return factory
