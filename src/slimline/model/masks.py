"""Masks that a model carries: what they set to zero stays zero through every step, until they are baked in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from slimline import arguments

from slimline.files import array_files
from slimline.arguments import takes
from slimline.errors import SlimlineError, unknown
from slimline.model import Model
from slimline.steps.sparse.step import SparsePruning
from slimline.files.strictjson import Malformed


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
    native = model.adapter.replace(model.native, zeroed) if zeroed else model.native
    return replace(model, native=native, masks=masks)


@takes(model=arguments.model)
def finalize(model: Model) -> Model:
    """The same network without its masks: the zeros stay in the weights, and training may change them again."""
    kept = held(model)
    return kept.then(kept.adapter.replace(kept.native, {}), {"step": "finalize"}, masks={})


def sparsity(model: Model) -> dict[str, float]:
    """By name, the part of each stored tensor of two or more dimensions that is zero."""
    return {name: float(np.mean(array == 0)) for name, array in model.parameters().items() if array.ndim > 1}


def given(step: SparsePruning, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The user's own masks, if they fit the weights of `shapes`."""
    assert step.masks is not None
    if isinstance(step.masks, str):
        try:
            found = {name: array != 0 for name, array in array_files.safetensors(Path(step.masks)).items()}
        except (OSError, Malformed) as reason:
            raise SlimlineError(f"The masks {step.masks} cannot be read: give a .safetensors file.") from reason
    else:
        found = {name: mask.array() for name, mask in step.masks.items()}
    for name, mask in found.items():
        if name not in shapes:
            raise unknown("weight to mask called", name, shapes)
        if mask.shape != shapes[name]:
            raise SlimlineError(
                f"The mask of {name} has shape {mask.shape}, not the weight's {shapes[name]}: reshape it."
            )
    return found
