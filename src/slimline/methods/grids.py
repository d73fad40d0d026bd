"""Integer grids."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Grid(BaseModel):
    """An affine integer grid: ``real = scale * (q - zero_point)`` with ``low <= q <= high``.

    `scale` and `zero_point` have one entry (per tensor) or one per position of dimension `axis`.
    """

    model_config = ConfigDict(frozen=True)
    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    low: int
    high: int
    axis: int | None = None
    dtype: Literal["int8", "uint8"] = "int8"
