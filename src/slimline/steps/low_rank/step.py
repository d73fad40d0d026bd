"""Layers as products of smaller ones."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from slimline.basics.errors import SlimlineError
from slimline.recipe.step import Ratio
from slimline.steps.fitted import FittedStep

Method = Literal["svd", "input", "spatial", "tucker", "cp"]
METHODS: tuple[Method, ...] = ("svd", "input", "spatial", "tucker")
"""Those that ``auto`` tries."""
GOALS = ("rank", "ratio", "energy", "error", "target_parameters", "target_macs")


class LowRank(FittedStep):
    """Replace a linear layer or a convolution by two to five smaller ones in a row, called ``layer.0``, ``layer.1`` ….
    A weight that an einsum reads, as in projections to heads, becomes two. A recurrent layer reads its input through a
    linear layer without bias, one product for all gates and directions. An embedding becomes a table of shorter rows
    and a linear layer without bias behind it (Lan et al. 2020, arXiv:1909.11942): for size, not for time, so with
    ``undo=False`` only.

    A layer that would not have fewer parameters and fewer multiply-accumulates (an embedding: fewer parameters) stays
    as it is.

    Attributes
    ----------
    rank : channels between the parts (of each group of a grouped convolution); ``evbmf``: as many as singular values of
        the layer's weight stand out from noise (Nakajima et al. 2013, JMLR 14).
    ratio : part of the parameters of the chosen layers that goes, in [0, 1), see `scope`. A rank of at least
        `round_to` stays in every layer.
    energy : part of the energy of each layer's outputs that stays at least, in (0, 1).
    error : the part of it that may be lost, in (0, 1): ``energy=0.95`` is ``error=0.05``.
    target_parameters, target_macs : the part of the whole model's that may stay, in (0, 1].
    scope : with `ratio`: ``global``, the layers lose it together, each as much as makes the product of the parts of
        their energy that stay greatest (after Kim et al. 2019, arXiv:1811.12781; solved exactly, as the two targets
        are); ``local``, each loses it by itself.
    method : of convolutions (a linear layer, and a kernel of ones, has only ``svd``): ``svd``, k × k to fewer channels,
        then 1 × 1 (Zhang et al. 2016, arXiv:1505.06798); ``input``, 1 × 1 to fewer channels, then k × k; ``spatial``,
        k × 1, then 1 × k (Jaderberg et al. 2014, arXiv:1405.3866); ``tucker``, 1 × 1, k × k, 1 × 1 (Kim et al. 2016,
        arXiv:1511.06530), the ranks in proportion to the channels, of which `rank` counts the outputs'; ``cp``, 1 × 1,
        a depthwise convolution along each side of the kernel, 1 × 1 (Lebedev et al. 2015, arXiv:1412.6553), which is
        fitted again for every rank that is looked at; ``auto``, for each layer the one of the first four that loses
        least.
    criterion : ``output`` makes the error of the layer's outputs on calibration samples least (whitened by the Gram
        matrix of its inputs, Wang et al. 2024, arXiv:2403.07378; the rows of a table by how often they are looked up),
        ``weight`` that of its weights, without data.
    compensate : each layer also makes up for what those before it lost, from the inputs it has then; by default with
        ``output``, which it needs.
    damping : part of the mean of the Gram matrix's diagonal that is added to it.
    round_to : ranks are multiples of this, in layers that have so many; `rank` is taken as it is.
    samples, batch_size : calibration samples that are read, and how many at a time.
    layers, keep : globs of the layers to factorise and of those to leave alone.
    undo : put back every layer that does not make the artifact faster as a product, and all of them where the whole
        does not; embeddings are left alone then. False where size is the goal, or where a later step decides the time.
    """

    step: Literal["LowRank"] = "LowRank"
    rank: Annotated[int, Field(ge=1)] | Literal["evbmf"] | None = None
    ratio: Ratio | None = None
    energy: Annotated[float, Field(gt=0, lt=1)] | None = None
    error: Annotated[float, Field(gt=0, lt=1)] | None = None
    target_parameters: Annotated[float, Field(gt=0, le=1)] | None = None
    target_macs: Annotated[float, Field(gt=0, le=1)] | None = None
    scope: Literal["global", "local"] = "global"
    method: Method | Literal["auto"] = "svd"
    round_to: Annotated[int, Field(ge=1)] = 1

    @property
    def methods(self) -> tuple[Method, ...]:
        """Those that are tried."""
        return METHODS if self.method == "auto" else (self.method,)

    @property
    def loss(self) -> float | None:
        """The part of the energy of a layer that may be lost, if that decides."""
        return self.error if self.energy is None else 1 - self.energy

    @model_validator(mode="after")
    def _one_goal(self) -> LowRank:
        goals = [name for name in GOALS if getattr(self, name) is not None]
        if len(goals) != 1:
            problem = " and ".join(goals) or "none"
            raise SlimlineError(f"LowRank takes one of {', '.join(GOALS)}, not {problem}.")
        return self
