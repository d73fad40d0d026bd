"""Residual streams that are rotated before their weights are rounded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.graph.edits import PutTensors
from slimline.graph.streams import Stream, streams
from slimline.methods.rotation import randomized_hadamard
from slimline.model import Model
from slimline.model.equality import refuse_other_answers


def rotatable(model: Model) -> list[Stream]:
    """All streams of a model that can be rotated.

    Raises
    ------
    SlimlineError : there is none, with the reason; or zeros that have to stay.
    """
    if model.masks:
        raise SlimlineError("A rotation would revive what was pruned: leave rotation out, or prune afterwards.")
    every, reasons = streams(model.graph)
    if not every:
        why = f", since {reasons[0]}" if reasons else ": no RMS norm reads a sum of layers' outputs"
        raise SlimlineError(f"The model has no residual stream that can be rotated{why}: leave rotation out.")
    return every


def rotated(model: Model) -> Model:
    """The same function with every stream rotated that can be."""
    stored = model.parameters()
    every = rotatable(model)
    tensors = {name: np.asarray(stored[name], np.float64) for each in every for name in each.parameters}
    for each in every:
        each.rotate(tensors, randomized_hadamard(each.width))
    tensors = {name: array.astype(stored[name].dtype) for name, array in tensors.items()}
    turned = replace(model, native=model.edit(PutTensors(tensors)))
    refuse_other_answers(model, turned, "rotation")
    return turned
