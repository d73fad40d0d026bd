"""Layers that share one weight."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from slimline.basics.errors import SlimlineError
from slimline.recipe.layers import Globs
from slimline.recipe.step import Step

Order = Literal["similarity", "sequence", "cycle"]


class LayerTying(Step):
    """Layers of one type and shape share one stored weight, and one bias (ALBERT, Lan et al. 2020, arXiv:1909.11942).

    The shared weight is the least-squares fit to what all of them did. Nothing is computed faster, but the file and the
    artifact hold it once; training afterwards moves it for all of them together, and needs more than other steps do: a
    network that was not trained to share loses much.

    Attributes
    ----------
    similarity : layers share where each retains at least this part of the energy of its outputs, in (0, 1].
    groups : different weights that are left of each family of layers that could share.
    order : with `groups`, who shares: ``similarity``, those that lose least by it, whatever they are called;
        ``sequence``, neighbours (AABB); ``cycle``, those at the same place of a period (ABAB): ``groups=1`` is ALBERT
        in both (Takase and Kiyono 2021, arXiv:2104.06022). In the last two a family are layers whose names differ in
        their numbers alone, in the order in which they run.
    criterion : ``output`` fits the outputs on calibration samples, ``weight`` the weights, without data.
    layers, keep : globs of the layers that may share (default all) and of those to leave alone.
    samples, batch_size : calibration samples that are read, and how many at a time.
    """

    kind = "structural"
    step: Literal["LayerTying"] = "LayerTying"
    similarity: Annotated[float, Field(gt=0, le=1)] | None = None
    groups: Annotated[int, Field(ge=1)] | None = None
    order: Order = "similarity"
    criterion: Literal["output", "weight"] = "output"
    layers: Globs = ("*",)
    keep: Globs = ()
    samples: Annotated[int, Field(ge=1)] = 512
    batch_size: Annotated[int, Field(ge=1)] = 64

    @property
    def needs(self) -> tuple[str, ...]:
        return ("calibration",) if self.criterion == "output" else ()

    @model_validator(mode="after")
    def _one_goal(self) -> LayerTying:
        if (self.similarity is None) == (self.groups is None):
            raise SlimlineError("LayerTying takes either similarity, such as 0.95, or groups, such as 1: give one.")
        if self.groups is None and self.order != "similarity":
            raise SlimlineError(f"LayerTying in {self.order} needs to know how many weights are left: give groups.")
        return self
