"""EfficientNet-lite: EfficientNet without what integers and accelerators dislike."""

from __future__ import annotations

import math

from slimline.zoo.architectures.scaling import count, divisible, image, multiplier
from slimline.zoo.blocks import (
    Architecture,
    ConvNorm,
    Dropout,
    GlobalPool,
    Linear,
    inverted_residual,
    numbered,
    serial,
)

_STAGES = (
    (1, 3, 16, 1, 1), (6, 3, 24, 2, 2), (6, 5, 40, 2, 2), (6, 3, 80, 3, 2),
    (6, 5, 112, 3, 1), (6, 5, 192, 4, 2), (6, 3, 320, 1, 1),
)  # fmt: skip
"""Expansion, kernel, channels, blocks and stride of each stage."""


def efficientnet_lite(
    width: float = 1.0, resolution: float = 1.0, classes: int = 1000, in_channels: int = 3, depth: float = 1.0
) -> Architecture:
    """EfficientNet-lite0 (Tan and Le, 2019, arXiv:1905.11946; lite by Liu, 2020): 4.7 million parameters.

    Lite1 to lite4 have widths 1, 1.1, 1.2 and 1.4, depths 1.1, 1.2, 1.4 and 1.8, and images of 240, 260, 280 and 300.
    Stem and last convolution always have 32 and 1280 channels, and the first and last stage one block.

    Parameters
    ----------
    width, resolution, classes, in_channels : those of `mobilenet_v1`.
    depth : by which the blocks of the other stages are multiplied, rounded up.

    Raises
    ------
    SlimlineError : a setting that is no such number.
    """
    scale, deeper, conv = multiplier("width", width), multiplier("depth", depth), ConvNorm()
    inputs = 32
    stem, blocks = conv(count("in_channels", in_channels), inputs, 3, 2, function="relu6"), []
    for stage, (expansion, kernel, channels, repeats, first) in enumerate(_STAGES):
        outputs = divisible(channels * scale)
        ends = stage in (0, len(_STAGES) - 1)
        for i in range(repeats if ends else math.ceil(repeats * deeper)):
            stride = first if i == 0 else 1
            blocks.append(inverted_residual(conv, inputs, inputs * expansion, outputs, kernel, stride))
            inputs = outputs
    network = serial(
        stem=stem,
        blocks=numbered(blocks),
        last=conv(inputs, 1280, function="relu6"),
        pool=GlobalPool(),
        dropout=Dropout(0.2),
        head=Linear(1280, count("classes", classes)),
    )
    return Architecture("efficientnet_lite", image(resolution, in_channels), network)
