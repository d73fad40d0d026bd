"""What a network's outputs mean: classes on an axis, labels of which several may hold, quantities, or features.

What is known decides: the dtype and the shape of the labels against the shape of the output. Integer labels with the
output's shape less one axis are classes on that axis; booleans, or zeros and ones, of the output's shape are yes or no
each; real numbers are quantities. Where that leaves a choice the user names it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from slimline.basics.arrays import Array
from slimline.basics.errors import SlimlineError, unknown
from slimline.basics.named import Labels, Named

Kind = Literal["classes", "multilabel", "regression", "features"]
IGNORED = -100
"""The label of a position that counts neither in a loss nor in a score."""


@dataclass(frozen=True)
class Output:
    """One output of a network.

    Attributes
    ----------
    kind : ``classes`` of which one is right at every position, ``multilabel`` (each yes or no), ``regression``
        (quantities), or ``features`` (numbers without labels); None where labels decide.
    axis : that counts classes, in the output with its batch, such as 1 for ``(batch, classes, height, width)``.
    name : unique in the model.
    shape, dtype : of the output for a batch.
    labelled : whether there are labels that fit.
    assumed : whether nothing confirms `kind` and `axis`: no label, and no word of the user.
    weight : of its loss in the sum.
    scale : by which squared errors are divided, so that outputs of any unit weigh alike.
    """

    kind: Kind | None = None
    axis: int | None = None
    name: str = ""
    shape: tuple[int, ...] = ()
    dtype: str = "float32"
    labelled: bool = False
    assumed: bool = False
    weight: float = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in get_args(Kind):
            raise unknown("kind of output", str(self.kind), get_args(Kind))
        if self.axis is not None and (type(self.axis) is not int or self.axis == 0):
            raise SlimlineError(f"axis is {self.axis!r}: give the dimension that counts classes, such as 1 or -1.")

    @property
    def floating(self) -> bool:
        """Whether it is of real numbers, which a loss can compare."""
        return np.dtype(self.dtype).kind == "f"

    @property
    def positions(self) -> tuple[int, ...]:
        """Shape of its class labels for a batch."""
        assert self.axis is not None
        axis = self.axis % len(self.shape)
        return (*self.shape[:axis], *self.shape[axis + 1 :])

    @property
    def ignores(self) -> bool:
        """Whether labels of single positions can be `IGNORED`: of sequences and dense predictions."""
        return len(self.shape) > 2

    @property
    def called(self) -> str:
        """As messages name it."""
        return f"The output {self.name!r}" if self.name else "The output"

    def sentence(self) -> str:
        """What it is, such as ``classes on axis 1``."""
        axis = "" if self.axis is None else f" on axis {self.axis}"
        return f"{self.kind or 'integers'}{axis}"


Declared = Mapping[str | int, Output]
"""What the user says of outputs, by their names or positions."""


def declared(wishes: object) -> Declared:
    """What the user says of outputs: a dict by names, a tuple by positions, or one `Output` or kind of the first.

    Raises
    ------
    SlimlineError : anything else.
    """
    items: Mapping[object, object]
    if isinstance(wishes, Mapping):
        items = wishes
    elif isinstance(wishes, tuple | list):
        items = {index: each for index, each in enumerate(wishes) if each is not None}
    else:
        items = {} if wishes is None else {0: wishes}
    outputs_by_key: dict[str | int, Output] = {}
    for key, each in items.items():
        output = Output(each) if isinstance(each, str) else each  # type: ignore[arg-type]
        if not isinstance(output, Output) or not isinstance(key, str | int):
            raise SlimlineError(
                f"outputs holds a {type(each).__name__} for {key!r}: give a kind such as 'multilabel', or an Output."
            )
        outputs_by_key[key] = output
    return outputs_by_key


def bare(names: Sequence[str], arrays: Sequence[Array]) -> tuple[Output, ...]:
    """Outputs of which only names and arrays are known; without names they are called by their positions."""
    called = names or [str(i) for i in range(len(arrays))]
    return tuple(Output(name=n, shape=a.shape, dtype=a.dtype.name) for n, a in zip(called, arrays, strict=True))


def aligned(labels: Labels, outputs: Sequence[Output]) -> tuple[Array | None, ...]:
    """The labels of each output; an array is for the first.

    Raises
    ------
    SlimlineError : more labels than outputs, fewer, or names that no output has.
    """
    names = tuple(o.name for o in outputs)
    if not isinstance(labels, Named):
        return (labels, *[None] * (len(outputs) - 1))
    if labels.names:
        if strange := [n for n in labels.names if n not in names]:
            raise unknown("output with labels called", strange[0], names)
        return tuple(labels[n] if n in labels.names else None for n in names)
    if len(labels) != len(outputs):
        raise SlimlineError(
            f"There are labels of {len(labels)} outputs and the model has {len(outputs)} ({', '.join(names)}): give a "
            "dict by their names, or None for those without labels."
        )
    return labels.arrays


def described(
    outputs: Sequence[Output],
    labels: Labels = None,
    declared: Declared | None = None,
    *,
    channels_first: bool = True,
    lenient: bool = False,
) -> tuple[Output, ...]:
    """The outputs with their kinds and axes.

    Parameters
    ----------
    outputs : with names, shapes and dtypes.
    labels : of any number of samples.
    declared : what the user says.
    channels_first : where a dense output without labels has its classes, if it has any.
    lenient : take labels that do not fit as none: where they are for the user's own metric only.

    Raises
    ------
    SlimlineError : labels that do not fit an output, or fit it in several ways; names of no output.
    """
    wishes = declared or {}
    known = {o.name for o in outputs} | set(range(len(outputs)))
    if strange := [key for key in wishes if key not in known]:
        raise unknown("output", str(strange[0]), [o.name for o in outputs])
    try:
        every = aligned(labels, outputs)
    except SlimlineError:
        if not lenient:
            raise
        every = (None,) * len(outputs)
    described = []
    for index, (output, own) in enumerate(zip(outputs, every, strict=True)):
        told = wishes.get(output.name) or wishes.get(index) or Output()
        axis = None if told.axis is None else _axis(told.axis, output)
        output = replace(output, kind=told.kind or (None if axis is None else "classes"), axis=axis)
        alone = sum(o.floating for o in outputs) == 1
        if own is not None and output.kind != "features":
            try:
                described.append(_labelled(output, own))
                continue
            except SlimlineError:
                if not lenient:
                    raise
        described.append(_unlabelled(output, alone, channels_first))
    return tuple(described)


def targets(outputs: Sequence[Output], labels: Labels) -> tuple[Array | None, ...]:
    """The labels of each output as losses take them: classes int64, others float32 of the output's shape."""
    matched: list[Array | None] = []
    for output, own in zip(outputs, aligned(labels, outputs), strict=True):
        if own is None or not output.labelled:
            matched.append(None)
        elif output.kind == "classes":
            matched.append(own.reshape(own.shape[: len(output.shape) - 1]).astype(np.int64, copy=False))
        else:
            matched.append(own.reshape(len(own), *output.shape[1:]).astype(np.float32, copy=False))
    return tuple(matched)


