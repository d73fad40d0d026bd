"""The view of a batch that teacher and student share, by the settings of a step (Beyer et al. 2022,
arXiv:2106.05237)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.basics.named import Labels, Named
from slimline.methods import views
from slimline.recipe.training import Training, View

if TYPE_CHECKING:
    from slimline.frameworks.base import Array, Batch


def check(step: Training, example: Sequence[Array], labels: Labels) -> None:
    """Refuse a view that the inputs, or the labels, do not allow.

    Raises
    ------
    SlimlineError : images are to be moved and there are none, or their labels lie in the image; numbers to be mixed
        that count or name something, or labels learned of mixed samples.
    """
    view = step.view
    if view is None:
        return
    moves = view.flip or view.shift > 0 or view.crop is not None
    if (moves or view.erase) and not any(_image(x) for x in example):
        raise SlimlineError("The view flips, shifts, crops or erases images, and no input is one: leave that out.")
    if view.shift and any(2 * view.shift >= min(_sides(x)) for x in example if _image(x)):
        raise SlimlineError(f"The view shifts images by {view.shift} pixels, half of their size: shift them by less.")
    if (view.noise or view.mixup) and (strange := [x.dtype for x in example if x.dtype.kind != "f"]):
        raise SlimlineError(
            f"The view adds noise or mixes samples, and an input is {strange[0]}: leave noise and mixup out."
        )
    dense = any(each is not None and each.ndim > 2 for each in (labels if isinstance(labels, Named) else (labels,)))
    if moves and dense and step.alpha < 1:
        raise SlimlineError(
            f"The view moves images, whose labels have a place in them and stay there, and alpha={step.alpha:g} learns "
            "from labels too: set alpha to 1, or leave flip, shift and crop out."
        )
    if view.mixup and labels is not None and step.alpha < 1:
        raise SlimlineError(
            f"Mixed samples have no labels, and alpha={step.alpha:g} learns from labels too: set alpha to 1."
        )


def seen(view: View, batch: Batch, channels_first: bool, rng: np.random.Generator) -> Batch:
    """The batch as both see it; its labels are what they were."""
    inputs, labels = batch
    arrays = []
    for x in inputs:
        if _image(x):
            images = np.moveaxis(x, 1, -1) if channels_first else x
            images = views.mirrored(images, rng) if view.flip else images
            images = views.shifted(images, view.shift, rng) if view.shift else images
            images = images if view.crop is None else views.cropped(images, view.crop, rng)
            images = views.erased(images, view.erase, rng) if view.erase else images
            x = np.ascontiguousarray(np.moveaxis(images, -1, 1) if channels_first else images)
        arrays.append(views.noisy(x, view.noise, rng) if view.noise else x)
    if view.mixup:
        mixing = views.mixing(len(arrays[0]), view.mixup, rng)
        arrays = [views.mixed(x, *mixing) for x in arrays]
    return tuple(arrays), labels


def _image(x: Array) -> bool:
    return x.ndim == 4 and x.dtype.kind == "f"


def _sides(x: Array) -> tuple[int, ...]:
    """All but the batch and the smallest dimension, which counts channels."""
    return tuple(sorted(x.shape[1:])[1:])
