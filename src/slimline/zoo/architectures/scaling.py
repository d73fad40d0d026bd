"""Multipliers of widths and resolutions, and what is refused of them."""

from __future__ import annotations

import math

from slimline.basics.arguments import whole
from slimline.basics.errors import SlimlineError, shown
from slimline.zoo.blocks import Image

PUBLISHED = 224
"""Height and width of the images that these networks were published for."""
_MOST = 2**20


def divisible(width: float, by: int = 8) -> int:
    """The multiple of `by` nearest to a width, at least `by`, and never less than nine tenths of the width."""
    rounded = max(by, int(width + by / 2) // by * by)
    return rounded if rounded >= 0.9 * width else rounded + by


def multiplier(name: str, value: float) -> float:
    """A number by which widths, depths or sizes are multiplied.

    Raises
    ------
    SlimlineError : not a number from 0.01 to 16.
    """
    number: object = value
    if not isinstance(number, int | float) or isinstance(number, bool) or not 0.01 <= number <= 16:
        raise SlimlineError(f"{name} is {shown(value)}: give a number from 0.01 to 16, such as 0.5.")
    return float(value)


def count(name: str, value: int) -> int:
    """A number of classes, channels, layers or tokens, at least 1."""
    return whole(value, name, 1, _MOST)


def image(resolution: float, in_channels: int, least: int = 1) -> Image:
    """The input of a network that was published for 224 × 224.

    Parameters
    ----------
    resolution : by which 224 is multiplied, to the nearest whole number.
    in_channels : of the image.
    least : the smallest size that the network can take.

    Raises
    ------
    SlimlineError : a size below `least`, or no number.
    """
    size = round(PUBLISHED * multiplier("resolution", resolution))
    if size < least:
        raise SlimlineError(
            f"resolution {shown(resolution)} makes images of {size} × {size}, and this network needs {least} × "
            f"{least}: give at least {math.ceil(100 * least / PUBLISHED) / 100}."
        )
    return Image(count("in_channels", in_channels), size)
