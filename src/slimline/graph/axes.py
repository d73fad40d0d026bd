"""The axis algebra: from the equations of a graph to labels on every position of every dimension.

A position of a dimension is a disjunction of boolean *atoms*: it is removed when any of its atoms is.
A channel axis starts as one fresh atom per position; the operators then only add equalities:

- positions that must go together are *united* (union-find over atoms);
- a dimension that is read as a product ``(h d)`` has its atoms *expanded*, ``a[i, j] := h[i] or d[j]``, so
  that both factors stay prunable and any selection of them leaves a rectangle;
- what cannot be expressed is *frozen*: the atom is false for ever, with a reason.

Concatenation, splitting, slicing, padding and shuffling by indices are plain indexing of the label
arrays. Nothing is guessed: every equality that is added is implied by, or stronger than, what the
operators demand. Labels of a dimension are an integer array ``(positions, columns)``, 0 for no atom.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.graph.atoms import Atoms, Axis, Labels
from slimline.graph.equation import Equation
from slimline.graph.ir import Graph, Node


@dataclass
class Dim:
    """One dimension: its labels, or None where it can never lose a position, and why not."""

    size: int
    labels: Labels | None = None
    reason: str = ""


def _compose(parts: Sequence[Dim]) -> Dim:
    """The dimension that is the ordered product of `parts`."""
    size = math.prod(p.size for p in parts)
    if len(parts) == 1:
        return parts[0]
    columns, outer = [], 1
    for part in parts:
        inner = size // (outer * part.size)
        if part.labels is not None:
            columns.append(np.tile(np.repeat(part.labels, inner, axis=0), (outer, 1)))
        outer *= part.size
    reason = next((p.reason for p in parts if p.labels is None and p.reason), "")
    return Dim(size, np.hstack(columns) if columns else None, reason)


class Solver:
    """Reads a graph operator by operator; afterwards `dims` and `letters` hold the labels.

    Attributes
    ----------
    dims : per value its dimensions.
    letters : per node the dimensions of its equation's axes.
    products : axis ids born together as separate dimensions of one weight (heads and head width).
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.atoms = Atoms()
        self.dims: dict[str, list[Dim | None]] = {}
        self.letters: dict[str, dict[str, Dim]] = {}
        self.products: list[tuple[int, ...]] = []
        for name in graph.parameters:
            self.dims[name] = [None] * len(graph.values[name].shape)
        for name in graph.inputs:
            self.dims[name] = self._whole(name, "the model's input")
        for node in graph.nodes:
            self._node(node)
        for name in graph.outputs:
            for dim in self._get(name):
                self._freeze(dim, "the model's output")

    def labels(self, value: str) -> list[Labels | None]:
        """Resolved labels of each dimension of a value."""
        return [None if d is None or d.labels is None else self.atoms.resolve(d.labels) for d in self.dims[value]]

    def _whole(self, value: str, reason: str) -> list[Dim | None]:
        return [Dim(n, None, reason) for n in self.graph.values[value].shape]

    def _get(self, value: str) -> list[Dim | None]:
        if value not in self.dims:
            raise SlimlineError(f"The graph reads {value!r} before it is made: report this model to slimline.")
        return self.dims[value]

    def _bound(self, node: Node, value: str) -> list[Dim]:
        """Dimensions of a value, with fresh axes for those of a parameter that no operator has bound yet."""
        return [self._bound_at(node, value, d) for d in range(len(self._get(value)))]

    def _bound_at(self, node: Node, value: str, d: int) -> Dim:
        """The same of one dimension."""
        dims = self._get(value)
        dim = dims[d]
        if dim is None:
            size = self.graph.values[value].shape[d]
            axis = Axis(size, node.name, node.layer, f"{value}[{d}]")
            dim = dims[d] = Dim(size, self.atoms.fresh(axis) if size > 1 else None)
        return dim

    def _freeze(self, dim: Dim | None, reason: str) -> None:
        if dim is not None and dim.labels is not None:
            self.atoms.freeze(dim.labels, reason)

    def _unify(self, left: Dim, right: Dim, reason: str) -> Dim:
        if left.labels is None or right.labels is None:
            whole, other = (left, right) if left.labels is None else (right, left)
            self._freeze(other, f"{reason}, where it meets {whole.reason or 'a fixed size'}")
            return other
        self.atoms.equate(left.labels, right.labels, reason)
        return left

    def _node(self, node: Node) -> None:
        rules: Mapping[str, Callable[[Node], None]] = {
            "concat": self._concat,
            "split": self._split,
            "slice": self._index,
            "select": self._index,
            "take": self._index,
            "pad": self._pad,
            "shape": self._shape,
            "unknown": self._unknown,
        }
        if "equation" in node.attributes:
            self._equation(node, node.attributes["equation"])
        else:
            rules.get(node.kind, self._unknown)(node)

    def _shape(self, node: Node) -> None:
        for name in node.outputs:
            self.dims[name] = []

    def _unknown(self, node: Node) -> None:
        reason = f"{node.label}: {node.attributes.get('reason', 'slimline has no rule for it')}"
        for name in filter(None, node.inputs):
            for d, dim in enumerate(self._get(name)):
                if dim is None:
                    self.dims[name][d] = Dim(self.graph.values[name].shape[d], None, reason)
                else:
                    self._freeze(dim, reason)
        for name in node.outputs:
            self.dims[name] = self._whole(name, reason)

    # -- operators that move positions -------------------------------------------------

    def _concat(self, node: Node) -> None:
        at = node.attributes["axis"]
        names = [n for n in node.inputs if n is not None]
        rank = len(self.graph.values[names[0]].shape)
        out: list[Dim | None] = [None] * rank
        for d in range(rank):
            known = [(n, self._get(n)[d]) for n in names]
            if d == at:
                for n, dim in known:
                    if dim is None and rank > 1 and n in self.graph.parameters:
                        self.dims[n][d] = Dim(self.graph.values[n].shape[d], None, f"a constant of {node.label}")
                out[d] = self._chain([self._bound_at(node, n, d) for n in names])
                continue
            merged = None
            for _, dim in known:
                if dim is not None:
                    merged = dim if merged is None else self._unify(merged, dim, node.label)
            if merged is None:
                merged = self._bound(node, names[0])[d]
            for n, dim in known:
                if dim is None:
                    self.dims[n][d] = merged
            out[d] = merged
        self.dims[node.outputs[0]] = out

    @staticmethod
    def _chain(parts: Sequence[Dim]) -> Dim:
        size = sum(p.size for p in parts)
        if all(p.labels is None for p in parts):
            return Dim(size, None, next((p.reason for p in parts if p.reason), ""))
        columns = max(p.labels.shape[1] for p in parts if p.labels is not None)
        labels = np.zeros((size, columns), np.int64)
        row = 0
        for part in parts:
            if part.labels is not None:
                labels[row : row + part.size, : part.labels.shape[1]] = part.labels
            row += part.size
        return Dim(size, labels)

    def _split(self, node: Node) -> None:
        dims = self._bound(node, node.inputs[0] or "")
        at, row = node.attributes["axis"], 0
        for name, size in zip(node.outputs, node.attributes["sizes"], strict=True):
            dim = dims[at]
            labels = None if dim.labels is None else dim.labels[row : row + size]
            out: list[Dim | None] = [*dims]
            out[at] = Dim(size, labels, dim.reason)
            self.dims[name] = out
            row += size

    def _index(self, node: Node) -> None:
        dims = self._bound(node, node.inputs[0] or "")
        a, at = node.attributes, node.attributes["axis"]
        dim = dims[at]
        out: list[Dim | None] = [*dims]
        if node.kind == "select":
            if dim.labels is not None:
                self.atoms.freeze(dim.labels[a["index"]], f"{node.label} picks it by its position")
            del out[at]
        else:
            rows = np.arange(a["start"], a["stop"], a["step"]) if node.kind == "slice" else np.array(a["indices"])
            out[at] = Dim(len(rows), None if dim.labels is None else dim.labels[rows], dim.reason)
        self.dims[node.outputs[0]] = out

    def _pad(self, node: Node) -> None:
        dims = self._bound(node, node.inputs[0] or "")
        out: list[Dim | None] = []
        for dim, (before, after) in zip(dims, node.attributes["widths"], strict=True):
            size = dim.size + before + after
            if dim.labels is None or (before == 0 and after == 0):
                out.append(Dim(size, dim.labels, dim.reason))
                continue
            labels = dim.labels[max(-before, 0) : dim.size - max(-after, 0)]
            rows = [labels]
            for width, where in ((before, 0), (after, 1)):
                if width > 0:
                    zeros = np.zeros((width, labels.shape[1]), np.int64)
                    zeros[:, :1] = self.atoms.fresh(Axis(width, node.name, node.layer, "padding"))
                    rows.insert(0 if where == 0 else len(rows), zeros)
            out.append(Dim(size, np.vstack(rows)))
        self.dims[node.outputs[0]] = out

    # -- operators with an equation ----------------------------------------------------

    def _sizes(self, node: Node, equation: Equation) -> dict[str, int]:
        sizes = dict(equation.sizes)
        tensors = [*zip(node.inputs, equation.inputs, strict=False), *zip(node.outputs, equation.outputs, strict=False)]
        for _ in range(2):  # an axis may be known only after another tensor has been read
            for name, dims in tensors:
                if name is None:
                    continue
                shape = self.graph.values[name].shape
                if len(shape) != len(dims):
                    raise SlimlineError(
                        f"{node.label} has a tensor of shape {shape} where slimline's rule expects {len(dims)} "
                        f"dimensions ({equation}): report this model to slimline."
                    )
                for size, group in zip(shape, dims, strict=True):
                    unknown = [x for x in group if x not in sizes and x not in (".", "1", "*")]
                    if len(unknown) == 1:
                        known = math.prod(sizes.get(x, 1) for x in group if x not in unknown)
                        sizes[unknown[0]] = size // known
        return sizes

    def _equation(self, node: Node, equation: Equation) -> None:
        sizes = self._sizes(node, equation)
        letters: dict[str, Dim] = {}
        unbound: list[tuple[str, int, tuple[str, ...]]] = []
        for name, dims in zip(node.inputs, equation.inputs, strict=False):
            if name is None:
                continue
            for d, (dim, group) in enumerate(zip(self._get(name), dims, strict=True)):
                if dim is None:
                    unbound.append((name, d, group))
                elif group == (".",):
                    self._freeze(dim, node.label)
                elif group not in (("1",), ()):
                    for letter, part in zip(group, self._decompose(node, dim, group, sizes), strict=True):
                        known = letters.get(letter)
                        letters[letter] = part if known is None else self._unify(known, part, node.label)
        born = []
        for name, d, group in unbound:
            for letter in group:
                if letter not in letters and letter not in (".", "1"):
                    size = sizes[letter]
                    whole = size == 1 or (node.kind == "recurrent" and letter in equation.fixed)
                    labels = None if whole else self.atoms.fresh(Axis(size, node.name, node.layer, letter))
                    if labels is not None:
                        born.append(len(self.atoms.axes) - 1)
                    letters[letter] = Dim(size, labels)
            size = self.graph.values[name].shape[d]
            if group in ((".",), ("1",), ()):
                self.dims[name][d] = Dim(size, None, node.label)
            else:
                self.dims[name][d] = _compose([letters[x] for x in group])
        if node.kind == "einsum" and len(born) > 1:
            self.products.append(tuple(born))
        for letter, reason in equation.fixed.items():
            self._freeze(letters.get(letter), f"{node.label}: {reason}")
        for name, dims in zip(node.outputs, equation.outputs, strict=True):
            shape = self.graph.values[name].shape
            out: list[Dim | None] = []
            for size, group in zip(shape, dims, strict=True):
                if group == ("*",):
                    out.append(None)
                elif group in ((".",), ("1",), ()) or not any(x in letters for x in group):
                    out.append(Dim(size, None, node.label))
                else:
                    out.append(_compose([letters.get(x) or Dim(sizes[x], None, node.label) for x in group]))
            self.dims[name] = out
        self.letters[node.name] = letters

    def _decompose(self, node: Node, dim: Dim, group: tuple[str, ...], sizes: Mapping[str, int]) -> list[Dim]:
        """Split a dimension into its factors; atoms that vary along several factors are expanded."""
        shape = tuple(sizes[x] for x in group)
        if len(group) == 1:
            return [dim]
        if dim.labels is None:
            return [Dim(n, None, dim.reason) for n in shape]
        factor_labels: list[list[Labels]] = [[] for _ in group]
        labels = self.atoms.resolve(dim.labels)
        for j in range(labels.shape[1]):
            column = self.atoms.resolve(labels[:, j : j + 1])
            if column.shape[1] != 1:  # an earlier column's expansion changed this one
                self.atoms.freeze(column, node.label)
                continue
            grid = column[:, 0].reshape(shape)
            varying = [k for k in range(len(shape)) if (grid != np.take(grid, [0], axis=k)).any()]
            if len(varying) <= 1:
                k = varying[0] if varying else 0
                factor_labels[k].append(np.moveaxis(grid, k, 0).reshape(shape[k], -1)[:, 0])
                continue
            factors = {}
            for k in varying:
                factors[k] = self.atoms.fresh(Axis(shape[k], node.name, node.layer, group[k]))[:, 0]
                factor_labels[k].append(factors[k])
            index = np.indices(shape).reshape(len(shape), -1)
            parts = np.stack([factors[k][index[k]] for k in varying], axis=1)
            self._unite_repeats(grid.reshape(-1), parts)
            self.atoms.equate(column, parts, node.label)
        return [
            Dim(n, np.stack(columns, axis=1) if columns else None, dim.reason or node.label)
            for n, columns in zip(shape, factor_labels, strict=True)
        ]

    def _unite_repeats(self, atoms: Labels, parts: Labels) -> None:
        """An atom at several positions of the product needs the same factors at each of them."""
        unique, first, inverse = np.unique(atoms, return_index=True, return_inverse=True)
        if len(unique) == len(atoms):
            return
        again = atoms > 0
        for j in range(parts.shape[1]):
            self.atoms.unite(parts[again, j], parts[first[inverse], j][again])
