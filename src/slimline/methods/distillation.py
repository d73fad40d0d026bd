"""What a student is trained to make small: distances to the teacher's outputs and to the labels.

Every function takes the array namespace ``xp`` first (``numpy``, ``array_api_compat.torch``,
``keras.ops``): the formulas are written once and differentiate in every framework. *Outputs* are
logits, float, of any shape; `axis` is the axis of classes, last for ``(batch, classes)`` and
``(batch, position, classes)``, 1 for ``(batch, classes, height, width)``. Losses are sums over classes
and means over everything else, natural logarithms, and scalars of the namespace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from slimline.basics.errors import SlimlineError
from slimline.methods.outputs import IGNORED, Output

Kind = Literal["kl", "logit-standard", "mse"]

_EPSILON = 1e-7


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
) -> Any | None:
    """``alpha * distillation + (1 - alpha) * hard`` of one output; the whole weight goes to the part that is there.

    Parameters
    ----------
    kind : ``kl``, ``logit-standard`` or ``mse``, the distillation part of classes and labels; of quantities and
        features it is the squared error.
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
) -> Any:
    """The sum of `loss` over all outputs of real numbers, each times its weight.

    Raises
    ------
    SlimlineError : without teacher and labels.
    """
    total = None
    for index, (output, student, own) in enumerate(zip(outputs, students, labels, strict=True)):
        if not output.floating or output.weight == 0:
            continue
        teacher = None if teachers is None else teachers[index]
        part = loss(xp, kind, student, teacher, own, output, temperature=temperature, alpha=alpha)
        if part is not None:
            part = part if output.weight == 1 else output.weight * part
            total = part if total is None else total + part
    if total is None:
        raise SlimlineError("There is nothing to train towards: give a teacher or labels.")
    return total


def _scaled(error: Any, output: Output) -> Any:
    return error if output.scale == 1 else error / output.scale
