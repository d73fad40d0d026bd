"""One weight for several layers: the one with which their outputs change least, and which layers should share one.

Sharing across layers is that of ALBERT (Lan et al. 2020, arXiv:1909.11942); here the shared weight is not trained but
fitted: of layers with weights ``W_i`` and inputs ``X_i`` the `W` that minimises ``Σ ‖(W_i − W) X_i‖²`` is
``(Σ W_i H_i) (Σ H_i)⁻¹``, with `H` the Gram matrices of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from slimline.methods.gram import output_energy
from slimline.methods.reconstruction import RIDGE, reconstruct

Array = np.ndarray[Any, np.dtype[Any]]
Group = tuple[int, ...]


def merged(weights: Sequence[Array], seconds: Sequence[Array], ridge: float = RIDGE, constant: bool = False) -> Array:
    """The weight ``(groups, outputs, inputs)`` that stands best for all of `weights`.

    Parameters
    ----------
    weights : ``(groups, outputs, inputs)`` each.
    seconds : of each the Gram matrix of its inputs, ``(groups, inputs, inputs)``.
    ridge : relative to the mean square of an input, which pulls to the mean of the weights.
    constant : whether the last input is always 1 (its weight is a bias).
    """
    second = np.mean(seconds, axis=0)
    cross = np.mean([w @ h for w, h in zip(weights, seconds, strict=True)], axis=0)
    return reconstruct(np.mean(weights, axis=0), second, cross, ridge, constant)


def lost(weights: Sequence[Array], seconds: Sequence[Array], shared: Array) -> list[float]:
    """Of each layer the part of its outputs' energy that is lost if it has the `shared` weight."""
    parts = []
    for weight, second in zip(weights, seconds, strict=True):
        energy = float(output_energy(weight, second).sum())
        parts.append(float(output_energy(weight - shared, second).sum()) / (energy or 1.0))
    return parts


def joined(count: int, loss: Callable[[Group], float], fewest: int = 1, most: float = np.inf) -> list[Group]:
    """Layers in groups, by agglomeration: the two groups join that lose least as one, again and again.

    Parameters
    ----------
    count : of the layers.
    loss : of a group, ascending numbers of layers.
    fewest : groups that are left at least.
    most : that a group may lose.
    """
    groups: list[Group] = [(i,) for i in range(count)]
    known: dict[Group, float] = {}
    while len(groups) > fewest:
        pairs = [(tuple(sorted((*a, *b))), a, b) for a, b in combinations(groups, 2)]
        for union, _, _ in pairs:
            if union not in known:
                known[union] = loss(union)
        union, a, b = min(pairs, key=lambda pair: (known[pair[0]], pair[0]))
        if known[union] > most:
            break
        groups = [group for group in groups if group not in (a, b)] + [union]
    return sorted(groups)


def sequence(count: int, groups: int) -> list[Group]:
    """Runs of neighbours, as even as can be: AABB (Takase and Kiyono 2021, arXiv:2104.06022)."""
    return [tuple(int(i) for i in part) for part in np.array_split(np.arange(count), min(groups, count))]


def cycle(count: int, groups: int) -> list[Group]:
    """Layers at the same place of a period: ABAB (the same)."""
    return [tuple(range(first, count, groups)) for first in range(min(groups, count))]
