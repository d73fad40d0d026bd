"""Labels that are numbers of classes."""

from __future__ import annotations

import numpy as np

from slimline.basics.arrays import Array
from slimline.basics.errors import SlimlineError


def class_numbers(labels: Array) -> Array:
    """Labels with one-hot rows and a last dimension of one turned to class numbers; others as they are."""
    if labels.ndim == 2 and labels.shape[1] == 1 and labels.dtype.kind in "iub":
        return labels[:, 0].astype(np.int64)
    if labels.ndim == 2 and labels.shape[1] > 1 and (labels == (labels > 0)).all() and (labels.sum(1) == 1).all():
        return np.asarray(labels.argmax(1))
    return labels.astype(np.int64) if labels.dtype.kind in "iub" else labels


def check_classes(labels: Array, classes: int, where: str) -> None:
    """Refuse labels beyond the classes that a model knows."""
    if not labels.size or (labels.min() >= 0 and labels.max() < classes):
        return
    raise SlimlineError(
        f"The {where} labels go from {labels.min()} to {labels.max()}, but the model has {classes} outputs: "
        f"labels must be in 0 to {classes - 1}."
    )
