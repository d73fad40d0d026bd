"""A student that ends as its teacher does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from slimline.recipe.step import Step


class TeacherHead(Step):
    """The student's last linear layer gives way to the teacher's, behind a projector of three (SimKD; Chen et al. 2022,
    arXiv:2203.14001).

    The projector is ``layer.0`` to ``layer.4`` of the layer that goes, with rectifiers between; it begins with weights
    that are drawn, so a `Distillation` stands right behind, which learns by ``features=["simkd"]`` what the teacher's
    last layer reads. That layer stays as it is while it trains.

    Attributes
    ----------
    on : what the projector reads: ``embedding``, what the student's last layer reads, by linear layers, of any network;
        ``map``, the map whose mean over all places that is, by convolutions (1 × 1, 3 × 3, 1 × 1), as published but for
        the norms: then the loss compares maps, the larger one pooled to the size of the smaller (as published, but
        behind the projector). For networks that average over all places.
    width : of the projector inside; None takes half of what the teacher's last layer reads, as published.
    """

    kind = "structural"
    step: Literal["TeacherHead"] = "TeacherHead"
    on: Literal["embedding", "map"] = "embedding"
    width: Annotated[int, Field(ge=1)] | None = None

    def misplaced(self, earlier: Sequence[str], following: Step | None) -> str:
        if self.step in earlier:
            return "TeacherHead comes once: leave the second out."
        if following is None or following.kind != "recovery":
            return "TeacherHead has to be trained: put a Distillation with features simkd right behind it."
        return ""
