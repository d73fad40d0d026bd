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
from scipy import linalg, optimize

from slimline.methods.gram import LEAST_LOADING, loaded, output_energy

Array = np.ndarray[Any, np.dtype[Any]]
DAMPING = 1e-3
_ROUNDS = 200  # of alternating least squares
_GAIN = 1e-6  # of the energy, less than which a round is the last
_RIDGE = 1e-10


class Factorization:
    """``Ŵ = second · (first ⊗ I)`` of every rank.

    Parameters
    ----------
    weight : ``(groups, outputs, inputs)``.
    second : `H`, ``(groups, inputs, inputs)``, or its diagonal ``(groups, inputs)`` where it has nothing beside it
        (only with `rest` 1); None makes the error of the weights least instead.
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
        self._second = None if second is None else _damped(second, damping)
        seen = self._unfolded
        if self._second is not None and self._second.ndim == 2:
            seen = seen * np.sqrt(self._second)[:, None]
        elif self._second is not None:
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
        if self._second.ndim == 2:
            return float((np.square(weight) * self._second[:, None]).sum())
        return float(output_energy(weight, self._second).sum())


def _damped(second: Array, part: float) -> Array:
    """`H`, or its diagonal, with `diagonal_loading`."""
    if second.ndim == 3:
        return loaded(second, part)
    return np.asarray(second + np.maximum(part * second.mean(axis=1, keepdims=True), LEAST_LOADING))


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


class Canonical:
    """CP of a convolution (Lebedev et al. 2015, arXiv:1412.6553): a sum of `rank` products of a vector of channels, one
    for every side of the kernel, and one of outputs. So it is a 1 × 1 convolution, a depthwise one along each side, and
    a 1 × 1 convolution.

    Alternating least squares from normal numbers, in the metric of the Gram matrix of the channels (averaged over the
    kernel's positions); the outputs are then the least-squares fit on all of `H`. The best sum of a rank above one need
    not exist, and this is a good one.

    Parameters
    ----------
    weight, second, damping : as of `Factorization`.
    kernel : sizes of its sides.
    """

    def __init__(self, weight: Array, second: Array | None, kernel: Sequence[int], damping: float = DAMPING) -> None:
        groups, self._outputs, inputs = weight.shape
        self.weight, self.kernel = np.asarray(weight, np.float64), tuple(kernel)
        self._whole = Factorization(weight, second, 1, damping)
        rest = int(np.prod(self.kernel))
        self.channels = inputs // rest
        self._roots = np.broadcast_to(np.eye(self.channels), (groups, self.channels, self.channels))
        self._second = None if second is None else loaded(second, damping)
        if self._second is not None:
            blocks = self._second.reshape(groups, self.channels, rest, self.channels, rest)
            self._roots = root(np.einsum("gibjb->gij", blocks) / rest)

    @property
    def most(self) -> int:
        """The rank at which nothing is lost: every input has a product of its own."""
        return int(self.weight.shape[2])

    def factors(self, rank: int) -> tuple[Array, ...]:
        """``(groups, rank, channels)``, for every side of the kernel ``(groups, rank, side)``, and ``(groups, outputs,
        rank)``; the vectors of a product are of equal norm."""
        parts = [self._of_group(group, min(rank, self.most)) for group in range(len(self.weight))]
        return tuple(np.stack(each) for each in zip(*parts, strict=True))

    def product(self, factors: Sequence[Array]) -> Array:
        """`Ŵ`, ``(groups, outputs, inputs)``."""
        *inner, last = factors
        return np.stack([own @ _rows(parts) for own, *parts in zip(last, *inner, strict=True)])

    def error(self, rank: int) -> float:
        """As of `Factorization`."""
        return self._whole.error_of(self.product(self.factors(rank)))

    def _of_group(self, group: int, rank: int) -> list[Array]:
        weight, metric = self.weight[group], self._roots[group]
        sides = (self.channels, *self.kernel)
        if rank == self.most:
            places = np.unravel_index(np.arange(rank), sides)
            inner = [np.eye(side)[place] for side, place in zip(sides, places, strict=True)]
        else:
            seen = np.tensordot(weight.reshape(self._outputs, *sides), metric, (1, 0))
            first, *others = alternating(np.moveaxis(seen, -1, 1), rank)[1:]
            # A row of channels times the metric is what was fitted.
            inner = [linalg.lstsq(metric.T, first)[0].T, *(other.T for other in others)]
        rows = _rows(inner)
        second = np.eye(rows.shape[1]) if self._second is None else self._second[group]
        hidden, cross = rows @ second @ rows.T, rows @ second @ weight.T
        last = (np.linalg.pinv(hidden, rcond=1e-12, hermitian=True) @ cross).T
        norms = np.stack([*(np.linalg.norm(part, axis=1) for part in inner), np.linalg.norm(last, axis=0)])
        norms = np.where(norms > 0, norms, 1.0)
        scales = np.exp(np.log(norms).mean(axis=0)) / norms
        return [*(part * scale[:, None] for part, scale in zip(inner, scales, strict=False)), last * scales[-1]]


def alternating(tensor: Array, rank: int, seed: int = 0) -> list[Array]:
    """Of every dimension a matrix ``(size, rank)``, such that the sum of the outer products of their columns is near
    `tensor`: each in turn by least squares with the others fixed (CP-ALS; Carroll and Chang 1970, Harshman 1970)."""
    rng = np.random.default_rng(seed)
    modes = range(tensor.ndim)
    unfolded = [np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1) for mode in modes]
    factors = [rng.normal(size=(size, rank)) for size in tensor.shape]
    energy, before = float(np.square(tensor).sum()), np.inf
    for _ in range(_ROUNDS):
        for mode in modes:
            others = [factors[other] for other in modes if other != mode]
            gram = np.prod([other.T @ other for other in others], axis=0)
            gram = gram + _RIDGE * (np.trace(gram) / rank or 1.0) * np.eye(rank)
            reach = unfolded[mode] @ _rows([other.T for other in others]).T
            factors[mode] = linalg.solve(gram, reach.T, assume_a="pos").T
            if mode < tensor.ndim - 1:
                norms = np.linalg.norm(factors[mode], axis=0)
                factors[mode] = factors[mode] / np.where(norms > 0, norms, 1.0)
        whole = np.prod([factor.T @ factor for factor in factors], axis=0).sum()
        error = energy - 2 * float((reach * factors[-1]).sum()) + float(whole)
        if before - error <= _GAIN * energy:
            break
        before = error
    return factors


def _rows(factors: Sequence[Array]) -> Array:
    """The products of vectors ``(rank, size)`` of every factor, ``(rank, all sizes together)``, the last varying
    fastest."""
    rows = factors[0]
    for factor in factors[1:]:
        rows = (rows[:, :, None] * factor[:, None, :]).reshape(len(rows), -1)
    return rows


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
