"""Shrinks trained networks for the runtime that serves them, and certifies what it did.

The names load when they are first used: ``import slimline`` imports no framework.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from slimline.basics.version import __version__ as __version__

if TYPE_CHECKING:
    from slimline.basics.errors import SlimlineError as SlimlineError
    from slimline.data import Data as Data
    from slimline.frameworks.keras.loop import PruningCallback as PruningCallback
    from slimline.frameworks.keras.loop import QuantizationCallback as QuantizationCallback
    from slimline.frameworks.torch.loop import pruning as pruning
    from slimline.frameworks.torch.prune import to_torch_prune as to_torch_prune
    from slimline.measure.set_metrics import SetMetric as SetMetric
    from slimline.methods.outputs import Output as Output
    from slimline.model import Model as Model
    from slimline.model.loading import load as load
    from slimline.model.masks import finalize as finalize
    from slimline.model.packing import pack as pack
    from slimline.model.packing import unpack as unpack
    from slimline.model.parts import PartedModel as PartedModel
    from slimline.recipe import Budget as Budget
    from slimline.recipe import Recipe as Recipe
    from slimline.recipe.training import FeatureLoss as FeatureLoss
    from slimline.recipe.training import View as View
    from slimline.run.apply import apply as apply
    from slimline.run.apply import plan as plan
    from slimline.run.compress import compress as compress
    from slimline.run.compress import resume as resume
    from slimline.run.directory import Run as Run
    from slimline.run.export import export as export
    from slimline.run.inspection import inspect as inspect
    from slimline.run.measurement import measure as measure
    from slimline.run.mutual import mutual as mutual
    from slimline.run.own_loop import convert as convert
    from slimline.run.own_loop import prepare as prepare
    from slimline.run.preview import preview as preview
    from slimline.steps.activations.step import ActivationPruning as ActivationPruning
    from slimline.steps.channels.step import ChannelPruning as ChannelPruning
    from slimline.steps.depth.step import DepthPruning as DepthPruning
    from slimline.steps.distillation.step import Distillation as Distillation
    from slimline.steps.dynamic_quantization.step import DynamicQuantization as DynamicQuantization
    from slimline.steps.lighten.step import Lighten as Lighten
    from slimline.steps.low_rank.step import LowRank as LowRank
    from slimline.steps.merging.step import MergeLayers as MergeLayers
    from slimline.steps.mixed_precision.step import MixedPrecision as MixedPrecision
    from slimline.steps.quantization.step import StaticQuantization as StaticQuantization
    from slimline.steps.quantization_aware.step import QuantizationAwareTraining as QuantizationAwareTraining
    from slimline.steps.sparse.step import SparsePruning as SparsePruning
    from slimline.steps.sparse_training.step import SparseTraining as SparseTraining
    from slimline.steps.teacher_head.step import TeacherHead as TeacherHead
    from slimline.steps.tying.step import LayerTying as LayerTying
    from slimline.steps.weight_quantization import WeightQuantization as WeightQuantization
    from slimline.steps.weight_sharing.step import WeightSharing as WeightSharing
    from slimline.training.criterion import DistillationLoss as DistillationLoss

_HOMES = {
    "slimline.run.compress": ("compress", "resume"),
    "slimline.run.apply": ("apply", "plan"),
    "slimline.run.export": ("export",),
    "slimline.run.inspection": ("inspect",),
    "slimline.run.mutual": ("mutual",),
    "slimline.run.measurement": ("measure",),
    "slimline.run.preview": ("preview",),
    "slimline.model.loading": ("load",),
    "slimline.data": ("Data",),
    "slimline.measure.set_metrics": ("SetMetric",),
    "slimline.basics.errors": ("SlimlineError",),
    "slimline.run.directory": ("Run",),
    "slimline.frameworks.keras.loop": ("PruningCallback", "QuantizationCallback"),
    "slimline.frameworks.torch.loop": ("pruning",),
    "slimline.frameworks.torch.prune": ("to_torch_prune",),
    "slimline.model.masks": ("finalize",),
    "slimline.methods.outputs": ("Output",),
    "slimline.model": ("Model",),
    "slimline.model.packing": ("pack", "unpack"),
    "slimline.model.parts": ("PartedModel",),
    "slimline.recipe": ("Budget", "Recipe"),
    "slimline.training.criterion": ("DistillationLoss",),
    "slimline.recipe.training": ("FeatureLoss", "View"),
    "slimline.steps.activations": ("ActivationPruning",),
    "slimline.steps.channels": ("ChannelPruning",),
    "slimline.steps.depth": ("DepthPruning",),
    "slimline.steps.distillation": ("Distillation",),
    "slimline.steps.lighten": ("Lighten",),
    "slimline.steps.low_rank": ("LowRank",),
    "slimline.steps.merging": ("MergeLayers",),
    "slimline.steps.mixed_precision": ("MixedPrecision",),
    "slimline.steps.quantization": ("StaticQuantization",),
    "slimline.steps.quantization_aware": ("QuantizationAwareTraining",),
    "slimline.steps.dynamic_quantization": ("DynamicQuantization",),
    "slimline.steps.sparse": ("SparsePruning",),
    "slimline.steps.sparse_training": ("SparseTraining",),
    "slimline.steps.teacher_head": ("TeacherHead",),
    "slimline.steps.tying": ("LayerTying",),
    "slimline.steps.weight_sharing": ("WeightSharing",),
    "slimline.steps.weight_quantization": ("WeightQuantization",),
    "slimline.run.own_loop": ("convert", "prepare"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [  # noqa: RUF022 - in the order in which they are used
    "load",
    "Model",
    "PartedModel",
    "Data",
    "Output",
    "SetMetric",
    "Budget",
    "Recipe",
    "ChannelPruning",
    "DepthPruning",
    "DynamicQuantization",
    "SparsePruning",
    "ActivationPruning",
    "LowRank",
    "Lighten",
    "MergeLayers",
    "LayerTying",
    "SparseTraining",
    "Distillation",
    "DistillationLoss",
    "TeacherHead",
    "FeatureLoss",
    "View",
    "StaticQuantization",
    "MixedPrecision",
    "QuantizationAwareTraining",
    "WeightSharing",
    "WeightQuantization",
    "inspect",
    "preview",
    "plan",
    "apply",
    "mutual",
    "finalize",
    "pruning",
    "PruningCallback",
    "QuantizationCallback",
    "to_torch_prune",
    "prepare",
    "convert",
    "export",
    "pack",
    "unpack",
    "measure",
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
    """Keeps ``slimline.measure`` what users call: importing the package of that name would bind the package."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
