"""Structured optimal brain surgery: the input columns that a layer can best do without, as others make up for them.

For one layer with weight `W` and Gram matrix `H` of its inputs, removing the columns `S` and solving the rest by least
squares costs ``tr(W_S ((H⁻¹)_SS)⁻¹ W_Sᵀ)``. Positions go one after the other, the cheapest first, with `W` and `H⁻¹`
updated in between (Hassibi and Stork 1993; for structures Kurtic et al. 2023, ZipLM, arXiv:2302.04089). With a bias
that may change too, `H` is the covariance: that is what is left of a Gram matrix with a constant input that stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimline.methods.gram import diagonal_loading, output_energy

Array = np.ndarray[Any, np.dtype[Any]]

DAMPING = 1e-3
STEPS = 256
"""Rounds of the greedy removal; of a wider unit several positions go in a round."""


@dataclass(frozen=True)
class Consumer:
    """A layer that reads the positions.

    Attributes
    ----------
    weight : ``(groups, outputs, inputs)``.
    gram : ``(groups, inputs, inputs)``; the covariance where the layer's bias may change.
    columns : ``(positions, width)``, the inputs that go with each position, filled up with -1.
    """

    weight: Array
    gram: Array
    columns: NDArray[np.int64]

    @property
    def energy(self) -> float:
        """Mean square of the outputs (their variance, where `gram` is a covariance)."""
        return float(output_energy(self.weight, self.gram).sum())


def removal_order(
    consumers: Sequence[Consumer], damping: float = DAMPING, steps: int = STEPS
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The order in which all positions go, and what each removal adds to the error.

    The error is summed over the consumers, each relative to its `Consumer.energy`.

    Parameters
    ----------
    damping : added to the diagonal of every Gram matrix, relative to its mean.
    steps : rounds; of more positions than that, several go in a round.

    Returns ``(positions,)`` and ``(positions,)``: position ``order[k]`` went with error ``errors[k]``.
    """
    states = [_State(c, damping) for c in consumers]
    positions = len(consumers[0].columns)
    alive = np.ones(positions, bool)
    order: list[int] = []
    errors: list[float] = []
    while len(order) < positions:
        cost = np.where(alive, np.sum([s.costs() for s in states], axis=0), np.inf)
        number = min(-(-positions // steps), positions - len(order))
        gone = np.argsort(cost, kind="stable")[:number]
        joint = sum(s.remove(gone) for s in states)
        alone = cost[gone]
        order += gone.tolist()
        share = alone / alone.sum() if alone.sum() > 0 else np.full(number, 1 / number)
        errors += (joint * share).tolist()
        alive[gone] = False
    return np.array(order), np.array(errors)


class _State:
    """One consumer under removal."""

    def __init__(self, consumer: Consumer, damping: float) -> None:
        gram = np.asarray(consumer.gram, np.float64)
        loading = diagonal_loading(gram, damping)
        self.inverse = np.linalg.inv(gram + loading[:, None, None] * np.eye(gram.shape[1]))
        self.weight = np.array(consumer.weight, np.float64)
        self.columns = consumer.columns
        self.scale = 1 / max(consumer.energy, 1e-300)

    def costs(self) -> NDArray[np.float64]:
        """``(positions,)``: the error that the removal of each would add, were it alone."""
        empty = self.columns < 0
        at = np.where(empty, 0, self.columns)
        block = self.inverse[:, at[:, :, None], at[:, None, :]]
        block = np.where(empty[:, :, None] | empty[:, None, :], np.eye(at.shape[1]), block)
        weight = np.where(empty[None, :, None, :], 0, self.weight[:, :, at].swapaxes(1, 2))
        errors = (np.linalg.solve(block, weight.swapaxes(2, 3)) * weight.swapaxes(2, 3)).sum(axis=(0, 2, 3))
        return np.asarray(self.scale * errors)

    def remove(self, positions: NDArray[np.int64]) -> float:
        """Take the columns of some positions out; the error that this adds."""
        gone = self.columns[positions]
        gone = np.unique(gone[gone >= 0])
        if not len(gone):
            return 0.0
        rows = self.inverse[:, gone]
        weight = self.weight[:, :, gone]
        solved = np.linalg.solve(rows[:, :, gone], rows)
        error = self.scale * float(
            (np.linalg.solve(rows[:, :, gone], weight.swapaxes(1, 2)).swapaxes(1, 2) * weight).sum()
        )
        self.weight -= weight @ solved
        self.inverse -= rows.swapaxes(1, 2) @ solved
        self.weight[:, :, gone] = 0
        self.inverse[:, gone] = 0
        self.inverse[:, :, gone] = 0
        self.inverse[:, gone, gone] = 1
        return error
