"""Masks that a model carries: what they set to zero stays zero through every step, until they are baked in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from slimline.basics.arguments import takes
from slimline.graph.edits import PutTensors
from slimline.model.model import Model, is_model


def held(model: Model) -> Model:
    """The model with zeros wherever its masks say so; masks of weights that a step has replaced are dropped."""
    if not model.masks:
        return model
    stored = model.parameters()
    masks = {name: m for name, m in model.masks.items() if name in stored and stored[name].shape == m.shape}
    revived = {name: np.where(m, stored[name], 0) for name, m in masks.items() if stored[name][~m].any()}
    if len(masks) == len(model.masks) and not revived:
        return model
    zeroed = {name: array.astype(stored[name].dtype) for name, array in revived.items()}
    native = model.edit(PutTensors(zeroed)) if zeroed else model.native
    return replace(model, native=native, masks=masks)


@takes(model=is_model)
def finalize(model: Model) -> Model:
    """The same network without its masks: the zeros stay in the weights, and training may change them again."""
    masked = held(model)
    return masked.then(masked.edit(PutTensors({})), {"step": "finalize"}, masks={})


def sparsity(model: Model) -> dict[str, float]:
    """By name, the part of each stored tensor of two or more dimensions that is zero."""
    return {name: float(np.mean(array == 0)) for name, array in model.parameters().items() if array.ndim > 1}
