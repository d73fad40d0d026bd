"""GhostNet: half of each layer's channels are cheap depthwise functions of the other half."""

from __future__ import annotations

from slimline.zoo.architectures.scaling import count, divisible, image, multiplier
from slimline.zoo.blocks import (
    Activation,
    Architecture,
    Block,
    Conv,
    ConvNorm,
    Dropout,
    Function,
    GlobalPool,
    Identity,
    Linear,
    Parallel,
    Serial,
    concat,
    numbered,
    residual,
    serial,
    squeeze_excite,
)

_BLOCKS = (
    (3, 16, 16, False, 1), (3, 48, 24, False, 2), (3, 72, 24, False, 1), (5, 72, 40, True, 2), (5, 120, 40, True, 1),
    (3, 240, 80, False, 2), (3, 200, 80, False, 1), (3, 184, 80, False, 1), (3, 184, 80, False, 1),
    (3, 480, 112, True, 1), (3, 672, 112, True, 1), (5, 672, 160, True, 2), (5, 960, 160, False, 1),
    (5, 960, 160, True, 1), (5, 960, 160, False, 1), (5, 960, 160, True, 1),
)  # fmt: skip
"""Kernel, channels inside, channels, squeeze-and-excite and stride of each block."""


def ghostnet(width: float = 1.0, resolution: float = 1.0, classes: int = 1000, in_channels: int = 3) -> Architecture:
    """GhostNet (Han et al., 2020, arXiv:1911.11907): 5.2 million parameters.

    The settings are those of `mobilenet_v1`; widths are multiples of 4.
    """
    scale, conv = multiplier("width", width), ConvNorm()
    inputs = divisible(16 * scale, 4)
    stem, blocks, inside = conv(count("in_channels", in_channels), inputs, 3, 2, function="relu"), [], 0
    for kernel, expanded, channels, squeeze, stride in _BLOCKS:
        inside, outputs = divisible(expanded * scale, 4), divisible(channels * scale, 4)
        blocks.append(_bottleneck(conv, inputs, inside, outputs, kernel, stride, squeeze))
        inputs = outputs
    network = serial(
        stem=stem,
        blocks=numbered(blocks),
        last=conv(inputs, inside, function="relu"),
        means=GlobalPool(places=True),
        hidden=Conv(inside, 1280, bias=True),
        activation=Activation("relu"),
        pool=GlobalPool(),
        dropout=Dropout(0.2),
        head=Linear(1280, count("classes", classes)),
    )
    return Architecture("ghostnet", image(resolution, in_channels), network)


def _bottleneck(
    conv: ConvNorm, inputs: int, inside: int, outputs: int, kernel: int, stride: int, squeeze: bool
) -> Parallel:
    parts: dict[str, Block] = {"expand": _ghost(conv, inputs, inside, "relu")}
    shortcut: Block = Identity()
    if stride > 1:
        parts["depthwise"] = conv(inside, inside, kernel, stride, inside)
    if squeeze:
        parts["squeeze"] = squeeze_excite(inside, divisible(inside / 4, 4))
    parts["project"] = _ghost(conv, inside, outputs)
    if stride > 1 or inputs != outputs:
        shortcut = serial(depthwise=conv(inputs, inputs, kernel, stride, inputs), project=conv(inputs, outputs))
    return residual(serial(**parts), shortcut)


def _ghost(conv: ConvNorm, inputs: int, outputs: int, function: Function | None = None) -> Serial:
    """A 1×1 convolution for half of the channels, and a depthwise one of these for the other half."""
    half = outputs // 2
    ghosts = concat(primary=Identity(), cheap=conv(half, half, 3, 1, half, function))
    return serial(primary=conv(inputs, half, function=function), ghosts=ghosts)
