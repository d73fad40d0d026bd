"""Channels that are divided where they are made and multiplied back where they are read, in a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from slimline.graph.crossings import Crossing
from slimline.graph.edits import PutTensors
from slimline.model import Model
from slimline.model.equality import refuse_other_answers

Array = np.ndarray[Any, np.dtype[Any]]


def divided(model: Model, every: Sequence[tuple[Crossing, Array]], what: str) -> Model:
    """The same function with the channels of some values divided, ``(channels,)`` each.

    Parameters
    ----------
    what : asks for it, for a message.

    Raises
    ------
    SlimlineError : it is another function.
    """
    stored = model.parameters()
    names = {name for crossing, _ in every for name in crossing.parameters}
    tensors = {name: np.asarray(stored[name], np.float64) for name in names}
    for crossing, by in every:
        crossing.divide(tensors, by)
    tensors = {name: array.astype(stored[name].dtype) for name, array in tensors.items()}
    even = replace(model, native=model.edit(PutTensors(tensors)))
    refuse_other_answers(model, even, what)
    return even