def _axis(axis: int, output: Output) -> int:
    if not -len(output.shape) < axis < len(output.shape):
        raise SlimlineError(f"{output.called} has the shape {output.shape}: it has no axis {axis} that counts classes.")
    return axis % len(output.shape)


def _labelled(output: Output, labels: Array) -> Output:
    """An output by its labels, within what the user says."""
    kind = output.kind
    if kind is None:
        if labels.dtype.kind == "f":
            kind = "regression"
        elif labels.shape[1:] == output.shape[1:] and len(output.shape) > 1 and _binary(labels):
            kind = "multilabel"
        else:
            kind = "classes"
    if kind != "classes":
        if math.prod(labels.shape[1:]) != math.prod(output.shape[1:]):
            raise SlimlineError(
                f"The labels have shape {labels.shape[1:]} per sample and the outputs {output.shape[1:]}"
                f"{_of(output)}: they must agree."
            )
        return replace(output, kind=kind, axis=None, labelled=True)
    if labels.dtype.kind == "f":
        raise SlimlineError(f"{output.called} is of classes and its labels are {labels.dtype}: give integers.")
    axis = class_axis(output.shape, labels.shape, output.axis, output.name)
    return replace(output, kind=kind, axis=axis, labelled=True)


def class_axis(outputs: tuple[int, ...], labels: tuple[int, ...], axis: int | None = None, name: str = "") -> int:
    """The axis of classes: the one without which the outputs have the labels' shape, whatever their batches are; a last
    dimension of one of the labels is dropped where the outputs want that.

    Raises
    ------
    SlimlineError : there is none, there are several, or it counts a single class.
    """
    rank, of = len(outputs), f" ({name})" if name else ""
    own = labels[:-1] if len(labels) == rank and labels[-1] == 1 else labels
    fitting = [a for a in range(1, rank) if (*outputs[1:a], *outputs[a + 1 :]) == own[1:]]
    if axis is not None:
        fitting = [a for a in fitting if a == axis % rank]
    if not fitting:
        raise SlimlineError(
            f"Labels of shape {labels} do not fit outputs of shape {outputs}{of}: the labels must have the outputs' "
            "shape without the class axis."
        )
    if len(fitting) > 1:
        raise SlimlineError(
            f"In outputs of shape {outputs}{of} axis {' or '.join(map(str, fitting))} may count classes: give Data "
            f"outputs={{{name or 'name'!r}: slimline.Output(axis={fitting[0]})}}, or whichever it is."
        )
    if outputs[fitting[0]] < 2:
        raise SlimlineError(
            f"Outputs of shape {outputs}{of} name a single class, so accuracy means nothing: give a metric of your "
            "own, such as lambda outputs, labels: (outputs[:, 0] > 0) == labels."
        )
    return fitting[0]


def _unlabelled(output: Output, alone: bool, channels_first: bool) -> Output:
    """An output without labels: what the user says; logits where it is the only one; else features."""
    if not output.floating:
        return replace(output, kind=None, axis=None)
    usual = 1 if channels_first and len(output.shape) > 3 else len(output.shape) - 1
    if output.kind is not None:
        axis = usual if output.kind == "classes" and output.axis is None else output.axis
        return replace(output, axis=axis)
    if alone and len(output.shape) > 1 and output.shape[usual] > 1:
        return replace(output, kind="classes", axis=usual, assumed=True)
    return replace(output, kind="features", assumed=True)


def _binary(labels: Array) -> bool:
    return labels.dtype.kind == "b" or bool(((labels == 0) | (labels == 1)).all())


def _of(output: Output) -> str:
    return f" of {output.name!r}" if output.name else ""
