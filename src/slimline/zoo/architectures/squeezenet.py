"""SqueezeNet: few channels in front of each wide kernel, no linear layer."""

from __future__ import annotations

from slimline.zoo.architectures.scaling import count, divisible, image, multiplier
from slimline.zoo.blocks import (
    Activation,
    Architecture,
    Block,
    Conv,
    Dropout,
    GlobalPool,
    Pool,
    concat,
    numbered,
    serial,
)

_SQUEEZED = (16, 16, None, 32, 32, None, 48, 48, 64, 64)
"""Channels between the parts of each fire module; None for a pool. Each expands to eight times as many."""


def squeezenet(width: float = 1.0, resolution: float = 1.0, classes: int = 1000, in_channels: int = 3) -> Architecture:
    """SqueezeNet 1.1 (Iandola et al., 2016, arXiv:1602.07360): 1.2 million parameters.

    The settings are those of `mobilenet_v1`; images have at least 27 × 27 places.
    """
    scale = multiplier("width", width)
    inputs = divisible(64 * scale)
    relu, pool = Activation("relu"), Pool("max", ceil=True)
    conv = Conv(count("in_channels", in_channels), inputs, 3, 2, bias=True, padding=0)
    blocks: list[Block] = []
    for squeezed in _SQUEEZED:
        if squeezed is None:
            blocks.append(pool)
            continue
        narrow, wide = divisible(squeezed * scale), divisible(4 * squeezed * scale)
        expand = concat(one=Conv(narrow, wide, bias=True), three=Conv(narrow, wide, 3, bias=True))
        squeeze = Conv(inputs, narrow, bias=True)
        blocks.append(serial(squeeze=squeeze, squeeze_activation=relu, expand=expand, activation=relu))
        inputs = 2 * wide
    network = serial(
        stem=serial(conv=conv, activation=relu, pool=pool),
        blocks=numbered(blocks),
        dropout=Dropout(0.5),
        head=Conv(inputs, count("classes", classes), bias=True),
        activation=relu,
        pool=GlobalPool(),
    )
    return Architecture("squeezenet", image(resolution, in_channels, least=27), network)
