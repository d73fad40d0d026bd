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
    last layer reads. That layer stays as it is while it trains. The published projector is a convolution on maps,
    before they are pooled; this one reads what the last layer reads, of any network.

    Attributes
    ----------
    width : of the projector inside; None takes half of what the teacher's last layer reads, as published.
    """

    kind = "structural"
    step: Literal["TeacherHead"] = "TeacherHead"
    width: Annotated[int, Field(ge=1)] | None = None

    def misplaced(self, earlier: Sequence[str], following: Step | None) -> str:
        if self.step in earlier:
            return "TeacherHead comes once: leave the second out."
        if following is None or following.kind != "recovery":
            return "TeacherHead has to be trained: put a Distillation with features simkd right behind it."
        return ""
