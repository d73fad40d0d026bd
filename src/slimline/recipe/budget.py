"""What a compression may cost and must reach."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from slimline.recipe.config import Config

Part = Annotated[float, Field(gt=0, le=1)]


class Budget(Config):
    """Limits on the compressed model, each relative to the original on the same runtime; None sets no limit.

    Attributes
    ----------
    max_drop : accuracy that may be lost, in parts of one (0.01 is one point), in [0, 1]; None only measures it.
    max_latency : part of the original's median latency at the largest batch size, in (0, 1].
    max_size : part of the original's file bytes, in (0, 1].
    max_macs : part of the original's multiply-accumulates, in (0, 1].
    confidence : of the bound on the drop, in (0.5, 1).
    """

    max_drop: Annotated[float, Field(ge=0, le=1)] | None = 0.01
    max_latency: Part | None = None
    max_size: Part | None = None
    max_macs: Part | None = None
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
