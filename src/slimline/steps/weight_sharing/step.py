"""Weights that share few values."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from slimline.basics.errors import SlimlineError
from slimline.methods.clustering import Start
from slimline.recipe.config import Config
from slimline.recipe.layers import Globs, LayerPattern
from slimline.recipe.step import Step

Clusters = Annotated[int, Field(ge=2, le=4096)]
_MOST_VALUES = 256


class SharingOverride(Config):
    """What is another for some layers.

    Attributes
    ----------
    clusters : as of `WeightSharing`.
    """

    clusters: Clusters


class WeightSharing(Step):
    """The weights of a layer become a few values that many of them share (clustering, a codebook).

    Shapes and types stay, so that the model runs and is exported as before; what it buys is a file that `slimline.pack`
    makes small. A `Distillation` step right behind it trains the shared values: which weights share one stays fixed
    (Han et al. 2016, Deep Compression, arXiv:1510.00149). Other training, and pruning, would take the values apart:
    they come before.

    Attributes
    ----------
    clusters : values in a codebook, 2 to 256; 32 are 5 bits. Zero is one of them where a tensor holds zeros, which
        stay. Of vectors up to 4096: 256 pairs are 4 bits a weight, 256 fours 2 bits.
    vector : weights that are coded together: 1, or pairs or fours of neighbouring inputs of an output (of a convolution
        neighbours in its kernel; of tensors that are no matrix in their last dimension). Zeros stay zero, each by
        itself.
    per : ``tensor``: one codebook for each weight tensor; ``channel``: one for each output channel of it.
    start : ``optimal``: k-means solved exactly (nearly, for a tensor of very many distinct weights); ``linear``,
        ``density``, ``random``, ``k-means++``: where Lloyd's iterations begin, for comparison. Of vectors none is
        exact, and all begin with k-means++.
    importance : of a weight in the clustering: ``inputs``, the mean square of the input that it multiplies (the
        diagonal of the layer's `H`); ``none``, the same for all, as it is too where there are no samples.
    refresh : recompute batch-norm statistics on calibration data afterwards, where there is any.
    layers, keep : globs of the layers whose weights are shared (default all) and of those to leave alone.
    overrides : by pattern of layers, their own ``{"clusters": …}``; a layer takes that of the first pattern it fits.
    samples, batch_size : of calibration.
    """

    kind = "sharing"
    step: Literal["WeightSharing"] = "WeightSharing"
    clusters: Clusters = 32
    vector: Literal[1, 2, 4] = 1
    per: Literal["tensor", "channel"] = "tensor"
    start: Start = "optimal"
    importance: Literal["inputs", "none"] = "inputs"
    refresh: bool = True
    layers: Globs = ("*",)
    keep: Globs = ()
    overrides: dict[LayerPattern, SharingOverride] = Field(default_factory=dict)
    samples: Annotated[int, Field(ge=1)] = 512
    batch_size: Annotated[int, Field(ge=1)] = 64

    @model_validator(mode="after")
    def _fitting(self) -> WeightSharing:
        most = max(self.clusters, *(each.clusters for each in self.overrides.values()), 0)
        if self.vector == 1 and most > _MOST_VALUES:
            raise SlimlineError(
                f"clusters of WeightSharing is {most} but must be at most {_MOST_VALUES} for single weights: set "
                "vector to 2 or 4, or take fewer."
            )
        if self.vector > 1 and self.start not in ("optimal", "k-means++"):
            raise SlimlineError(f"Vectors of weights have no start {self.start!r}: leave start out.")
        return self

    @property
    def needs(self) -> tuple[str, ...]:
        return ("calibration",) if self.importance == "inputs" else ()

    def clusters_of(self, pattern: str | None) -> int:
        """Of layers that fit a pattern of `overrides`; of the others for None."""
        return self.clusters if pattern is None else self.overrides[pattern].clusters
