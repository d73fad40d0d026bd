"""What kind of axis a unit is: filters, attention heads, the width of a head, of an MLP, of the residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from slimline.graph.ir import Node
from slimline.graph.units import WEIGHTED, Unit, Units

Kind = Literal["filters", "heads", "head_width", "mlp", "embedding"]


def kind(units: Units, unit: Unit) -> Kind:
    """Read off the operators that a unit's positions pass through.

    - ``heads``: a product of two activations runs once for each position (batched attention);
    - ``head_width``: such a product contracts the positions, or hands them on from one side;
    - ``embedding``: made by linear layers or looked up in a table, and added to itself along a residual stream or
      normalised over (LayerNorm);
    - ``mlp``: made by linear layers otherwise;
    - ``filters``: made by convolutions alone.
    """
    atoms = np.array(unit.atoms)
    touching = list(_touching(units, atoms))
    for node, letters in touching:
        product_kind = _in_product(node, letters)
        if product_kind is not None:
            return product_kind
    makers = {node.kind for node, letters in touching if node.kind in WEIGHTED and _makes(node, letters)}
    if makers <= {"conv"}:
        return "filters"
    for node, letters in touching:
        added = node.kind == "elementwise" and node.attributes["function"] == "add"
        stored = units.graph.parameters
        joined = added and len([n for n in node.inputs if n is not None and n not in stored]) > 1
        if joined or node.kind == "embedding" or (node.kind == "layer_norm" and _normalised(node, letters)):
            return "embedding"
    return "mlp"


def _touching(units: Units, atoms: np.ndarray) -> Iterator[tuple[Node, set[str]]]:
    """Operators with the letters of their equations that carry some of the atoms."""
    solver = units.solver
    for node in units.graph.nodes:
        letters = {
            letter
            for letter, dim in solver.letters.get(node.name, {}).items()
            if dim.labels is not None and np.isin(solver.atoms.resolve(dim.labels), atoms).any()
        }
        if letters:
            yield node, letters


def _in_product(node: Node, letters: set[str]) -> Kind | None:
    product = node.kind in ("attention", "matmul") or (node.kind == "einsum" and not node.attributes["weighted"])
    if not product:
        return None
    equation = node.attributes["equation"]
    left, right = ({x for dim in dims for x in dim} for dims in equation.inputs[:2])
    output = {x for dim in equation.outputs[0] for x in dim}
    return "heads" if letters & left & right & output else "head_width"


def _makes(node: Node, letters: set[str]) -> bool:
    equation = node.attributes["equation"]
    read = {x for dim in equation.inputs[0] for x in dim}
    return bool(letters & {x for dim in equation.outputs[0] for x in dim} - read)


def _normalised(node: Node, letters: set[str]) -> bool:
    return bool(letters & set(node.attributes["equation"].statistics))
