"""The step that makes one layer of several."""

from __future__ import annotations

from typing import Literal

from slimline.recipe.layers import Globs
from slimline.recipe.step import Step


class MergeLayers(Step):
    """Make one layer of branches that are added, and of linear layers or convolutions that follow each other.

    What the network computes stays the same. Batch norms between are merged too, so they no longer learn: train before.

    Attributes
    ----------
    heavier : merge layers that follow each other also where the one has more parameters or multiply-accumulates than
        its parts, as when the factors of `LowRank` become the layer that they were; groups become zeros of a dense
        weight.
    layers, keep : globs of the layers that may be merged, and of those to leave alone.
    """

    kind = "structural"
    step: Literal["MergeLayers"] = "MergeLayers"
    heavier: bool = False
    layers: Globs = ("*",)
    keep: Globs = ()
