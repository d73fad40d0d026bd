"""Channels that are divided where they are made and multiplied back where they are read, in a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from slimline.graph.crossings import Crossing
from slimline.graph.edits import PutTensors
from slimline.model import Model

Array = np.ndarray[Any, np.dtype[Any]]


def divided(model: Model, every: Sequence[tuple[Crossing, Array]]) -> Model:
    """The same function with the channels of some values divided, ``(channels,)`` each."""
    stored = model.parameters()
    names = {name for crossing, _ in every for name in crossing.parameters}
    tensors = {name: np.asarray(stored[name], np.float64) for name in names}
    for crossing, by in every:
        crossing.divide(tensors, by)
    tensors = {name: array.astype(stored[name].dtype) for name, array in tensors.items()}
    return replace(model, native=model.edit(PutTensors(tensors)))
