"""Units: axes that must be pruned together, and the axes that cannot be pruned, with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from slimline.graph.atoms import Labels
from slimline.graph.axes import Solver
from slimline.graph.ir import Graph

WEIGHTED = ("conv", "linear", "einsum", "embedding", "recurrent")
"""Kinds whose weights make new axes."""


@dataclass(frozen=True)
class Unit:
    """Positions that are ranked and pruned as one axis.

    Attributes
    ----------
    name : the first layer that makes the axis, with a suffix where a layer makes several.
    atoms : one label per position, `size` in all.
    layers : the user's layers that make the axis (whose outputs shrink).
    carriers : ``(parameter, dimension)`` of every parameter slice that goes with a position.
    frozen : number of positions of the same axes that can never go.
    siblings : names of units that are factors of the same dimension (heads x head width).
    """

    name: str
    atoms: tuple[int, ...]
    layers: tuple[str, ...]
    carriers: tuple[tuple[str, int], ...]
    frozen: int
    siblings: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Number of positions that may go."""
        return len(self.atoms)


@dataclass(frozen=True)
class Frozen:
    """An axis that cannot be pruned."""

    name: str
    size: int
    reason: str


class Units:
    """All units of a graph, and which rows of which tensors each position owns.

    Solves the axis algebra once; everything a plan needs is read off its labels.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.solver = Solver(graph)

    @cached_property
    def rows(self) -> dict[str, tuple[Labels | None, ...]]:
        """Per value and dimension the resolved labels ``(positions, columns)``, None where nothing can go."""
        return {name: tuple(self.solver.labels(name)) for name in self.solver.dims}

    @cached_property
    def component(self) -> NDArray[np.int64]:
        """Per axis the number of its connected component: axes tied by at least one atom."""
        atoms = self.solver.atoms
        ids = np.arange(1, len(atoms.axis))
        roots = atoms.find(ids)
        a, b = atoms.axis[ids], atoms.axis[roots]
        n = len(atoms.axes)
        return np.asarray(
            connected_components(coo_array((np.ones(len(a)), (a, b)), shape=(n, n)), directed=False)[1], np.int64
        )

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """Every unit that owns at least one parameter slice, in graph order."""
        atoms = self.solver.atoms
        free = atoms.free()
        part = self.component[atoms.axis[free]]
        carriers: dict[int, dict[tuple[str, int], None]] = {}
        beside: dict[int, set[int]] = {}
        of = np.full(len(atoms.axis), -1)
        of[free] = part
        for name in self.graph.parameters:
            for d, labels in enumerate(self.rows[name]):
                if labels is None:
                    continue
                for row in np.unique(np.sort(of[labels], axis=1), axis=0):
                    together = {c for c in row.tolist() if c >= 0}
                    for c in together:
                        carriers.setdefault(c, {})[name, d] = None
                        beside.setdefault(c, set()).update(together - {c})
        for axes in self.solver.products:
            parts = {int(self.component[a]) for a in axes}
            for x in parts:
                beside.setdefault(x, set()).update(parts - {x})
        layers = self._layers()
        ids = np.arange(1, len(atoms.axis))
        roots = atoms.find(ids)
        stuck = atoms.frozen(roots)
        held = np.unique(np.stack([self.component[atoms.axis[ids[stuck]]], roots[stuck]]), axis=1)[0]
        frozen = np.bincount(held, minlength=len(atoms.axes))
        members: dict[int, list[int]] = {}
        for atom, c in zip(free.tolist(), part.tolist(), strict=True):
            members.setdefault(c, []).append(atom)
        units, names = [], {}
        order = [int(c) for c in dict.fromkeys(part.tolist()) if int(c) in carriers]
        taken: dict[str, int] = {}
        for c in order:
            makers = layers.get(c) or tuple(dict.fromkeys(p.rpartition(".")[0] for p, _ in carriers[c]))
            base = makers[0] or next(iter(carriers[c]))[0]
            taken[base] = taken.get(base, 0) + 1
            names[c] = base if taken[base] == 1 else f"{base}#{taken[base]}"
        for c in order:
            units.append(
                Unit(
                    names[c],
                    tuple(members[c]),
                    layers.get(c, ()),
                    tuple(carriers[c]),
                    int(frozen[c]),
                    tuple(sorted(names[x] for x in beside.get(c, ()) if x in names)),
                )
            )
        return tuple(units)

    @cached_property
    def _weight_axes(self) -> list[tuple[int, Labels]]:
        """Axes that a weight makes, each with its resolved atoms; rows that a layer only passes on are none."""
        weighted = {
            n.name: {letter for dims in n.attributes["equation"].inputs[1:] for group in dims for letter in group}
            for n in self.graph.nodes
            if n.kind in WEIGHTED
        }
        atoms = self.solver.atoms
        members = np.split(np.arange(1, len(atoms.axis)), np.cumsum([a.size for a in atoms.axes]))[:-1]
        return [
            (k, np.unique(atoms.resolve(ids[:, None])))
            for k, (axis, ids) in enumerate(zip(atoms.axes, members, strict=True))
            if axis.letter in weighted.get(axis.node, ())
        ]

    def _layers(self) -> dict[int, tuple[str, ...]]:
        """Per component the layers whose weights make it, directly or as a factor of their outputs."""
        by_component: dict[int, dict[str, None]] = {}
        atoms = self.solver.atoms
        for k, roots in self._weight_axes:
            layer = atoms.axes[k].layer
            for c in np.unique(self.component[atoms.axis[roots[roots > 0]]]).tolist():
                if layer:
                    by_component.setdefault(c, {})[layer] = None
        return {c: tuple(layers) for c, layers in by_component.items()}

    @cached_property
    def frozen(self) -> tuple[Frozen, ...]:
        """Axes made by weights none of whose positions can go, in graph order; those that come frozen are last."""
        atoms = self.solver.atoms
        frozen = {}
        for k, roots in self._weight_axes:
            reasons = atoms.reason(roots[roots > 0])
            if reasons and all(reasons):
                axis = atoms.axes[k]
                frozen[k] = Frozen(f"{axis.layer or axis.node} ({axis.letter})", axis.size, reasons[0])
        return (*frozen.values(), *self._inherited())

    def _inherited(self) -> Iterator[Frozen]:
        """Axes of weights that an input has too, of which none can go, as the width of a state that is given."""
        for node in self.graph.nodes:
            if node.kind in WEIGHTED:
                equation, letters = node.attributes["equation"], self.solver.letters[node.name]
                output_axes = {x for dims in equation.outputs for group in dims for x in group}
                weights = [
                    dims
                    for name, dims in zip(node.inputs, equation.inputs, strict=False)
                    if name in self.graph.parameters
                ]
                own = dict.fromkeys(x for dims in weights for group in dims for x in group)
                for letter in own:
                    dim = letters.get(letter)
                    passed = letter in output_axes and letter not in equation.fixed
                    if passed and dim is not None and dim.labels is None and dim.size > 1:
                        yield Frozen(f"{node.layer or node.name} ({letter})", dim.size, dim.reason or "a fixed size")

    def carries(self, node: str, letters: Iterable[str], atoms: Sequence[int]) -> bool:
        """Whether some of the atoms lie along one of the axes of a node's equation; a kernel's dimensions have none."""
        for letter in letters:
            dim = self.solver.letters[node].get(letter)
            if (
                dim is not None
                and dim.labels is not None
                and np.isin(self.solver.atoms.resolve(dim.labels), atoms).any()
            ):
                return True
        return False

    def removed(self, atoms: Sequence[int]) -> NDArray[np.bool_]:
        """Over all atoms: whether it goes."""
        gone = np.zeros(len(self.solver.atoms.axis), bool)
        gone[list(atoms)] = True
        return gone

    def retained(self, labels: Labels | None, gone: NDArray[np.bool_]) -> NDArray[np.int64] | None:
        """Positions of a dimension that stay, or None where all do."""
        if labels is None:
            return None
        lost = gone[labels].any(axis=1)
        return np.flatnonzero(~lost) if lost.any() else None
