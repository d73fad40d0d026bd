"""A removal: which positions of which units go, and what that leaves of every value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimline.basics.errors import SlimlineError
from slimline.graph import cost
from slimline.graph.units import Units

Index = NDArray[np.int64]


def take(array: NDArray[Any], retained: tuple[Index | None, ...]) -> NDArray[Any]:
    """The positions that stay of every dimension."""
    for axis, index in enumerate(retained):
        if index is not None:
            array = array.take(index, axis)
    return array


class Removal:
    """Positions of units that go, and what stays of all that carries them.

    Parameters
    ----------
    units : the units of the graph.
    removed : per unit's name the positions that go, ascending.
    """

    def __init__(self, units: Units, removed: Mapping[str, tuple[int, ...]]) -> None:
        self.units = units
        self.graph = units.graph
        self.removed = {k: tuple(v) for k, v in removed.items() if len(v)}
        by_name = {u.name: u for u in units.units}
        atoms = []
        for name, positions in self.removed.items():
            if name not in by_name:
                raise SlimlineError(f"The plan names a unit {name!r} that the model does not have: plan again.")
            unit = by_name[name]
            if max(positions) >= unit.size or min(positions) < 0:
                raise SlimlineError(f"The plan removes position {max(positions)} of {name!r}, which has {unit.size}.")
            atoms += [unit.atoms[p] for p in positions]
        self._gone = units.removed(atoms)

    @cached_property
    def _retained(self) -> dict[str, tuple[Index | None, ...]]:
        return {
            name: tuple(self.units.retained(labels, self._gone) for labels in rows)
            for name, rows in self.units.rows.items()
        }

    def retained(self, value: str) -> tuple[Index | None, ...]:
        """Per dimension of a value (or parameter) the positions that stay, ascending; None where all do."""
        return self._retained[value]

    def shape(self, value: str) -> tuple[int, ...]:
        """The shape a value will have, at the graph's batch size."""
        before = self.graph.values[value].shape
        retained = self._retained.get(value) or (None,) * len(before)
        return tuple(n if k is None else len(k) for n, k in zip(before, retained, strict=True))

    def axis_retained(self, node: str, letter: str) -> Index | None:
        """The positions that stay of an axis of a node's equation, ascending; None where all do."""
        dim = self.units.solver.letters[node][letter]
        return self.units.retained(
            None if dim.labels is None else self.units.solver.atoms.resolve(dim.labels), self._gone
        )

    def axis_size(self, node: str, letter: str) -> int:
        """The size that an axis of a node's equation will have."""
        retained = self.axis_retained(node, letter)
        return self.units.solver.letters[node][letter].size if retained is None else len(retained)

    def statistics(self, node: str) -> list[tuple[int, int, NDArray[np.bool_]]]:
        """Dimensions over which a node reduces or normalises and that lose positions, but not those of a norm's scale.

        Each as (input index, dimension, keep mask of the dimension's original size): a masked model must
        leave the positions that go out of means, maxima, norms and contractions.
        """
        operator = self._nodes[node]
        equation = operator.attributes.get("equation")
        if equation is None:
            return []
        masks = []
        for i, (name, dims) in enumerate(zip(operator.inputs, equation.inputs, strict=False)):
            if name is None or (i and operator.kind.endswith("_norm")):
                continue
            for d, group in enumerate(dims):
                shrinks = any(
                    x in equation.statistics and self.axis_size(node, x) < self.units.solver.letters[node][x].size
                    for x in group
                    if x in self.units.solver.letters[node]
                )
                retained = self._retained[name][d]
                if shrinks and retained is not None:
                    mask = np.zeros(self.graph.values[name].shape[d], bool)
                    mask[retained] = True
                    masks.append((i, d, mask))
        return masks

    @cached_property
    def _nodes(self) -> dict[str, Any]:
        return {n.name: n for n in self.graph.nodes}

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates per sample that will be left."""
        return cost.macs(self.graph, self.shape)

    @cached_property
    def parameters(self) -> int:
        """Trained numbers that will be left."""
        return sum(math.prod(self.shape(name)) for name in self.graph.trainable)
