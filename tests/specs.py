"""What a model takes, for data that are checked without one."""

from __future__ import annotations

import numpy as np

from slimline.graph.ir import InputSpec


def specs(arrays: tuple[np.ndarray, ...], *names: str) -> list[InputSpec]:
    """Inputs of the shapes and dtypes of example arrays ``(batch, …)``; named ``x0``, ``x1``, … by default."""
    return [InputSpec(names[i] if names else f"x{i}", (None, *a.shape[1:]), a.dtype.name) for i, a in enumerate(arrays)]
