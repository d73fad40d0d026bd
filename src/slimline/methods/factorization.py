"""A layer's weight as a product of smaller ones, with the least error of its outputs.

All work on the matrix of a layer, `weight` ``(groups, outputs, inputs)``, and on `second`
``(groups, inputs, inputs)``, the Gram matrix `H` of its inputs (or their covariance, where a bias makes up for the
means). With ``H = L Lᵀ`` the output error ``tr (W - Ŵ) H (W - Ŵ)ᵀ`` is ``‖W L - Ŵ L‖²``, so by Eckart and Young it is
least where ``Ŵ L`` is the truncated singular value decomposition of ``W L``, and is then the sum of the discarded
singular values squared. Of the left singular vectors `U` that stay, ``Ŵ = U Uᵀ W``: the whitening never has to be
inverted.

A convolution may be split inside its kernel: its inputs are channels x kernel, the kernel varying fastest, and the
first factor contracts only the leading part of them, the second the `rest`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import optimize

from slimline.methods.gram import loaded, output_energy

Array = np.ndarray[Any, np.dtype[Any]]
DAMPING = 1e-3


class Factorization:
    """``Ŵ = second · (first ⊗ I)`` of every rank.

    Parameters
    ----------
    weight : ``(groups, outputs, inputs)``.
    second : `H`, ``(groups, inputs, inputs)``; None makes the error of the weights least instead.
    rest : how many positions of the kernel the second factor contracts; with 1 the first contracts all inputs.
    damping : part of the mean of H's diagonal that is added to it.

    Attributes
    ----------
    values : ``(groups, most)``, the singular values, descending.
    """

    def __init__(self, weight: Array, second: Array | None = None, rest: int = 1, damping: float = DAMPING) -> None:
        groups, outputs, inputs = weight.shape
        self.weight, self.rest = np.asarray(weight, np.float64), rest
        self.lead = inputs // rest
        unfolded = self.weight.reshape(groups, outputs, self.lead, rest).swapaxes(2, 3)
        self._unfolded = unfolded.reshape(groups, outputs * rest, self.lead)
        self._second = None if second is None else loaded(second, damping)
        seen = self._unfolded
        if self._second is not None:
            blocks = self._second.reshape(groups, self.lead, rest, self.lead, rest)
            seen = seen @ root(np.einsum("gibjb->gij", blocks) / rest)
        self._left, self.values, _ = np.linalg.svd(seen, full_matrices=False)
        self._total = self._energy(self.weight) or 1.0

    @property
    def most(self) -> int:
        """The rank of every group at which nothing is lost."""
        return int(self.values.shape[1])

    def factors(self, rank: int) -> tuple[Array, Array]:
        """``(groups, rank, lead)`` and ``(groups, outputs, rank * rest)``, of equal norm.

        With a kernel in the second factor and `H`, that factor is the least-squares fit on what the first leaves.
        """
        left = self._left[:, :, :rank]
        first = left.swapaxes(1, 2) @ self._unfolded
        groups, outputs, _ = self.weight.shape
        second = left.reshape(groups, outputs, self.rest, rank).swapaxes(2, 3).reshape(groups, outputs, -1)
        if self._second is not None and self.rest > 1:
            wide = expanded(first, self.rest)
            hidden = wide @ self._second @ wide.swapaxes(1, 2)
            cross = wide @ self._second @ self.weight.swapaxes(1, 2)
            second = (np.linalg.pinv(hidden, rcond=1e-12, hermitian=True) @ cross).swapaxes(1, 2)
        balance = np.sqrt((np.linalg.norm(second) or 1.0) / (np.linalg.norm(first) or 1.0))
        return first * balance, second / balance

    def product(self, factors: tuple[Array, Array]) -> Array:
        """`Ŵ`, ``(groups, outputs, inputs)``."""
        first, second = factors
        return np.asarray(second @ expanded(first, self.rest))

    def error(self, rank: int) -> float:
        """The output error (without `H`: that of the weights), relative to the energy there is; 1 at most."""
        if self.rest == 1:
            return float(np.square(self.values[:, rank:]).sum() / self._total)
        return self.error_of(self.product(self.factors(rank)))

    def error_of(self, product: Array) -> float:
        """That of any other weight in the place of this one."""
        return self._energy(self.weight - product) / self._total

    def hidden(self, first: Array) -> Array | None:
        """`H` of what the second factor reads, ``(groups, rank * rest, rank * rest)``; None without `H`."""
        if self._second is None:
            return None
        wide = expanded(first, self.rest)
        return np.asarray(wide @ self._second @ wide.swapaxes(1, 2))

    def _energy(self, weight: Array) -> float:
        if self._second is None:
            return float(np.square(weight).sum())
        return float(output_energy(weight, self._second).sum())


def root(second: Array) -> Array:
    """An `L` with ``L Lᵀ = H`` ``(groups, inputs, inputs)``: the Cholesky factor; where rounding left `H` without one,
    that of the nearest matrix that has no negative eigenvalue."""
    try:
        lower: Array = np.linalg.cholesky(second)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(second)
        lower = vectors * np.sqrt(np.maximum(values, 0))[:, None, :]
    return lower


def expanded(first: Array, rest: int) -> Array:
    """A first factor ``(groups, rank, lead)`` on all inputs: ``first ⊗ I``, ``(groups, rank * rest, lead * rest)``."""
    groups, rank, lead = first.shape
    wide = np.einsum("gri,bc->grbic", first, np.eye(rest))
    return np.asarray(wide.reshape(groups, rank * rest, lead * rest))


class Tucker:
    """Tucker-2 of a convolution (Kim et al. 2016, arXiv:1511.06530): fewer channels, the kernel, all channels again.

    The first factor is that of a `Factorization` with the whole kernel as its rest; the last two factorise what follows
    it, by the outputs' error on what the first leaves.

    Parameters
    ----------
    weight, second, kernel, damping : as of `Factorization`; `kernel` is the number of its positions.
    """

    def __init__(self, weight: Array, second: Array | None, kernel: int, damping: float = DAMPING) -> None:
        self.lead = Factorization(weight, second, kernel, damping)
        self.kernel = kernel

    def factors(self, rank: int, narrow: int) -> tuple[Array, Array, Array]:
        """``(groups, narrow, channels)``, ``(groups, rank, narrow * kernel)`` and ``(groups, outputs, rank)``."""
        first, rest = self.lead.factors(narrow)
        core, last = Factorization(rest, self.lead.hidden(first), damping=0.0).factors(rank)
        return first, core, last

    def error(self, rank: int, narrow: int) -> float:
        """As of `Factorization`."""
        return self.lead.error_of(self.product(self.factors(rank, narrow)))

    def product(self, factors: tuple[Array, Array, Array]) -> Array:
        """`Ŵ`, ``(groups, outputs, inputs)``."""
        first, core, last = factors
        return np.asarray(last @ core @ expanded(first, self.kernel))


def signal_rank(values: Array, sides: tuple[int, int]) -> int:
    """How many singular values of a matrix stand out from noise, of a variance that is estimated too.

    The global solution of empirical variational Bayesian matrix factorisation (Nakajima et al. 2013, JMLR 14).

    Parameters
    ----------
    values : all singular values, descending.
    sides : rows and columns of the matrix.
    """
    short, long = min(sides), max(sides)
    ratio = short / long
    floor = 2.5129 * np.sqrt(ratio)
    edge = (1 + floor) * (1 + ratio / floor)
    squares = np.square(np.asarray(values, np.float64)) / long
    if not squares.sum() > 0:
        return 0
    most = min(int(np.ceil(short / (1 + ratio))) - 1, short - 1)  # of components that can be told from noise
    rest = squares[most:]
    low, high = max(squares[most] / edge, rest.mean(), 1e-12 * squares[0]), squares.sum() / short

    def bound(logarithm: float) -> float:
        """The free energy at a variance of the noise, but for constants."""
        x = np.maximum(squares / np.exp(logarithm), 1e-300)
        above, below = x[x > edge], x[x <= edge]
        gap = above - (1 + ratio)
        tau = (gap + np.sqrt(gap**2 - 4 * ratio)) / 2
        signal = above - tau + np.log((tau + 1) / above) + ratio * np.log(tau / ratio + 1)
        return float((below - np.log(below)).sum() + signal.sum())

    if low < high:
        grid = np.linspace(np.log(low), np.log(high), 200)
        best = int(np.argmin([bound(g) for g in grid]))
        around = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
        variance = np.exp(optimize.minimize_scalar(bound, bounds=around, method="bounded").x)
    else:
        variance = high
    return int((squares > variance * edge).sum())


def allocate(costs: Sequence[Sequence[float]], errors: Sequence[Sequence[float]], budget: float) -> list[int] | None:
    """For each layer the option to take, so that the sum of errors is least within a budget; None where none fits.

    Exact: a mixed-integer program, one choice of each layer (a multiple-choice knapsack).

    Parameters
    ----------
    costs, errors : per layer those of its options.
    budget : what all may cost together.
    """
    if sum(map(min, costs)) > budget:
        return None
    owner = np.repeat(np.arange(len(costs)), [len(c) for c in costs])
    flat = np.concatenate([np.asarray(c, np.float64) for c in costs])
    scale = max(float(flat.max()), 1.0)
    choice = (owner == np.arange(len(costs))[:, None]).astype(np.float64)
    solved = optimize.milp(
        np.concatenate([np.asarray(e, np.float64) for e in errors]),
        integrality=np.ones(len(flat)),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(choice, 1, 1),
            optimize.LinearConstraint(flat[None] / scale, -np.inf, budget / scale),
        ],
        options={"mip_rel_gap": 0.0},
    )
    taken = np.asarray(solved.x) > 0.5
    return [int(np.flatnonzero(taken[owner == layer])[0]) for layer in range(len(costs))]
