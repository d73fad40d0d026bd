"""What all steps share.

A step says what is wanted; `slimline.apply` does it. Layers are named by fnmatch globs on the user's
own names (``stages.*.conv1``).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from slimline.recipe.config import Config

Ratio = Annotated[float, Field(ge=0, lt=1)]
Globs = tuple[str, ...]


class Step(Config):
    """What all steps share.

    Attributes
    ----------
    kind : decides what may follow what (`slimline.recipe.recipe.ORDER`).
    needs : the roles of the samples the step reads (`slimline.data.ROLES`).
    """

    kind: ClassVar[Literal["structural", "sparse", "training", "recovery", "quantization"]]

    @property
    def needs(self) -> tuple[str, ...]:
        return ()
