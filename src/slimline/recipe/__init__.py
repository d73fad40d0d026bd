"""Recipes as data: steps, budgets, presets."""

from slimline.steps.activations.step import ActivationPruning
from slimline.recipe.budget import Budget
from slimline.steps.channels.step import ChannelPruning
from slimline.steps.depth.step import DepthPruning
from slimline.steps.quantization.step import StaticQuantization
from slimline.recipe.recipe import Recipe, check_order, load_recipe, parse, presets
from slimline.steps.sparse.step import SparsePruning
from slimline.recipe.step import Step
from slimline.recipe.steps import STEPS, AnyStep
from slimline.recipe.training import Distillation, SparseTraining, Training

__all__ = [
    "STEPS",
    "ActivationPruning",
    "AnyStep",
    "Budget",
    "ChannelPruning",
    "DepthPruning",
    "Distillation",
    "Recipe",
    "SparsePruning",
    "SparseTraining",
    "StaticQuantization",
    "Step",
    "Training",
    "check_order",
    "load_recipe",
    "parse",
    "presets",
]
