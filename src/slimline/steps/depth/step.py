"""Structured pruning of depth: whole residual blocks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from slimline.recipe.layers import Globs
from slimline.recipe.step import Step


class DepthPruning(Step):
    """Remove whole residual blocks; the short cut around each stays.

    Attributes
    ----------
    blocks : how many (an integer of at least 1), which part of all (a number below 1), or globs of their names, as
        ``slimline inspect`` lists them.
    criterion : which go first: ``similarity``, those whose output is most like their input (block influence of
        Men et al. 2024, arXiv:2403.03853); ``error``, one after the other those without which the model's outputs
        change least, measured anew after each; ``l2``, those of the smallest mean squared weight; ``random``. The
        first two need data.
    samples : calibration samples of those two.
    layers, keep : globs of the blocks that may go, and of those to leave alone.
    """

    kind = "structural"
    step: Literal["DepthPruning"] = "DepthPruning"
    blocks: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)] | Globs
    criterion: Literal["similarity", "error", "l2", "random"] = "similarity"
    samples: Annotated[int, Field(ge=1)] = 256
    layers: Globs = ("*",)
    keep: Globs = ()

    @property
    def needs(self) -> tuple[str, ...]:
        measured = self.criterion in ("similarity", "error") and not isinstance(self.blocks, tuple)
        return ("calibration",) if measured else ()
