"""MobileNets: depthwise convolutions for all that is wider than one place."""

from __future__ import annotations

from slimline.zoo.architectures.scaling import count, divisible, image, multiplier
from slimline.zoo.blocks import (
    Activation,
    Architecture,
    ConvNorm,
    Dropout,
    Function,
    GlobalPool,
    Linear,
    inverted_residual,
    numbered,
    serial,
)

_V1 = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2),
    (512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1),
)  # fmt: skip
"""Channels and stride of each separable convolution."""

_V2 = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, channels, blocks and stride of each stage."""

_Row = tuple[int, int, int, bool, Function, int]
_V3_LARGE: tuple[_Row, ...] = (
    (3, 16, 16, False, "relu", 1), (3, 64, 24, False, "relu", 2), (3, 72, 24, False, "relu", 1),
    (5, 72, 40, True, "relu", 2), (5, 120, 40, True, "relu", 1), (5, 120, 40, True, "relu", 1),
    (3, 240, 80, False, "hard_swish", 2), (3, 200, 80, False, "hard_swish", 1), (3, 184, 80, False, "hard_swish", 1),
    (3, 184, 80, False, "hard_swish", 1), (3, 480, 112, True, "hard_swish", 1), (3, 672, 112, True, "hard_swish", 1),
    (5, 672, 160, True, "hard_swish", 2), (5, 960, 160, True, "hard_swish", 1), (5, 960, 160, True, "hard_swish", 1),
)  # fmt: skip
_V3_SMALL: tuple[_Row, ...] = (
    (3, 16, 16, True, "relu", 2), (3, 72, 24, False, "relu", 2), (3, 88, 24, False, "relu", 1),
    (5, 96, 40, True, "hard_swish", 2), (5, 240, 40, True, "hard_swish", 1), (5, 240, 40, True, "hard_swish", 1),
    (5, 120, 48, True, "hard_swish", 1), (5, 144, 48, True, "hard_swish", 1), (5, 288, 96, True, "hard_swish", 2),
    (5, 576, 96, True, "hard_swish", 1), (5, 576, 96, True, "hard_swish", 1),
)  # fmt: skip
"""Kernel, channels inside, channels, squeeze-and-excite, activation and stride of each block."""


def mobilenet_v1(
    width: float = 1.0, resolution: float = 1.0, classes: int = 1000, in_channels: int = 3
) -> Architecture:
    """MobileNetV1 (Howard et al., 2017, arXiv:1704.04861): 4.2 million parameters.

    Parameters
    ----------
    width : by which all widths are multiplied, rounded to multiples of 8.
    resolution : by which the images' 224 × 224 is multiplied.
    classes, in_channels : width of the output, channels of the input.

    Raises
    ------
    SlimlineError : a setting that is no such number.
    """
    scale, conv = multiplier("width", width), ConvNorm()
    inputs = divisible(32 * scale)
    stem, blocks = conv(count("in_channels", in_channels), inputs, 3, 2, function="relu6"), []
    for outputs, stride in ((divisible(channels * scale), stride) for channels, stride in _V1):
        depthwise = conv(inputs, inputs, 3, stride, inputs, "relu6")
        blocks.append(serial(depthwise=depthwise, pointwise=conv(inputs, outputs, function="relu6")))
        inputs = outputs
    head = Linear(inputs, count("classes", classes))
    network = serial(stem=stem, blocks=numbered(blocks), pool=GlobalPool(), dropout=Dropout(0.001), head=head)
    return Architecture("mobilenet_v1", image(resolution, in_channels), network)


def mobilenet_v2(
    width: float = 1.0, resolution: float = 1.0, classes: int = 1000, in_channels: int = 3
) -> Architecture:
    """MobileNetV2 (Sandler et al., 2018, arXiv:1801.04381): 3.5 million parameters.

    The settings are those of `mobilenet_v1`; the last convolution is never narrower than 1280.
    """
    scale, conv = multiplier("width", width), ConvNorm()
    inputs = divisible(32 * scale)
    stem, blocks = conv(count("in_channels", in_channels), inputs, 3, 2, function="relu6"), []
    for expansion, channels, repeats, first in _V2:
        outputs = divisible(channels * scale)
        for i in range(repeats):
            blocks.append(inverted_residual(conv, inputs, inputs * expansion, outputs, stride=first if i == 0 else 1))
            inputs = outputs
    last = divisible(1280 * max(1.0, scale))
    network = serial(
        stem=stem,
        blocks=numbered(blocks),
        last=conv(inputs, last, function="relu6"),
        pool=GlobalPool(),
        dropout=Dropout(0.2),
        head=Linear(last, count("classes", classes)),
    )
    return Architecture("mobilenet_v2", image(resolution, in_channels), network)


def mobilenet_v3_large(
    width: float = 1.0, resolution: float = 1.0, classes: int = 1000, in_channels: int = 3
) -> Architecture:
    """MobileNetV3, large (Howard et al., 2019, arXiv:1905.02244): 5.5 million parameters.

    The settings are those of `mobilenet_v1`.
    """
    return _v3("mobilenet_v3_large", _V3_LARGE, 1280, width, resolution, classes, in_channels)


def mobilenet_v3_small(
    width: float = 1.0, resolution: float = 1.0, classes: int = 1000, in_channels: int = 3
) -> Architecture:
    """MobileNetV3, small (Howard et al., 2019, arXiv:1905.02244): 2.5 million parameters.

    The settings are those of `mobilenet_v1`.
    """
    return _v3("mobilenet_v3_small", _V3_SMALL, 1024, width, resolution, classes, in_channels)


def _v3(
    name: str, rows: tuple[_Row, ...], hidden: int, width: float, resolution: float, classes: int, in_channels: int
) -> Architecture:
    scale, conv = multiplier("width", width), ConvNorm(epsilon=1e-3, momentum=0.01)
    inputs = divisible(16 * scale)
    stem, blocks = conv(count("in_channels", in_channels), inputs, 3, 2, function="hard_swish"), []
    for kernel, expanded, channels, squeeze, function, stride in rows:
        inside, outputs = divisible(expanded * scale), divisible(channels * scale)
        squeezed = divisible(inside // 4) if squeeze else 0
        blocks.append(inverted_residual(conv, inputs, inside, outputs, kernel, stride, function, squeezed))
        inputs = outputs
    hidden = divisible(hidden * scale)
    network = serial(
        stem=stem,
        blocks=numbered(blocks),
        last=conv(inputs, 6 * inputs, function="hard_swish"),
        pool=GlobalPool(),
        hidden=Linear(6 * inputs, hidden),
        activation=Activation("hard_swish"),
        dropout=Dropout(0.2),
        head=Linear(hidden, count("classes", classes)),
    )
    return Architecture(name, image(resolution, in_channels), network)
