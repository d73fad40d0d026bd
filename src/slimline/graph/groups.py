"""Groups of weights: everything in the parameters that goes with one position of a unit, added up and scaled.

A weight may be in several groups, that of its output and that of its input; what scales both scales it twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slimline.graph.units import Unit, Units

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Slot:
    """One dimension of a parameter, and per position and column the number of its group; -1 for none."""

    parameter: str
    dim: int
    groups: Array


@dataclass(frozen=True)
class Groups:
    """Positions of units as groups, numbered unit by unit.

    Attributes
    ----------
    units : ``(count,)``, the number of each group's unit, from 0.
    slots : every dimension of a trainable parameter along which slices belong to groups.
    """

    units: Array
    slots: tuple[Slot, ...]

    @classmethod
    def of(cls, units: Units, chosen: Sequence[Unit], positions: Mapping[str, Sequence[int]] | None = None) -> Groups:
        """Every position of the `chosen` units, or by the unit's name only these `positions`; frozen weights have
        none."""
        picked = [range(u.size) if positions is None else positions[u.name] for u in chosen]
        atoms = [u.atoms[p] for u, places in zip(chosen, picked, strict=True) for p in places]
        number = np.full(len(units.solver.atoms.axis), -1)
        number[atoms] = np.arange(len(atoms))
        slots = []
        for name, dim in dict.fromkeys(c for u in chosen for c in u.carriers):
            labels = units.rows[name][dim]
            if name in units.graph.learning and labels is not None and (number[labels] >= 0).any():
                slots.append(Slot(name, dim, number[labels]))
        return cls(np.repeat(np.arange(len(chosen)), [len(places) for places in picked]), tuple(slots))

    @property
    def count(self) -> int:
        """Number of groups."""
        return len(self.units)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that have slices in groups."""
        return tuple(dict.fromkeys(slot.parameter for slot in self.slots))

    def sums(self, value: Callable[[str, int], Array | None]) -> Array:
        """``(count,)`` float64: `value` of a parameter and dimension, one number per slice, added up over each group.

        Parameters where `value` is None count nothing.
        """
        total = np.zeros(self.count + 1)  # the last for slices of no group
        for slot in self.slots:
            values = value(slot.parameter, slot.dim)
            if values is not None:
                for column in slot.groups.T:
                    np.add.at(total, column, values)
        return total[:-1]

    def scaled(self, arrays: Mapping[str, Array], factors: Array) -> dict[str, Array]:
        """New arrays for all `parameters`: every slice times the factors ``(count,)`` of its groups; dtypes stay."""
        padded = np.append(factors, 1.0)
        scaled = {name: arrays[name] for name in self.parameters}
        for slot in self.slots:
            array = scaled[slot.parameter]
            along = padded[slot.groups].prod(axis=1).astype(array.dtype)
            scaled[slot.parameter] = array * along.reshape([-1 if d == slot.dim else 1 for d in range(array.ndim)])
        return scaled

    def sizes(self, shapes: Mapping[str, Sequence[int]]) -> Array:
        """``(count,)``: how many weights each group holds."""

        def size(name: str, dim: int) -> Array:
            shape = shapes[name]
            return np.full(shape[dim], np.prod([n for d, n in enumerate(shape) if d != dim]))

        return self.sums(size)
