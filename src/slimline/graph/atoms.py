"""Boolean variables under equality, disjunction and falsehood, on arrays: the ground of the axis algebra.

Labels of a dimension are an integer array ``(positions, columns)`` of atoms, 0 for none; a position is removed
when any of its atoms is true.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Axis:
    """Where a run of atoms was born: the node, its layer and the letter in its equation."""

    size: int
    node: str
    layer: str
    letter: str


class Atoms:
    """Boolean variables under equality, disjunction and falsehood, on arrays."""

    def __init__(self) -> None:
        self.axes: list[Axis] = []
        self.reasons: list[str] = [""]
        self._parent = np.zeros(1, np.int64)
        self.axis = np.full(1, -1, np.int64)
        self._why = np.zeros(1, np.int64)
        self._parts = np.zeros((1, 2), np.int64)

    def fresh(self, axis: Axis) -> Labels:
        """Labels ``(size, 1)`` of new atoms."""
        start = len(self._parent)
        new = np.arange(start, start + axis.size)
        self._parent = np.concatenate([self._parent, new])
        self.axis = np.concatenate([self.axis, np.full(axis.size, len(self.axes))])
        self._why = np.concatenate([self._why, np.zeros(axis.size, np.int64)])
        self._parts = np.concatenate([self._parts, np.zeros((axis.size, self._parts.shape[1]), np.int64)])
        self.axes.append(axis)
        return new[:, None]

    def find(self, atoms: Labels) -> Labels:
        """The representative of every atom's class."""
        root = self._parent[atoms]
        while True:
            up = self._parent[root]
            if np.array_equal(up, root):
                break
            root = up
        self._parent[atoms] = root
        return root

    def resolve(self, labels: Labels) -> Labels:
        """The same labels in representatives that are not expanded; no atom twice in a row, no empty column."""
        labels = self.find(labels)
        while (expanded := self._parts[labels, 0] > 0).any():
            parts = self._parts[labels]
            alone = np.zeros_like(parts)
            alone[..., 0] = labels
            labels = self.find(np.where(expanded[..., None], parts, alone).reshape(len(labels), -1))
            labels = labels[:, labels.any(axis=0)]
        for j in range(1, labels.shape[1]):
            repeated = (labels[:, :j] == labels[:, j : j + 1]).any(axis=1)
            if repeated.any():
                labels[repeated, j] = 0
        return labels[:, labels.any(axis=0)]

    def unite(self, left: Labels, right: Labels) -> None:
        """Make atoms equal, pair by pair; all are representatives, not expanded, not 0."""
        while True:
            a, b = self.find(left), self.find(right)
            differ = a != b
            if not differ.any():
                return
            low, high = np.minimum(a, b)[differ], np.maximum(a, b)[differ]
            np.maximum.at(self._why, low, self._why[high])
            self._parent[high] = low

    def freeze(self, labels: Labels, reason: str) -> None:
        """Make every atom in `labels` false for ever."""
        atoms = np.unique(self.resolve(labels.reshape(-1, 1)))
        atoms = atoms[(atoms > 0) & (self._why[atoms] == 0)]
        if len(atoms):
            self._why[atoms] = len(self.reasons)
            self.reasons.append(reason)

    def reason(self, atoms: Labels) -> list[str]:
        """Why the atoms are frozen, '' for those that are free."""
        return [self.reasons[i] for i in self._why[atoms]]

    def frozen(self, atoms: Labels) -> NDArray[np.bool_]:
        """Whether the atoms, all representatives, are frozen."""
        return self._why[atoms] > 0

    def free(self) -> Labels:
        """All representatives that may be removed, ascending."""
        ids = np.arange(len(self._parent))
        alive = (self._parent[ids] == ids) & (self._parts[:, 0] == 0) & (self._why == 0)
        alive[0] = False
        return np.flatnonzero(alive)

    def expand(self, atoms: Labels, parts: Labels, reason: str) -> None:
        """``atoms[r] := or(parts[r])``; repeated atoms keep only the parts they have in every row."""
        unique, first, inverse = np.unique(atoms, return_index=True, return_inverse=True)
        parts = parts.copy()
        if len(unique) < len(atoms):
            for j in range(parts.shape[1]):
                varies = parts[:, j] != parts[first, j][inverse]
                if varies.any():
                    groups = np.isin(inverse, inverse[varies])
                    self.freeze(parts[groups, j], reason)
                    parts[groups, j] = 0
        parts = parts[first]
        if np.isin(unique, parts).any():
            self.freeze(unique, reason)
            self.freeze(parts, reason)
            return
        empty = ~parts.any(axis=1)
        if empty.any():
            self.freeze(unique[empty], reason)
        unique, parts = unique[~empty], parts[~empty]
        order = np.argsort(parts == 0, axis=1, kind="stable")
        parts = np.take_along_axis(parts, order, axis=1)
        for why in np.unique(self._why[unique]):
            if why:
                self.freeze(parts[self._why[unique] == why], self.reasons[why])
        width = parts.shape[1] - self._parts.shape[1]
        if width > 0:
            self._parts = np.pad(self._parts, ((0, 0), (0, width)))
        self._parts[unique, : parts.shape[1]] = parts

    def equate(self, left: Labels, right: Labels, reason: str) -> None:
        """Make position r of both sides go or stay together, for every r.

        One kind of row is settled at a time and the rest looked at anew, because settling a row may
        unite, expand or freeze atoms of the others. Each round leaves fewer open rows.
        """
        while len(left):
            a, why_a = self._open(left)
            b, why_b = self._open(right)
            for i in range(a.shape[1]):
                for j in range(b.shape[1]):
                    same = (a[:, i] == b[:, j]) & (a[:, i] > 0)
                    a[same, i] = 0
                    b[same, j] = 0
            count_a, count_b = (a > 0).sum(axis=1), (b > 0).sum(axis=1)
            for labels, rows, why in (
                (a, (count_b == 0) & (count_a > 0), why_b),
                (b, (count_a == 0) & (count_b > 0), why_a),
            ):
                for k in np.unique(why[rows]):
                    self.freeze(labels[rows & (why == k)], self.reasons[k] or reason)
            single = (count_a == 1) & (count_b == 1)
            one_many = (count_a == 1) & (count_b > 1)
            many_one = (count_b == 1) & (count_a > 1)
            both = (count_a > 1) & (count_b > 1)
            if single.any():
                self.unite(a[single].max(axis=1), b[single].max(axis=1))
            elif one_many.any():
                self.expand(a[one_many].max(axis=1), b[one_many], reason)
            elif many_one.any():
                self.expand(b[many_one].max(axis=1), a[many_one], reason)
            elif both.any():
                self._unite_factors(a[both], b[both], reason)
            unsettled = single | one_many | many_one | both
            left, right = left[unsettled], right[unsettled]

    def _open(self, labels: Labels) -> tuple[Labels, Labels]:
        """Labels whose atoms are still free, and per row why one of the others is frozen (0 for none)."""
        labels = self.resolve(labels).copy()
        why = self._why[labels]
        labels[why > 0] = 0
        return labels, why.max(axis=1) if why.shape[1] else np.zeros(len(labels), np.int64)

    def _unite_factors(self, a: Labels, b: Labels, reason: str) -> None:
        """Unite the first pair of columns that repeat in the same pattern; freeze all where none does."""

        def pattern(column: Labels) -> bytes:
            _, first, inverse = np.unique(column, return_index=True, return_inverse=True)
            return first[inverse].tobytes()

        right = {pattern(b[:, j]): j for j in reversed(range(b.shape[1])) if b[:, j].all()}
        for i in range(a.shape[1]):
            if a[:, i].all() and (j := right.get(pattern(a[:, i]))) is not None:
                self.unite(a[:, i], b[:, j])
                return
        self.freeze(a, reason)
        self.freeze(b, reason)
