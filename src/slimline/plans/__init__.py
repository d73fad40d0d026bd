"""What a structural step will do: printable, JSON, able to mask and to apply."""

from slimline.plans.base import StructuralPlan
from slimline.plans.cuts import CutPlan
from slimline.plans.replacement import Replacement, ReplacementPlan
from slimline.plans.units import Plan

AnyPlan = StructuralPlan

__all__ = ["AnyPlan", "CutPlan", "Plan", "Replacement", "ReplacementPlan", "StructuralPlan"]
