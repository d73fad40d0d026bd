"""Distances between inner values of a student and a teacher.

Every function takes the array namespace ``xp`` first (``numpy`` or a framework's own), as
`slimline.methods.distillation` does. *Features* are ``(batch, positions, channels)``, *grids*
``(batch, *size, channels)``, *heads* ``(batch, heads, positions, width)``; all float. Student and teacher may differ in
channels, heads and width wherever the formula allows it. Losses are scalars of the namespace.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_EPSILON = 1e-12
_TEMPERATURE = 0.07
WIDTH = 128
"""Of the space in which `contrast` compares."""
_WIDEST = 512
_CONTEXTS = (4, 2, 1)
_NORM_EPSILON = 1e-5


def hint(xp: Any, student: Any, teacher: Any, weight: Any, bias: Any) -> Any:
    """Mean squared error of the student's features, projected linearly, to the teacher's (FitNets; Romero et al. 2015,
    arXiv:1412.6550; TinyBERT's of hidden states and embeddings, Jiao et al. 2020, arXiv:1909.10351).

    `weight` is ``(student's channels, teacher's channels)``, `bias` ``(teacher's channels,)``.
    """
    return xp.mean((xp.matmul(student, weight) + bias - teacher) ** 2)


def projection(inputs: int, outputs: int, seed: int) -> tuple[Any, Any]:
    """The first weight and bias of a linear projection, float32: the identity between equal numbers of channels, else
    normally distributed by `seed`, so that the squares keep their mean."""
    if inputs == outputs:
        return np.eye(inputs, dtype=np.float32), np.zeros(outputs, np.float32)
    drawn = np.random.default_rng([seed, inputs, outputs]).normal(size=(inputs, outputs)) / math.sqrt(inputs)
    return drawn.astype(np.float32), np.zeros(outputs, np.float32)


def attention(xp: Any, student: Any, teacher: Any) -> Any:
    """Mean squared error of attention maps: the squares' mean over channels, by position, as vectors of length 1
    (Zagoruyko and Komodakis 2017, arXiv:1612.03928)."""
    own, other = (_unit(xp, xp.mean(x**2, axis=-1)) for x in (student, teacher))
    return xp.mean((own - other) ** 2)


def flow(xp: Any, student: tuple[Any, Any], teacher: tuple[Any, Any]) -> Any:
    """Mean squared error of the matrices of inner products between the channels of two layers, averaged over positions
    (FSP; Yim et al. 2017). Both layers have the same positions, and as many channels in both networks."""
    own, other = (xp.matmul(xp.swapaxes(a, 1, 2), b) / a.shape[1] for a, b in (student, teacher))
    return xp.mean((own - other) ** 2)


def similarity(xp: Any, student: Any, teacher: Any) -> Any:
    """Mean squared error of the inner products between the samples of a batch, each row of length 1
    (Tung and Mori 2019, arXiv:1907.09682)."""

    def gram(x: Any) -> Any:
        flat = _rows(xp, x)
        return _unit(xp, xp.matmul(flat, xp.swapaxes(flat, 0, 1)))

    return xp.mean((gram(student) - gram(teacher)) ** 2)


def distances(xp: Any, student: Any, teacher: Any) -> Any:
    """Huber distance of the distances between the samples of a batch, each relative to their mean
    (RKD-D; Park et al. 2019, arXiv:1904.05068)."""

    def relative(x: Any) -> Any:
        flat = _rows(xp, x)
        away = xp.expand_dims(flat, axis=0) - xp.expand_dims(flat, axis=1)
        squares = xp.sum(away * away, axis=-1)
        apart = squares > _EPSILON
        # The root of a constant where two samples are one, as the root of zero has no gradient.
        lengths = xp.where(apart, xp.sqrt(xp.where(apart, squares, xp.ones_like(squares))), xp.zeros_like(squares))
        number = xp.sum(xp.where(apart, xp.ones_like(squares), xp.zeros_like(squares)))
        return lengths * number / (xp.sum(lengths) + _EPSILON)

    return _huber(xp, relative(student), relative(teacher))


def angles(xp: Any, student: Any, teacher: Any) -> Any:
    """Huber distance of the cosines of all angles between three samples of a batch (RKD-A; Park et al. 2019)."""

    def cosines(x: Any) -> Any:
        flat = _rows(xp, x)
        away = _unit(xp, xp.expand_dims(flat, axis=0) - xp.expand_dims(flat, axis=1))
        return xp.matmul(away, xp.swapaxes(away, 1, 2))

    return _huber(xp, cosines(student), cosines(teacher))


def relational(xp: Any, student: Any, teacher: Any) -> Any:
    """`distances` once and `angles` twice, as published."""
    return distances(xp, student, teacher) + 2.0 * angles(xp, student, teacher)


def contrast(xp: Any, student: Any, teacher: Any, weight: Any, bias: Any, to: Any, shift: Any) -> Any:
    """How hard it is to tell, by the cosines of projected features averaged over positions, which sample of the batch
    of one network is which of the other's: mean cross-entropy both ways (contrastive distillation, Tian et al. 2020,
    arXiv:1910.10699, whose negatives come from a memory; these are the batch's, as in CLIP, arXiv:2103.00020).

    `weight` and `bias` project the student, ``(its channels, width)`` and ``(width,)``, `to` and `shift` the teacher.
    """
    own = _unit(xp, xp.matmul(xp.mean(student, axis=1), weight) + bias)
    other = _unit(xp, xp.matmul(xp.mean(teacher, axis=1), to) + shift)
    cosines = xp.matmul(own, xp.swapaxes(other, 0, 1)) / _TEMPERATURE
    right = xp.sum(own * other, axis=-1) / _TEMPERATURE
    return xp.mean(0.5 * (_log_sum(xp, cosines, -1) + _log_sum(xp, cosines, 0)) - right)


def review(xp: Any, students: Sequence[Any], teachers: Sequence[Any], weights: Sequence[Mapping[str, Any]]) -> Any:
    """Knowledge review (ReviewKD; Chen et al. 2021, arXiv:2104.09044): the sum over levels of `contexts` of what the
    student's grid, and those behind it, make of each other and the teacher's grid.

    From the deepest level back, a grid is projected to one width and fused with what comes from the level behind, by
    two attention maps that both together decide; the fused grid goes to the level before, and through a kernel of three
    positions to the teacher's channels. All is normalised by the batch, as in training.

    Parameters
    ----------
    students, teachers : grids, one of each a level, the deepest last; sizes may differ.
    weights : of each level, see `reviewing`.
    """
    total: Any = 0.0
    behind = None
    for own, other, learned in zip(students[::-1], teachers[::-1], weights[::-1], strict=True):
        x = _normed(xp, xp.matmul(own, learned["enter"]), learned["enter_scale"], learned["enter_shift"])
        if behind is not None:
            y = resized(xp, behind, tuple(x.shape[1:-1]))
            both = xp.matmul(xp.concatenate([x, y], axis=-1), learned["fuse"]) + learned["fuse_bias"]
            maps = 1.0 / (1.0 + xp.exp(-both))
            x = x * maps[..., :1] + y * maps[..., 1:]
        x = behind = resized(xp, x, tuple(other.shape[1:-1]))
        out = _normed(xp, convolved(xp, x, learned["leave"]), learned["leave_scale"], learned["leave_shift"])
        total = total + contexts(xp, out, other)
    return total


def reviewing(inputs: Sequence[int], outputs: Sequence[int], rank: int, seed: int) -> list[dict[str, Any]]:
    """The first weights of `review`, float32: of each level by name, normally distributed by `seed` so that squares
    keep their mean.

    Parameters
    ----------
    inputs, outputs : channels of student and teacher, of each level; the fused grids have as many as the deepest of the
        student, at most 512.
    rank : of the grids without batch and channels.
    """
    width = min(_WIDEST, inputs[-1])

    def drawn(level: int, which: int, rows: int, columns: int) -> Any:
        rng = np.random.default_rng([seed, level, which])
        return (rng.normal(size=(rows, columns)) / math.sqrt(rows)).astype(np.float32)

    levels = []
    for level, (own, other) in enumerate(zip(inputs, outputs, strict=True)):
        learned = {"enter": drawn(level, 0, own, width), "leave": drawn(level, 1, 3**rank * width, other)}
        for name, size in (("enter", width), ("leave", other)):
            learned |= {f"{name}_scale": np.ones(size, np.float32), f"{name}_shift": np.zeros(size, np.float32)}
        if level < len(inputs) - 1:
            learned |= {"fuse": drawn(level, 2, 2 * width, 2), "fuse_bias": np.zeros(2, np.float32)}
        levels.append(learned)
    return levels


def contexts(xp: Any, student: Any, teacher: Any) -> Any:
    """Mean squared error of two grids of one shape, and of their means in 4, 2 and 1 equal parts of every side where
    these are fewer than positions, each worth half of the one before; a weighted mean (the hierarchical context loss of
    ReviewKD)."""
    total, weight, weights = xp.mean((student - teacher) ** 2), 1.0, 1.0
    for parts in _CONTEXTS:
        if parts < min(student.shape[1:-1]):
            weight /= 2
            weights += weight
            size = (parts,) * (len(student.shape) - 2)
            total = total + weight * xp.mean((pooled(xp, student, size) - pooled(xp, teacher, size)) ** 2)
    return total / weights


def pooled(xp: Any, grid: Any, size: tuple[int, ...]) -> Any:
    """The means of a grid in so many parts of its sides, as equal as positions allow; neighbours may overlap (adaptive
    average pooling)."""
    for axis, parts in enumerate(size, 1):
        source = grid.shape[axis]
        if source % parts == 0:
            grid = xp.mean(_split(xp, grid, axis, parts), axis=axis + 1)
        else:
            bounds = [(i * source // parts, -(-(i + 1) * source // parts)) for i in range(parts)]
            means = [xp.mean(_part(grid, axis, start, stop), axis=axis) for start, stop in bounds]
            grid = xp.stack(means, axis=axis)
    return grid


def on_smaller(xp: Any, first: Any, second: Any) -> tuple[Any, Any]:
    """Two grids ``(batch, *size, channels)``, each pooled along the sides along which it is the larger one."""
    size = tuple(min(pair) for pair in zip(first.shape[1:-1], second.shape[1:-1], strict=True))
    return pooled(xp, first, size), pooled(xp, second, size)


def resized(xp: Any, grid: Any, size: tuple[int, ...]) -> Any:
    """A grid of another size, by the nearest position at or before."""
    for axis, target in enumerate(size, 1):
        source = grid.shape[axis]
        if target % source == 0 and target > source:
            grid = _joined(xp, xp.stack([grid] * (target // source), axis=axis + 1), axis)
        elif source % target == 0:
            grid = xp.squeeze(_part(_split(xp, grid, axis, target), axis + 1, 0, 1), axis=axis + 1)
        else:
            nearest = [_part(grid, axis, i * source // target, i * source // target + 1) for i in range(target)]
            grid = xp.concatenate(nearest, axis=axis)
    return grid


def convolved(xp: Any, grid: Any, weight: Any) -> Any:
    """A convolution of three positions a side, zeros beyond: ``(batch, *size, out)``.

    `weight` is ``(3^sides · channels, out)``, the first side slowest. Products are shifted and not what they are made
    of, which would hold every position 3^sides times.
    """
    sides = len(grid.shape) - 2
    kernels = xp.reshape(weight, (3,) * sides + (grid.shape[-1], weight.shape[-1]))

    def total(offsets: tuple[int, ...]) -> Any:
        axis = len(offsets)
        if axis == sides:
            return xp.matmul(grid, kernels[offsets])
        before, at, behind = (total((*offsets, offset)) for offset in range(3))
        edge = xp.zeros_like(_part(at, axis + 1, 0, 1))
        return (
            at
            + xp.concatenate([edge, _part(before, axis + 1, 0, -1)], axis=axis + 1)
            + xp.concatenate([_part(behind, axis + 1, 1, grid.shape[axis + 1]), edge], axis=axis + 1)
        )

    return total(())


def _split(xp: Any, grid: Any, axis: int, parts: int) -> Any:
    """One axis as two, `parts` first."""
    shape = grid.shape
    return xp.reshape(grid, (-1, *shape[1:axis], parts, shape[axis] // parts, *shape[axis + 1 :]))


def _joined(xp: Any, grid: Any, axis: int) -> Any:
    """An axis and the one behind it as one."""
    shape = grid.shape
    return xp.reshape(grid, (-1, *shape[1:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :]))


def attention_map(xp: Any, query: Any, key: Any) -> Any:
    """``softmax(q kᵀ / √width)`` of heads, ``(batch, heads, positions, positions)``; without any mask."""
    return xp.exp(_log_relation(xp, query, key))


def maps(xp: Any, student: Any, teacher: Any) -> Any:
    """Mean KL divergence of attention distributions, ``(batch, heads, positions, positions)``, from the teacher's
    (MiniLM; Wang et al. 2020, arXiv:2002.10957); of their means over heads where there are more on one side."""
    if student.shape[1] != teacher.shape[1]:
        student, teacher = (xp.mean(x, axis=1, keepdims=True) for x in (student, teacher))
    own, other = (xp.log(x + _EPSILON) for x in (student, teacher))
    return xp.mean(xp.sum(teacher * (other - own), axis=-1))


def relation(xp: Any, student: Any, teacher: Any) -> Any:
    """Mean KL divergence of ``softmax(x xᵀ / √width)``, x being queries, keys or values
    (MiniLMv2; Wang et al. 2021, arXiv:2012.15828).

    Heads are split anew, into as many as the teacher has, or into the most that divide both widths and that number.
    """
    (own_heads, own_width), (heads, width) = ((x.shape[1], x.shape[-1]) for x in (student, teacher))
    number = math.gcd(heads, own_heads * own_width, heads * width)
    own, other = (_log_relation(xp, x, x) for x in (_heads(xp, student, number), _heads(xp, teacher, number)))
    return xp.mean(xp.sum(xp.exp(other) * (other - own), axis=-1))


def _heads(xp: Any, x: Any, number: int) -> Any:
    if x.shape[1] == number:
        return x
    heads, positions, width = x.shape[1:]
    joined = xp.reshape(xp.swapaxes(x, 1, 2), (-1, positions, number, heads * width // number))
    return xp.swapaxes(joined, 1, 2)


def _log_relation(xp: Any, a: Any, b: Any) -> Any:
    scores = xp.matmul(a, xp.swapaxes(b, -1, -2)) / math.sqrt(a.shape[-1])
    return scores - xp.expand_dims(_log_sum(xp, scores, -1), axis=-1)


def _log_sum(xp: Any, x: Any, axis: int) -> Any:
    """Of exponentials, over one axis."""
    largest = xp.max(x, axis=axis, keepdims=True)
    return xp.squeeze(largest, axis=axis) + xp.log(xp.sum(xp.exp(x - largest), axis=axis))


def _rows(xp: Any, x: Any) -> Any:
    return xp.reshape(x, (-1, math.prod(x.shape[1:])))


def _unit(xp: Any, x: Any) -> Any:
    """Vectors along the last axis, of length 1; where they are zero they stay so, with a finite gradient."""
    return x / xp.sqrt(xp.sum(x * x, axis=-1, keepdims=True) + _EPSILON**2)


def _huber(xp: Any, a: Any, b: Any) -> Any:
    error = xp.abs(a - b)
    return xp.mean(xp.where(error < 1, 0.5 * error * error, error - 0.5))


def _part(grid: Any, axis: int, start: int, stop: int) -> Any:
    """Some positions of one axis."""
    return grid[(slice(None),) * axis + (slice(start, stop),)]


def _normed(xp: Any, grid: Any, scale: Any, shift: Any) -> Any:
    """Normalised by the statistics of its channels over batch and positions."""
    axes = tuple(range(len(grid.shape) - 1))
    centred = grid - xp.mean(grid, axis=axes, keepdims=True)
    variance = xp.mean(centred * centred, axis=axes, keepdims=True)
    return centred / xp.sqrt(variance + _NORM_EPSILON) * scale + shift
