"""ShuffleNets: 1×1 convolutions over parts of the channels, which are then shuffled."""

from __future__ import annotations

from slimline.basics.errors import SlimlineError, shown
from slimline.zoo.architectures.scaling import count, divisible, image, multiplier
from slimline.zoo.blocks import (
    Activation,
    Architecture,
    Block,
    Channels,
    ConvNorm,
    GlobalPool,
    Identity,
    Linear,
    Parallel,
    Pool,
    Serial,
    Shuffle,
    concat,
    numbered,
    serial,
)

_REPEATS = (4, 8, 4)
_V1 = {1: (144, 288, 576), 2: (200, 400, 800), 3: (240, 480, 960), 4: (272, 544, 1088), 8: (384, 768, 1536)}
"""Channels of the three stages, by groups."""
_V2 = {0.5: (48, 96, 192, 1024), 1.0: (116, 232, 464, 1024), 1.5: (176, 352, 704, 1024), 2.0: (244, 488, 976, 2048)}
"""Channels of the three stages and of the last convolution, by width; others are multiples of those of 1.0."""


def shufflenet_v1(
    width: float = 1.0, resolution: float = 1.0, classes: int = 1000, in_channels: int = 3, groups: int = 3
) -> Architecture:
    """ShuffleNet (Zhang et al., 2018, arXiv:1707.01083): with 3 groups 1.9 million parameters.

    Parameters
    ----------
    width, resolution, classes, in_channels : those of `mobilenet_v1`; widths are multiples of four times `groups`.
    groups : of the 1×1 convolutions: 1, 2, 3, 4 or 8.

    Raises
    ------
    SlimlineError : a setting that is no such number.
    """
    if isinstance(groups, bool) or groups not in _V1:
        raise SlimlineError(f"groups is {shown(groups)}: give 1, 2, 3, 4 or 8.")
    scale, conv = multiplier("width", width), ConvNorm()
    inputs = divisible(24 * scale, groups)
    stem, blocks = _stem(conv, count("in_channels", in_channels), inputs), []
    for stage, repeats in enumerate(_REPEATS):
        outputs = divisible(_V1[groups][stage] * scale, 4 * groups)
        for i in range(repeats):
            first = 1 if stage == i == 0 else groups
            blocks.append(_unit_v1(conv, inputs, outputs, groups, first, 2 if i == 0 else 1))
            inputs = outputs
    head = Linear(inputs, count("classes", classes))
    network = serial(stem=stem, blocks=numbered(blocks), pool=GlobalPool(), head=head)
    return Architecture("shufflenet_v1", image(resolution, in_channels), network)


def shufflenet_v2(
    width: float = 1.0, resolution: float = 1.0, classes: int = 1000, in_channels: int = 3
) -> Architecture:
    """ShuffleNetV2 (Ma et al., 2018, arXiv:1807.11164): 2.3 million parameters.

    The settings are those of `mobilenet_v1`; at widths 0.5, 1, 1.5 and 2 the channels are those of the paper.
    """
    scale, conv = multiplier("width", width), ConvNorm()
    *stages, last = _V2.get(scale) or (
        *(divisible(channels * scale, 4) for channels in _V2[1.0][:3]),
        divisible(1024 * max(1.0, scale)),
    )
    inputs = 24
    stem, blocks = _stem(conv, count("in_channels", in_channels), inputs), []
    for outputs, repeats in zip(stages, _REPEATS, strict=True):
        for i in range(repeats):
            blocks.append(_unit_v2(conv, inputs, outputs, reduces=i == 0))
            inputs = outputs
    network = serial(
        stem=stem,
        blocks=numbered(blocks),
        last=conv(inputs, last, function="relu"),
        pool=GlobalPool(),
        head=Linear(last, count("classes", classes)),
    )
    return Architecture("shufflenet_v2", image(resolution, in_channels), network)


def _stem(conv: ConvNorm, inputs: int, outputs: int) -> Serial:
    return serial(reduce=conv(inputs, outputs, 3, 2, function="relu"), pool=Pool("max", padding=1))


def _unit_v1(conv: ConvNorm, inputs: int, outputs: int, groups: int, first: int, stride: int) -> Serial:
    """A unit whose first convolution has `first` groups; one with stride 2 adds channels to those of its input."""
    narrow, wide = outputs // 4, outputs - inputs if stride > 1 else outputs
    body = serial(
        squeeze=conv(inputs, narrow, groups=first, function="relu"),
        shuffle=Shuffle(groups),
        depthwise=conv(narrow, narrow, 3, stride, narrow),
        expand=conv(narrow, wide, groups=groups),
    )
    shortcut = Pool("mean", padding=1) if stride > 1 else Identity()
    branches: tuple[tuple[str, Block], ...] = (("shortcut", shortcut), ("body", body))
    return serial(unit=Parallel("concat" if stride > 1 else "sum", branches), activation=Activation("relu"))


def _unit_v2(conv: ConvNorm, inputs: int, outputs: int, reduces: bool) -> Serial:
    """A unit that works on half of the channels, or one that halves the image."""
    half = outputs // 2
    stride = 2 if reduces else 1
    body: dict[str, Block] = {
        "expand": conv(inputs if reduces else half, half, function="relu"),
        "depthwise": conv(half, half, 3, stride, half),
        "project": conv(half, half, function="relu"),
    }
    if reduces:
        shortcut = serial(depthwise=conv(inputs, inputs, 3, 2, inputs), project=conv(inputs, half, function="relu"))
        unit = concat(shortcut=shortcut, body=serial(**body))
    else:
        unit = concat(shortcut=Channels(0, half), body=serial(part=Channels(half, outputs), **body))
    return serial(unit=unit, shuffle=Shuffle(2))
