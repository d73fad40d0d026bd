"""A convolution as a lighter one, with the least error of its outputs.

All work on the matrix of a layer, `weight` ``(groups, outputs, inputs)``, whose inputs are channels x kernel, the
kernel varying fastest, and on `second` ``(groups, inputs, inputs)``, the Gram matrix `H` of its inputs (or their
covariance); None stands for the identity: then the error is that of the weights.

A depthwise-separable convolution of multiplier `m` gives the block of every input channel, ``(outputs, kernel)``, rank
`m`: of each channel alone the best is a truncated singular value decomposition, and where `H` ties no channels that is
the best of all. With the others fixed it stays a decomposition, of the block that would make up for their errors. A
grouped convolution is a least-squares fit on the inputs that it keeps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from slimline.methods.factorization import DAMPING, Factorization, root
from slimline.methods.gram import loaded, output_energy

Array = np.ndarray[Any, np.dtype[Any]]
SWEEPS = 12
ENOUGH = 1e-3  # of the error that a sweep has to take away for another one to follow


class Separable(NamedTuple):
    """A depthwise-separable convolution.

    Attributes
    ----------
    depthwise : ``(groups, channels, multiplier, kernel)``.
    pointwise : ``(groups, outputs, channels, multiplier)``.
    """

    depthwise: Array
    pointwise: Array

    @property
    def product(self) -> Array:
        """The convolution that computes the same, ``(groups, outputs, inputs)``."""
        whole = np.einsum("gocm,gcmk->gock", self.pointwise, self.depthwise)
        return np.asarray(whole.reshape(*whole.shape[:2], -1))


def separable(
    weight: Array,
    second: Array | None,
    kernel: int,
    multiplier: int = 1,
    damping: float = DAMPING,
    sweeps: int = SWEEPS,
) -> Separable:
    """The depthwise-separable convolution nearest to a convolution.

    It starts from the better of two fits of every channel alone, by the weights and by the channel's own block of `H`;
    each sweep then fits every channel in turn exactly, with the others fixed, and all pointwise weights together. No
    step of it adds to the error, which is therefore never above that of either start; it may be a local minimum.

    Parameters
    ----------
    kernel : the number of its positions.
    multiplier : depthwise filters of every input channel, at most `kernel` and the number of outputs.
    damping : part of the mean of H's diagonal that is added to it.
    """
    groups = [
        _separable(w, None if second is None else loaded(second[g], damping), kernel, multiplier, sweeps)
        for g, w in enumerate(np.asarray(weight, np.float64))
    ]
    return Separable(*(np.stack(parts) for parts in zip(*map(_balanced, groups), strict=True)))


def grouped(weight: Array, second: Array | None, groups: int, damping: float = DAMPING) -> Array:
    """The grouped convolution nearest to a convolution: of every group's outputs the least-squares fit on its inputs.

    Parameters
    ----------
    groups : into which each of the weight's groups is split; it divides the channels and the outputs.

    Returns
    -------
    ``(groups of the weight * groups, outputs / groups, inputs / groups)``.
    """
    weight = np.asarray(weight, np.float64)
    before, outputs, inputs = weight.shape
    parts = weight.reshape(before, groups, outputs // groups, groups, inputs // groups)
    fit = np.einsum("bgogi->bgoi", parts)
    if second is not None:
        h = loaded(second, damping)
        wide = weight.reshape(before, groups, outputs // groups, inputs)
        columns = h.reshape(before, inputs, groups, inputs // groups).transpose(0, 2, 1, 3)
        blocks = _diagonal(h, groups)
        fit = np.linalg.solve(blocks, (wide @ columns).swapaxes(2, 3)).swapaxes(2, 3)
    return np.ascontiguousarray(fit.reshape(before * groups, outputs // groups, inputs // groups))


def spread(weight: Array, groups: int) -> Array:
    """A weight that `grouped` gave as one whose other inputs are zero: ``(groups before, outputs, inputs)``."""
    total, outputs, inputs = weight.shape
    parts = weight.reshape(total // groups, groups, outputs, inputs)
    wide = np.einsum("bgoi,gh->bgohi", parts, np.eye(groups))
    return np.asarray(wide.reshape(total // groups, groups * outputs, groups * inputs))


def relative_error(weight: Array, product: Array, second: Array | None, damping: float = DAMPING) -> float:
    """The part of the energy of the outputs (without `H`: of the weights) that `product` in place of `weight` loses."""
    difference = np.asarray(weight, np.float64) - product
    if second is None:
        return float(np.square(difference).sum() / (np.square(weight).sum() or 1.0))
    h = loaded(second, damping)
    return float(output_energy(difference, h).sum() / (output_energy(weight, h).sum() or 1.0))


def _diagonal(second: Array, blocks: int) -> Array:
    """Blocks on the diagonal of `H` ``(…, inputs, inputs)``: ``(…, blocks, size, size)``."""
    size = second.shape[-1] // blocks
    parts = second.reshape(*second.shape[:-2], blocks, size, blocks, size)
    return np.asarray(np.einsum("...aibj,ab->...aij", parts, np.eye(blocks)))


def _separable(weight: Array, second: Array | None, kernel: int, multiplier: int, sweeps: int) -> Separable:
    """Of one group: ``(channels, multiplier, kernel)`` and ``(outputs, channels, multiplier)``."""
    outputs, inputs = weight.shape
    channels = inputs // kernel
    blocks = weight.reshape(outputs, channels, kernel).swapaxes(0, 1)
    starts = [_alone(blocks, None, multiplier)]
    if second is None:
        return starts[0]
    own = _diagonal(second, channels)
    starts.append(_alone(blocks, own, multiplier))
    fits = [_refitted(weight, second, start.depthwise) for start in starts]
    errors = [_error(weight, second, fit) for fit in fits]
    best = int(np.argmin(errors))
    fit, error = fits[best], errors[best]
    roots = root(own)
    inverses = np.linalg.inv(roots)
    for _ in range(sweeps):
        before = error
        fit = _refitted(weight, second, _swept(weight, second, fit, roots, inverses).depthwise)
        error = _error(weight, second, fit)
        if before - error <= ENOUGH * before:
            break
    return fit


def _alone(blocks: Array, own: Array | None, multiplier: int) -> Separable:
    """Every channel by itself; `blocks` ``(channels, outputs, kernel)``, `own` ``(channels, kernel, kernel)``."""
    depthwise, pointwise = Factorization(blocks, own, damping=0.0).factors(multiplier)
    return Separable(depthwise, pointwise.swapaxes(0, 1))


def _swept(weight: Array, second: Array, fit: Separable, roots: Array, inverses: Array) -> Separable:
    """Every channel in turn, the others fixed: the truncated decomposition of the block that makes up for them."""
    depthwise, pointwise = fit.depthwise.copy(), fit.pointwise.copy()
    channels, multiplier, kernel = depthwise.shape
    gradient = (weight - _joined(fit)) @ second  # of the error, but for a factor
    for c in range(channels):
        place = slice(c * kernel, (c + 1) * kernel)
        old = pointwise[:, c] @ depthwise[c]
        seen = old @ roots[c] + gradient[:, place] @ inverses[c].T
        _, vectors = np.linalg.eigh(seen.T @ seen)
        leading = vectors[:, ::-1][:, :multiplier]
        depthwise[c], pointwise[:, c] = leading.T @ inverses[c], seen @ leading
        gradient -= (pointwise[:, c] @ depthwise[c] - old) @ second[place]
    return Separable(depthwise, pointwise)


def _refitted(weight: Array, second: Array, depthwise: Array) -> Separable:
    """All pointwise weights together, for these depthwise filters."""
    channels, multiplier, kernel = depthwise.shape
    inputs, hidden = channels * kernel, channels * multiplier
    half = (depthwise @ second.reshape(channels, kernel, inputs)).reshape(hidden, inputs)
    gram = np.einsum("ack,cmk->acm", half.reshape(hidden, channels, kernel), depthwise).reshape(hidden, hidden)
    pointwise = weight @ half.T @ np.linalg.pinv((gram + gram.T) / 2, rcond=1e-12, hermitian=True)
    return Separable(depthwise, pointwise.reshape(-1, channels, multiplier))


def _joined(fit: Separable) -> Array:
    whole = np.einsum("ocm,cmk->ock", fit.pointwise, fit.depthwise)
    return np.asarray(whole.reshape(len(whole), -1))


def _error(weight: Array, second: Array, fit: Separable) -> float:
    return float(output_energy((weight - _joined(fit))[None], second[None]).sum())


def _balanced(fit: Separable) -> Separable:
    """Every depthwise filter as long as what reads it, which trains and rounds best."""
    own, read = np.linalg.norm(fit.depthwise, axis=2), np.linalg.norm(fit.pointwise, axis=0)
    scale = np.sqrt(np.divide(read, own, out=np.ones_like(own), where=(own > 0) & (read > 0)))
    return Separable(fit.depthwise * scale[:, :, None], fit.pointwise / scale)
