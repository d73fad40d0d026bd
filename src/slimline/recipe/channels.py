"""Structured pruning: what to remove for real."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from slimline.errors import SlimlineError
from slimline.recipe.step import Globs, Ratio, Step


class ChannelPruning(Step):
    """Remove whole channels, filters, heads or embedding positions for real (structured pruning).

    Attributes
    ----------
    ratio : part of every unit (or, with a wider `scope`, of all units together) that goes, in [0, 1).
    criterion : ``l1``, ``l2`` (Li et al. 2017, arXiv:1608.08710, summed over every parameter slice of the
        unit), ``taylor`` (first order, Molchanov et al. 2019, arXiv:1906.10771; needs data) or ``random``.
    scope : ``local`` ranks inside each unit; ``global`` ranks all units together, scores divided by
        their unit's mean; ``isomorphic`` ranks together the units of equal topology (Fang et al. 2024,
        arXiv:2407.04616).
    target_macs, target_parameters : instead of `ratio`, the part of the original's that may stay, in (0, 1].
    round_to : keep a multiple of this many positions of each unit that has at least as many.
    layers, keep : globs of the layers to prune (default all) and of those to leave alone.
    factors : of an axis that is a product, such as heads x head width or groups x group width, prune only
        the ``largest`` factor or ``all`` of them.
    schedule : ``oneshot``; ``uniform`` or ``iterative`` prune in `rounds` equal parts of the remaining
        gap, ``iterative`` with the recovery step that follows run after every round.
    rounds : number of rounds of the last two.
    """

    kind = "structural"
    step: Literal["ChannelPruning"] = "ChannelPruning"
    ratio: Ratio | None = None
    criterion: Literal["l1", "l2", "taylor", "random"] = "l2"
    scope: Literal["local", "global", "isomorphic"] = "local"
    target_macs: Annotated[float, Field(gt=0, le=1)] | None = None
    target_parameters: Annotated[float, Field(gt=0, le=1)] | None = None
    round_to: Annotated[int, Field(ge=1)] = 1
    layers: Globs = ("*",)
    keep: Globs = ()
    factors: Literal["largest", "all"] = "largest"
    schedule: Literal["oneshot", "uniform", "iterative"] = "oneshot"
    rounds: Annotated[int, Field(ge=1)] = 1

    @property
    def needs(self) -> tuple[str, ...]:
        return ("calibration",) if self.criterion == "taylor" else ()

    @model_validator(mode="after")
    def _one_goal(self) -> ChannelPruning:
        given = [n for n in ("ratio", "target_macs", "target_parameters") if getattr(self, n) is not None]
        if len(given) != 1:
            said = " and ".join(given) or "none"
            raise SlimlineError(f"ChannelPruning takes one of ratio, target_macs and target_parameters, not {said}.")
        if self.schedule == "oneshot" and self.rounds != 1:
            raise SlimlineError(f"ChannelPruning in {self.rounds} rounds needs schedule: uniform or iterative.")
        return self
