"""Steps that put values on grids."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from slimline.recipe.layers import Globs
from slimline.recipe.step import Step


class StaticQuantization(Step):
    """Post-training integer quantization with calibrated activation ranges.

    Attributes
    ----------
    weights : ``int8``, symmetric, per output channel.
    activations : ``uint8`` or ``int8``, affine, per tensor; None takes what the target runs fastest
        (``uint8`` on ONNX Runtime, ``int8`` on LiteRT).
    observer : ``minmax``, ``percentile`` or ``mse`` (the range of least squared rounding error).
    percentile : of the absolute tail that `percentile` keeps, in percent.
    samples, batch_size : calibration samples, and how many at a time.
    layers, keep : globs of the layers to quantize and of those to leave in float.
    undo : put back to float every layer whose quantization makes the artifact slower or breaks parity.
    """

    kind = "quantization"
    step: Literal["StaticQuantization"] = "StaticQuantization"
    weights: Literal["int8"] = "int8"
    activations: Literal["uint8", "int8"] | None = None
    observer: Literal["minmax", "percentile", "mse"] = "mse"
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    samples: Annotated[int, Field(ge=1)] = 512
    batch_size: Annotated[int, Field(ge=1)] = 64
    layers: Globs = ("*",)
    keep: Globs = ()
    undo: bool = True

    @property
    def needs(self) -> tuple[str, ...]:
        return ("calibration",)

    @property
    def reads_together(self) -> int:
        return self.batch_size
