"""Shrinks trained networks for the runtime that serves them, and certifies what it did.

The names load when they are first used: ``import slimline`` imports no framework.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimline.run.compress import apply as apply
    from slimline.run.compress import compress as compress
    from slimline.run.compress import export as export
    from slimline.run.compress import load as load
    from slimline.run.compress import plan as plan
    from slimline.run.compress import resume as resume
    from slimline.data import Data as Data
    from slimline.errors import SlimlineError as SlimlineError
    from slimline.frameworks.keras.loop import PruningCallback as PruningCallback
    from slimline.frameworks.torch.loop import pruning as pruning
    from slimline.frameworks.torch.prune import to_torch_prune as to_torch_prune
    from slimline.model.masks import finalize as finalize
    from slimline.model import Model as Model
    from slimline.run.parts import PartedModel as PartedModel
    from slimline.recipe import ActivationPruning as ActivationPruning
    from slimline.recipe import Budget as Budget
    from slimline.recipe import ChannelPruning as ChannelPruning
    from slimline.recipe import DepthPruning as DepthPruning
    from slimline.recipe import Distillation as Distillation
    from slimline.recipe import Recipe as Recipe
    from slimline.recipe import SparsePruning as SparsePruning
    from slimline.recipe import SparseTraining as SparseTraining
    from slimline.recipe import StaticQuantization as StaticQuantization
    from slimline.run.directory import Run as Run

__version__ = "0.1.0"

_HOMES = {
    "slimline.run.compress": ("apply", "compress", "export", "load", "plan", "resume"),
    "slimline.data": ("Data",),
    "slimline.errors": ("SlimlineError",),
    "slimline.run.directory": ("Run",),
    "slimline.frameworks.keras.loop": ("PruningCallback",),
    "slimline.frameworks.torch.loop": ("pruning",),
    "slimline.frameworks.torch.prune": ("to_torch_prune",),
    "slimline.model.masks": ("finalize",),
    "slimline.model": ("Model",),
    "slimline.run.parts": ("PartedModel",),
    "slimline.recipe": (
        "ActivationPruning",
        "Budget",
        "ChannelPruning",
        "DepthPruning",
        "Distillation",
        "Recipe",
        "SparsePruning",
        "SparseTraining",
        "StaticQuantization",
    ),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [  # noqa: RUF022 - in the order in which they are used
    "load",
    "Model",
    "PartedModel",
    "Data",
    "Budget",
    "Recipe",
    "ChannelPruning",
    "DepthPruning",
    "SparsePruning",
    "ActivationPruning",
    "SparseTraining",
    "Distillation",
    "StaticQuantization",
    "plan",
    "apply",
    "finalize",
    "pruning",
    "PruningCallback",
    "to_torch_prune",
    "export",
    "compress",
    "resume",
    "Run",
    "SlimlineError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'slimline' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class _Package(ModuleType):
    """Keeps ``slimline.compress`` and ``slimline.pruning`` what users call, when importing the modules of these names
    would bind the modules."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "compress" and isinstance(value, ModuleType):
            value = value.compress
        if name == "pruning" and isinstance(value, ModuleType):
            return  # it is found when it is first used, since it needs torch
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
