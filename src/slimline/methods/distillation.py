"""What a student is trained to make small: distances to the teacher's outputs and to the labels.

Every function takes the array namespace ``xp`` first (``numpy`` or a framework's own): the formulas are written once
and differentiate in every framework. *Outputs* are logits, float, of any shape; `axis` is the axis of classes, last for
``(batch, classes)`` and ``(batch, position, classes)``, 1 for ``(batch, classes, height, width)``. Losses are sums over
classes and means over everything else, natural logarithms, and scalars of the namespace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from slimline.basics.errors import SlimlineError
from slimline.methods.outputs import IGNORED, Output

Kind = Literal["kl", "logit-standard", "dkd", "dist", "mse"]

_EPSILON = 1e-7
_SMALL = 1e-8
_NEVER = -1e9
"""Logarithm of a probability that is zero, as `-inf` has no gradients."""


def log_softmax(xp: Any, logits: Any, axis: int = -1) -> Any:
    """Logarithms of the softmax over `axis`, same shape as `logits`; safe for logits of any size."""
    shifted = logits - xp.max(logits, axis=axis, keepdims=True)
    return shifted - xp.log(xp.sum(xp.exp(shifted), axis=axis, keepdims=True))


def kl(xp: Any, student: Any, teacher: Any, temperature: float = 1.0, axis: int = -1) -> Any:
    """``T² KL(softmax(teacher / T) ‖ softmax(student / T))``, in nats (Hinton et al. 2015, arXiv:1503.02531).

    ``T²`` keeps the size of the gradient when the temperature ``T`` changes.
    """
    log_teacher = log_softmax(xp, teacher / temperature, axis)
    log_student = log_softmax(xp, student / temperature, axis)
    return temperature**2 * xp.mean(xp.sum(xp.exp(log_teacher) * (log_teacher - log_student), axis=axis))


def logit_standard(xp: Any, logits: Any, axis: int = -1) -> Any:
    """Logits with mean 0 and standard deviation 1 over the classes (Sun et al. 2024, arXiv:2403.01427).

    The student then matches the teacher's ranking and proportions and is free in shift and scale.
    Constant logits give zeros.
    """
    centred = logits - xp.mean(logits, axis=axis, keepdims=True)
    variance = xp.mean(centred * centred, axis=axis, keepdims=True)
    # Inside the root, so that the gradient of constant logits is 0 and not NaN.
    return centred / xp.sqrt(variance + _EPSILON**2)


def mse(xp: Any, student: Any, teacher: Any) -> Any:
    """Mean squared difference of two arrays of one shape, in squared units of the outputs."""
    return xp.mean((student - teacher) ** 2)


def decoupled(
    xp: Any,
    student: Any,
    teacher: Any,
    labels: Any | None = None,
    temperature: float = 1.0,
    beta: float = 8.0,
    axis: int = -1,
    ignore: int | None = None,
) -> Any:
    """Decoupled distillation (DKD; Zhao et al. 2022, arXiv:2203.08679), in nats.

    ``T² (KL of target against the rest + beta · KL among the other classes)``, where `kl` weighs the latter by the
    teacher's doubt. The target is the label; without `labels`, and where a label is `ignore`, it is the teacher's
    largest logit.
    """
    target = xp.argmax(teacher, axis=axis)
    if labels is not None:
        target = labels if ignore is None else xp.where(labels != ignore, labels, target)
    numbers = xp.cumsum(xp.ones_like(student), axis=axis) - 1
    aimed = xp.equal(numbers, xp.expand_dims(target, axis=axis))
    parts = []
    for logits in (student, teacher):
        logs = log_softmax(xp, logits / temperature, axis)
        nothing = xp.full_like(logs, _NEVER)
        pair = [xp.where(aimed, logs, nothing), xp.where(aimed, nothing, logs)]
        parts.append([*(_log_sum_exp(xp, part, axis) for part in pair), log_softmax(xp, pair[1], axis)])
    (right, wrong, others), (true_right, true_wrong, true_others) = parts
    binary = xp.exp(true_right) * (true_right - right) + xp.exp(true_wrong) * (true_wrong - wrong)
    among = xp.sum(xp.where(aimed, xp.zeros_like(others), xp.exp(true_others) * (true_others - others)), axis=axis)
    return temperature**2 * (xp.mean(binary) + beta * xp.mean(among))


def correlation(xp: Any, student: Any, teacher: Any, temperature: float = 1.0, axis: int = -1) -> Any:
    """DIST (Huang et al. 2022, arXiv:2205.10536): ``T²`` times one less the Pearson correlation of softened outputs.

    Twice: over the classes of a sample and over the samples (and positions) of a class, each averaged over the others.
    """
    own, other = (xp.moveaxis(xp.exp(log_softmax(xp, x / temperature, axis)), axis, -1) for x in (student, teacher))
    own, other = (xp.reshape(x, (-1, x.shape[-1])) for x in (own, other))
    pair = [1 - xp.mean(_pearson(xp, own, other, along)) for along in (1, 0)]
    return temperature**2 * (pair[0] + pair[1])


def mean_teacher(xp: Any, teachers: Sequence[Any], output: Output, temperature: float = 1.0, raw: bool = False) -> Any:
    """One output that stands for those of several teachers.

    Of classes the logits whose softmax at `temperature` is the mean of the teachers' softmaxes at it, of independent
    labels likewise; of quantities and features, and where the logits themselves are compared (`raw`), the mean.
    """
    if len(teachers) == 1:
        return teachers[0]
    if raw or output.kind in ("regression", "features", None):
        return sum(teachers[1:], teachers[0]) / len(teachers)
    if output.kind == "multilabel":
        pairs = [log_softmax(xp, two_classes(xp, x / temperature)) for x in teachers]
        no, yes = (_mean_of_exp(xp, [pair[..., i] for pair in pairs]) for i in (0, 1))
        return temperature * (yes - no)
    axis = -1 if output.axis is None else output.axis
    return temperature * _mean_of_exp(xp, [log_softmax(xp, x / temperature, axis) for x in teachers])


def joint_teacher(
    xp: Any, kind: Kind, outputs: Sequence[Output], teachers: Sequence[Sequence[Any]], temperature: float
) -> list[Any]:
    """`mean_teacher` of every output; of each teacher there are its outputs."""
    return [
        mean_teacher(xp, every, output, temperature, kind == "mse") if output.floating else every[0]
        for output, every in zip(outputs, zip(*teachers, strict=True), strict=True)
    ]


def cross_entropy(xp: Any, logits: Any, labels: Any, axis: int = -1, ignore: int | None = None) -> Any:
    """Mean negative log-likelihood in nats of integer `labels`, shaped as `logits` without `axis`.

    Labels must lie in ``[0, classes)``; int64 suits every namespace. Positions whose label is `ignore` do not count;
    where none does, the loss is 0.
    """
    logs = log_softmax(xp, logits, axis)
    if ignore is None:
        return -xp.mean(xp.take_along_axis(logs, xp.expand_dims(labels, axis=axis), axis=axis))
    counts = xp.expand_dims(labels != ignore, axis=axis)
    real = xp.expand_dims(xp.where(labels != ignore, labels, xp.zeros_like(labels)), axis=axis)
    picked = xp.take_along_axis(logs, real, axis=axis)
    none, one = xp.zeros_like(picked), xp.ones_like(picked)
    number = xp.sum(xp.where(counts, one, none))
    return -xp.sum(xp.where(counts, picked, none)) / xp.where(number > 0, number, xp.ones_like(number))


def two_classes(xp: Any, logits: Any) -> Any:
    """Logits of *no* and *yes*, ``(…, 2)``, of the logits of independent labels."""
    return xp.stack([xp.zeros_like(logits), logits], axis=-1)


def binary_cross_entropy(xp: Any, logits: Any, labels: Any) -> Any:
    """Mean negative log-likelihood in nats of `labels` in [0, 1], each by itself, shaped as `logits`."""
    logs = log_softmax(xp, two_classes(xp, logits))
    return -xp.mean(labels * logs[..., 1] + (1 - labels) * logs[..., 0])


def loss(
    xp: Any,
    kind: Kind,
    student: Any,
    teacher: Any | None,
    labels: Any | None,
    output: Output,
    *,
    temperature: float = 4.0,
    alpha: float = 0.9,
    beta: float = 8.0,
) -> Any | None:
    """``alpha * distillation + (1 - alpha) * hard`` of one output; the whole weight goes to the part that is there.

    Parameters
    ----------
    kind : the distillation part of classes: `kl`, ``logit-standard`` (`kl` of standardised logits), ``dkd``
        (`decoupled`), ``dist`` (`correlation`) or `mse`. Of independent labels it is `kl` or `mse`, of quantities and
        features the squared error.
    beta : of `decoupled`.
    teacher : the teacher's output, shaped as `student`, or None to learn from the labels alone.
    labels : as `slimline.methods.outputs.targets` gives them, or None.

    Returns
    -------
    None where there is neither teacher nor label.
    """
    soft = hard = None
    axis = -1 if output.axis is None else output.axis
    real = output.kind in ("regression", "features")
    if teacher is not None:
        if kind == "mse" or real:
            soft = _scaled(mse(xp, student, teacher), output)
        elif output.kind == "multilabel":  # of two classes, standardised logits would say which one and no more
            soft = kl(xp, two_classes(xp, student), two_classes(xp, teacher), temperature)
        elif kind == "kl":
            soft = kl(xp, student, teacher, temperature, axis)
        elif kind == "dkd":
            soft = decoupled(xp, student, teacher, labels, temperature, beta, axis, IGNORED if output.ignores else None)
        elif kind == "dist":
            soft = correlation(xp, student, teacher, temperature, axis)
        else:
            soft = kl(xp, logit_standard(xp, student, axis), logit_standard(xp, teacher, axis), temperature, axis)
    if labels is not None:
        if real:
            hard = _scaled(mse(xp, student, labels), output)
        elif output.kind == "multilabel":
            hard = binary_cross_entropy(xp, student, labels)
        else:
            hard = cross_entropy(xp, student, labels, axis, IGNORED if output.ignores else None)
    if soft is None or hard is None:
        return hard if soft is None else soft
    return alpha * soft + (1 - alpha) * hard


def joint(
    xp: Any,
    kind: Kind,
    outputs: Sequence[Output],
    students: Sequence[Any],
    teachers: Sequence[Any] | None,
    labels: Sequence[Any | None],
    *,
    temperature: float = 4.0,
    alpha: float = 0.9,
    beta: float = 8.0,
) -> Any:
    """The sum of `loss` over all outputs of real numbers, each times its weight; 0 where all weights are.

    Raises
    ------
    SlimlineError : without teacher and labels.
    """
    total = None
    real = [(output, student) for output, student in zip(outputs, students, strict=True) if output.floating]
    if real and all(output.weight == 0 for output, _ in real):
        return 0.0 * xp.mean(real[0][1])
    for index, (output, student, own) in enumerate(zip(outputs, students, labels, strict=True)):
        if not output.floating or output.weight == 0:
            continue
        teacher = None if teachers is None else teachers[index]
        part = loss(xp, kind, student, teacher, own, output, temperature=temperature, alpha=alpha, beta=beta)
        if part is not None:
            part = part if output.weight == 1 else output.weight * part
            total = part if total is None else total + part
    if total is None:
        raise SlimlineError("There is nothing to train towards: give a teacher or labels.")
    return total


def _scaled(error: Any, output: Output) -> Any:
    return error if output.scale == 1 else error / output.scale


def _log_sum_exp(xp: Any, logs: Any, axis: int) -> Any:
    most = xp.max(logs, axis=axis, keepdims=True)
    return xp.squeeze(most, axis=axis) + xp.log(xp.sum(xp.exp(logs - most), axis=axis))


def _mean_of_exp(xp: Any, logs: Sequence[Any]) -> Any:
    """Logarithm of the mean of what these are the logarithms of."""
    return _log_sum_exp(xp, xp.stack(list(logs), axis=-1), -1) - math.log(len(logs))


def _pearson(xp: Any, a: Any, b: Any, axis: int) -> Any:
    a, b = (x - xp.mean(x, axis=axis, keepdims=True) for x in (a, b))
    # Inside the root, so that the gradient of constant rows is 0 and not NaN.
    squares = xp.sum(a * a, axis=axis) * xp.sum(b * b, axis=axis)
    return xp.sum(a * b, axis=axis) / xp.sqrt(squares + _SMALL**2)
