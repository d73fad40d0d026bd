"""Masks that the user brings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from slimline.basics.errors import SlimlineError, unknown
from slimline.files import array_files
from slimline.files.strictjson import Malformed
from slimline.steps.sparse.step import SparsePruning


def user_masks(step: SparsePruning, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The user's own masks, if they fit the weights of `shapes`."""
    assert step.masks is not None
    if isinstance(step.masks, str):
        try:
            masks = {name: array != 0 for name, array in array_files.safetensors(Path(step.masks)).items()}
        except (OSError, Malformed) as reason:
            raise SlimlineError(f"The masks {step.masks} cannot be read: give a .safetensors file.") from reason
    else:
        masks = {name: mask.array() for name, mask in step.masks.items()}
    for name, mask in masks.items():
        if name not in shapes:
            raise unknown("weight to mask called", name, shapes)
        if mask.shape != shapes[name]:
            raise SlimlineError(
                f"The mask of {name} has shape {mask.shape}, not the weight's {shapes[name]}: reshape it."
            )
    return masks
