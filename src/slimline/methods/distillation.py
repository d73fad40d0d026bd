"""What a student is trained to make small: distances to the teacher's outputs and to the labels.

Every function takes the array namespace ``xp`` first (``numpy``, ``array_api_compat.torch``,
``keras.ops``): the formulas are written once and differentiate in every framework. *Outputs* are
logits, float, of any shape; `axis` is the axis of classes, last for ``(batch, classes)`` and
``(batch, position, classes)``, 1 for ``(batch, classes, height, width)``. Losses are sums over classes
and means over everything else, natural logarithms, and scalars of the namespace.
"""

from __future__ import annotations

from typing import Any, Literal

from slimline.basics.errors import SlimlineError

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


def cross_entropy(xp: Any, logits: Any, labels: Any, axis: int = -1) -> Any:
    """Mean negative log-likelihood in nats of integer `labels`, shaped as `logits` without `axis`.

    Labels must lie in ``[0, classes)``; int64 suits every namespace.
    """
    picked = xp.take_along_axis(log_softmax(xp, logits, axis), xp.expand_dims(labels, axis=axis), axis=axis)
    return -xp.mean(picked)


def loss(
    xp: Any,
    kind: Kind,
    student: Any,
    teacher: Any | None,
    labels: Any | None,
    *,
    temperature: float = 4.0,
    alpha: float = 0.9,
    axis: int = -1,
    regression: bool = False,
) -> Any:
    """``alpha * distillation + (1 - alpha) * hard``; the whole weight goes to the part that is there.

    Parameters
    ----------
    kind : ``kl``, ``logit-standard`` or ``mse``, the distillation part.
    teacher : the teacher's outputs, shaped as `student`, or None to learn from the labels alone.
    labels : classes for `cross_entropy`; values shaped as `student` for `mse` when `regression`; or None.

    Raises
    ------
    SlimlineError : without teacher and labels.
    """
    soft = hard = None
    if teacher is not None:
        if kind == "mse":
            soft = mse(xp, student, teacher)
        elif kind == "kl":
            soft = kl(xp, student, teacher, temperature, axis)
        else:
            soft = kl(xp, logit_standard(xp, student, axis), logit_standard(xp, teacher, axis), temperature, axis)
    if labels is not None:
        hard = mse(xp, student, labels) if regression else cross_entropy(xp, student, labels, axis)
    if soft is None and hard is None:
        raise SlimlineError("There is nothing to train towards: give a teacher or labels.")
    if soft is None:
        return hard
    return soft if hard is None else alpha * soft + (1 - alpha) * hard


def class_axis(outputs: tuple[int, ...], labels: tuple[int, ...] | None, channels_first: bool) -> int:
    """The axis of classes in outputs of this shape: 1 or -1.

    The shape of integer labels decides. Without labels, or where both fit, dense outputs
    ``(batch, …, …, …)`` of four dimensions or more follow `channels_first`, others have classes last.

    Raises
    ------
    SlimlineError : the labels fit neither axis.
    """
    if labels is not None:
        last, first = labels == outputs[:-1], labels == (outputs[0], *outputs[2:])
        if last != first:
            return -1 if last else 1
        if not last:
            raise SlimlineError(
                f"Labels of shape {labels} do not fit outputs of shape {outputs}: "
                "give one integer class for every position of the outputs."
            )
    return 1 if channels_first and len(outputs) > 3 else -1
