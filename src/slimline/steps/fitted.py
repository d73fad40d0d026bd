"""What steps say whose layers give way to others that are fitted to them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from slimline.basics.errors import SlimlineError
from slimline.recipe.layers import Globs
from slimline.recipe.step import Step


class FittedStep(Step):
    """A step whose layers give way to others.

    Attributes
    ----------
    criterion : ``output`` makes the error of the layer's outputs on calibration samples least, ``weight`` that of its
        weights, without data.
    compensate : each layer also makes up for what those before it lost, from the inputs it has then; by default with
        ``output``, which it needs.
    damping : part of the mean of the Gram matrix's diagonal that is added to it.
    samples, batch_size : calibration samples that are read, and how many at a time.
    layers, keep : globs of the layers to replace and of those to leave alone.
    undo : put back every layer that does not make the artifact measurably faster on the target, and all of them where
        the whole does not. False where size is the goal, or where a later step decides the time.
    """

    kind = "structural"
    criterion: Literal["output", "weight"] = "output"
    compensate: bool | None = None
    damping: Annotated[float, Field(gt=0)] = 1e-3
    samples: Annotated[int, Field(ge=1)] = 512
    batch_size: Annotated[int, Field(ge=1)] = 64
    layers: Globs = ("*",)
    keep: Globs = ()
    undo: bool = True

    @property
    def needs(self) -> tuple[str, ...]:
        return ("calibration",) if self.criterion == "output" else ()

    @property
    def compensates(self) -> bool:
        """`compensate`, or what it is by default."""
        return self.criterion == "output" if self.compensate is None else self.compensate

    @model_validator(mode="after")
    def _compensates_from_activations(self) -> Self:
        if self.compensate and self.criterion == "weight":
            raise SlimlineError(
                f"{self.step} compensates from activations: leave criterion: output, or compensate out."
            )
        return self
