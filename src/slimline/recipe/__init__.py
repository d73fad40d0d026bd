"""Recipes as data: steps, budgets, presets."""

from slimline.recipe.budget import Budget
from slimline.recipe.recipe import Recipe, check_order, load_recipe, parse, presets
from slimline.recipe.steps import STEPS, AnyStep, ChannelPruning, Distillation, StaticQuantization, Step

__all__ = [
    "STEPS",
    "AnyStep",
    "Budget",
    "ChannelPruning",
    "Distillation",
    "Recipe",
    "StaticQuantization",
    "Step",
    "check_order",
    "load_recipe",
    "parse",
    "presets",
]
