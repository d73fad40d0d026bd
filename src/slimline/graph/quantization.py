"""Which tensors of a graph are written in which formats: data, the same for every framework."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slimline.basics.errors import SlimlineError
from slimline.methods.dynamic import GRIDS, DynamicGrid
from slimline.methods.formats import Format, from_notes

_FIELDS = {"activations", "weights", "layers", "float_layers", "stored", "dynamic", "dynamic_grid"}


@dataclass(frozen=True)
class Quantization:
    """Formats of activations (by value name) and of weights (by parameter name) of one graph.

    The simulation, the artifact's writer and the report all read this one truth.

    Attributes
    ----------
    activations : formats of the values that are rounded where they are produced.
    weights : formats of the parameters.
    layers : user's names of the layers that compute in integers.
    float_layers : layers that were put back to float, with the reason.
    stored : whether the parameters hold the rounded numbers, so that none of them is rounded when the model runs.
    dynamic : weights, by parameter name, whose layers round what they multiply by them when the model runs.
    dynamic_grid : to which of the grids of `slimline.methods.dynamic`.
    """

    activations: Mapping[str, Format] = field(default_factory=dict)
    weights: Mapping[str, Format] = field(default_factory=dict)
    layers: tuple[str, ...] = ()
    float_layers: Mapping[str, str] = field(default_factory=dict)
    stored: bool = False
    dynamic: tuple[str, ...] = ()
    dynamic_grid: DynamicGrid = GRIDS[0]

    def notes(self) -> dict[str, Any]:
        """All of it, with arrays as leaves; what `from_notes` reads and `slimline.files.notes` stores."""
        return {
            "activations": {name: each.notes() for name, each in self.activations.items()},
            "weights": {name: each.notes() for name, each in self.weights.items()},
            "layers": list(self.layers),
            "float_layers": dict(self.float_layers),
            **({"stored": True} if self.stored else {}),
            **({"dynamic": list(self.dynamic)} if self.dynamic else {}),
            **({"dynamic_grid": self.dynamic_grid} if self.dynamic_grid != GRIDS[0] else {}),
        }

    @classmethod
    def from_notes(cls, notes: Any) -> Quantization:
        """What `notes` wrote.

        Raises
        ------
        SlimlineError : anything else, since notes may come from anybody.
        """
        match notes:
            case {
                "activations": dict(activations),
                "weights": dict(weights),
                "layers": list(layers),
                "float_layers": dict(reasons),
            } if _plain(notes) and all(
                isinstance(text, str) for text in (*layers, *reasons.values(), *notes.get("dynamic", ()))
            ):
                return cls(
                    {name: from_notes(each) for name, each in activations.items()},
                    {name: from_notes(each) for name, each in weights.items()},
                    tuple(layers),
                    reasons,
                    "stored" in notes,
                    tuple(notes.get("dynamic", ())),
                    notes.get("dynamic_grid", GRIDS[0]),
                )
        raise SlimlineError("The notes of a quantized model are damaged: quantize the float model again.")

    def summary(self) -> dict[str, dict[str, int]]:
        """How many activations and weights there are of each format, in words."""
        sides = {"activations": self.activations, "weights": self.weights}
        return {side: dict(Counter(each.describe() for each in held.values())) for side, held in sides.items()}


def _plain(notes: Mapping[str, Any]) -> bool:
    """Whether there are no other fields than these, and the last three are only noted where they say something."""
    dynamic = notes.get("dynamic", [""])
    listed = isinstance(dynamic, list) and bool(dynamic)
    grids = [each for each in GRIDS[1:] if "dynamic" in notes]
    told = "dynamic_grid" not in notes or notes["dynamic_grid"] in grids
    return notes.keys() <= _FIELDS and notes.get("stored", True) is True and listed and told
