"""Recipes as data: what all steps share, which there are, budgets, presets."""

from slimline.recipe.budget import Budget
from slimline.recipe.recipe import AnyStep, Recipe, check_order, load_recipe, parse, presets
from slimline.recipe.registry import configs, handler, handlers
from slimline.recipe.step import Step
from slimline.recipe.training import Training

__all__ = [
    "AnyStep",
    "Budget",
    "Recipe",
    "Step",
    "Training",
    "check_order",
    "configs",
    "handler",
    "handlers",
    "load_recipe",
    "parse",
    "presets",
]
