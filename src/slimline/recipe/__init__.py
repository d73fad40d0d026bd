"""Recipes as data: steps, budgets, presets."""

from slimline.recipe.activations import ActivationPruning
from slimline.recipe.budget import Budget
from slimline.recipe.channels import ChannelPruning
from slimline.recipe.depth import DepthPruning
from slimline.recipe.quantization import StaticQuantization
from slimline.recipe.recipe import Recipe, check_order, load_recipe, parse, presets
from slimline.recipe.sparse import SparsePruning
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
