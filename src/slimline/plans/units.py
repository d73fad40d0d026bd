"""Positions of units that will go."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from slimline.basics.arguments import takes
from slimline.graph.edits import Mask, Resize
from slimline.graph.removal import Removal, take
from slimline.graph.units import Units
from slimline.model.model import is_model
from slimline.plans.base import StructuralPlan

if TYPE_CHECKING:
    from slimline.model import Model


class Plan(Removal, StructuralPlan):
    """Positions of units that go. Printable, JSON-serialisable; `mask` and `apply` carry it out.

    Parameters
    ----------
    units : the units of the graph.
    removed : per unit's name the positions that go, ascending.
    notes : what was asked for and not done, each with its reason.
    rounding : how the multiple of all widths was found, where it was measured (ready for JSON).
    """

    def __init__(
        self,
        units: Units,
        removed: Mapping[str, tuple[int, ...]],
        notes: tuple[str, ...] = (),
        rounding: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(units, removed)
        self.notes = notes
        self.rounding = rounding

    @takes(model=is_model)
    def mask(self, model: Model) -> Model:
        """A new model of the same shapes that computes what `apply`'s will: the positions that go are
        zero, and left out of every statistic."""
        return model.edited((Mask(self),), {"step": "mask", "plan": self.summary()})

    @takes(model=is_model)
    def apply(self, model: Model) -> Model:
        """A new model from which the positions are really removed."""
        masks = {name: take(mask, self.retained(name)) for name, mask in model.masks.items()}
        return model.edited((Resize(self),), {"step": "prune", "plan": self.summary()}, masks)

    def summary(self) -> dict[str, Any]:
        """What goes and what is left, ready for JSON."""
        return {
            "units": [
                {
                    "name": u.name,
                    "size": u.size + u.frozen,
                    "removed": list(self.removed.get(u.name, ())),
                    "layers": list(u.layers),
                }
                for u in self.units.units
            ],
            "frozen": [{"axis": f.name, "size": f.size, "reason": f.reason} for f in self.units.frozen],
            "notes": list(self.notes),
            **({"rounding": dict(self.rounding)} if self.rounding else {}),
            **self.totals,
        }

    @classmethod
    def from_json(cls, text: str, model: Model) -> Plan:
        """The plan that `to_json` wrote, for `model`."""
        data = json.loads(text)
        return cls(
            Units(model.graph),
            {u["name"]: tuple(u["removed"]) for u in data["units"]},
            tuple(data.get("notes", ())),
            data.get("rounding"),
        )

    def __str__(self) -> str:
        lines = [self.headline]
        if self.rounding:
            at = f"{self.rounding['multiple']}, measured on {self.rounding['target']}"
            lines.append(f"  widths are multiples of {at}")
        for u in self.units.units:
            gone = len(self.removed.get(u.name, ()))
            lines.append(f"  {u.name}: {u.size + u.frozen} -> {u.size + u.frozen - gone}  ({', '.join(u.layers)})")
        lines += [f"  {f.name}: {f.size}, frozen: {f.reason}" for f in self.units.frozen]
        lines += [f"  note: {n}" for n in self.notes]
        return "\n".join(lines)
