"""Pruning in the user's own training loop: ``with sl.pruning(model, step) as p: … p.step()``."""

from __future__ import annotations

import logging
from types import TracebackType

import numpy as np
import torch
from torch import nn

from slimline.basics import arguments
from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import Array, Masking
from slimline.methods.sparsity import Axes
from slimline.recipe.registry import handler
from slimline.recipe.step import Step, are_steps

log = logging.getLogger(__name__)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class pruning:
    """Prune a torch module gradually, in place, while your own loop trains it.

    ::

        with sl.pruning(model, sl.SparsePruning(amount=0.9, schedule="polynomial"), total=steps) as p:
            for x, y in batches:
                optimizer.zero_grad(); loss(model(x), y).backward(); optimizer.step()
                p.step()

    Parameters
    ----------
    model : an `nn.Module`; weights of its linear layers and convolutions are pruned in place.
    step : with a schedule that trains; globs are on the names of modules.
    total : optimiser steps in all, where `begin` and `end` of the step are parts of them.
    seed : of ``random``.

    Attributes
    ----------
    masks : by weight name, boolean; True stays.
    sparsity : the part of these weights that is masked.
    """

    def __init__(self, model: nn.Module, step: Step, total: int | None = None, seed: int = 0) -> None:
        if not isinstance(model, nn.Module):
            raise SlimlineError(f"sl.pruning takes a torch module, not a {type(model).__name__}: see PruningCallback.")
        are_steps("step", step)
        arguments.seed("seed", seed)
        layers = {f"{name}.weight".lstrip("."): axes(m) for name, m in model.named_modules() if axes(m) is not None}
        read = {
            name: (name.rpartition(".")[0], a)
            for name, a in layers.items()
            if a and model.get_parameter(name).requires_grad
        }
        shapes = {name: tuple(model.get_parameter(name).shape) for name in read}
        self._masker: Masking = handler(step.step).masking(step, read, shapes, total, seed)
        self._weights = {name: model.get_parameter(name) for name in self._masker.masks}

    @property
    def masks(self) -> dict[str, Array]:
        """By weight name, boolean; True stays."""
        return dict(self._masker.masks)

    @property
    def sparsity(self) -> float:
        """The part of the weights that is masked."""
        return self._masker.sparsity

    def __enter__(self) -> pruning:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._zero()
        if kind is None and not self._masker.complete:
            log.warning("The training ended before the pruning: %.1f %% of the weights went.", 100 * self.sparsity)

    def step(self) -> None:
        """Call it after each ``optimizer.step()`` and before gradients are cleared."""
        self._masker.advance(
            lambda: {name: _array(weight) for name, weight in self._weights.items()},
            lambda: {name: _array(_gradient(name, weight)) for name, weight in self._weights.items()},
        )
        self._zero()

    def _zero(self) -> None:
        with torch.no_grad():
            for name, mask in self._masker.masks.items():
                self._weights[name].mul_(torch.from_numpy(mask).to(self._weights[name].device))


def _gradient(name: str, weight: nn.Parameter) -> torch.Tensor:
    if weight.grad is None:
        raise SlimlineError(f"{name} has no gradient: call step() after backward() and before zero_grad().")
    return weight.grad


def _array(tensor: torch.Tensor) -> Array:
    return np.array(tensor.detach().cpu().float().numpy())


def axes(module: nn.Module) -> Axes | None:
    """How a layer's weight is read as ``(groups, outputs, inputs)``; None for other modules."""
    if isinstance(module, nn.Linear):
        return Axes((1, *module.weight.shape), (0, 1, 2), 1)
    if isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED)):
        first, second, *kernel = module.weight.shape
        split = (module.groups, first // module.groups, second, *kernel)
        if isinstance(module, _CONVOLUTIONS):
            return Axes(split, tuple(range(len(split))), 1)
        return Axes(split, (0, 2, *range(3, len(split)), 1), 1 + len(kernel))
    return None
