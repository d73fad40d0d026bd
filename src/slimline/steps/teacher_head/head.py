"""The last layers of two networks, and what puts one in the place of the other."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.data.splits import first
from slimline.frameworks.base import Array, Batch, Trainer
from slimline.graph.edits import Replace
from slimline.graph.equation import Window
from slimline.graph.matrix import LayerMatrix, matrices
from slimline.graph.operators import Convolution, Linear, Mean, Operator, Rectifier
from slimline.model import Model
from slimline.steps.base import Context, StepResult
from slimline.steps.teacher_head.step import TeacherHead
from slimline.training.companions import Companion, Company
from slimline.training.features import Inside, Tap

_SAMPLES = 64
_PLAIN = ("elementwise", "softmax")
"""Operators that may stand behind the last layer."""


def head_of(model: Model, who: str) -> LayerMatrix:
    """The last linear layer, which makes the output.

    Raises
    ------
    SlimlineError : there is none, or more than functions of single numbers stand behind it.
    """
    graph, nodes = model.graph, {node.name: node for node in model.graph.nodes}
    linear = [each for each in matrices(graph) if nodes[each.node].kind == "linear"]
    if not linear:
        raise SlimlineError(f"The {who} has no linear layer that it could end in: leave TeacherHead out.")
    head = linear[-1]
    behind = list(graph.nodes)[list(graph.nodes).index(nodes[head.node]) + 1 :]
    if strange := next((node for node in behind if node.kind not in _PLAIN), None):
        raise SlimlineError(
            f"The {who} does not end in its last linear layer, {head.layer}, but in {strange.layer or strange.name}: "
            "leave TeacherHead out."
        )
    if head.weight in graph.frozen and who == "student":
        raise SlimlineError(f"{head.layer} of the student is frozen: leave TeacherHead out, or let it train.")
    return head


def with_teacher_head(model: Model, step: TeacherHead, context: Context) -> StepResult:
    """The student with a projector and the teacher's last layer, and the record."""
    teacher = context.teacher
    if not isinstance(teacher, Model):
        raise SlimlineError("TeacherHead takes the last layer of one teacher: name one with teacher=.")
    own, other = head_of(model, "student"), head_of(teacher, "teacher")
    stored = teacher.parameters()
    head = other.matrix(stored[other.weight])[0]
    if own.shape[1] != other.shape[1]:
        raise SlimlineError(
            f"The student has {own.shape[1]} outputs and the teacher {other.shape[1]}: name a teacher of the same ones."
        )
    bias = None if other.bias is None else np.asarray(stored[other.bias], np.float32).reshape(-1)
    read, reads = own.shape[2], other.shape[2]
    width = step.width or max(1, reads // 2)
    source, learned, places = own.input, other.input, 0
    if step.on == "map":
        mine, theirs = map_of(model, own, "student", context), map_of(teacher, other, "teacher", context)
        if len(mine.size) != len(theirs.size):
            raise SlimlineError(
                f"The student's map has {_sides(mine)} places and the teacher's {_sides(theirs)}: leave on: map out."
            )
        source, learned, places = mine.name, theirs.name, len(mine.size)
    operators: list[Operator] = []
    for place, (inputs, outputs) in enumerate(((read, width), (width, width), (width, reads))):
        kernel = (3 if place == 1 else 1,) * places
        rng = np.random.default_rng([context.seed, place])
        scale = math.sqrt(2 / (inputs * math.prod(kernel)))
        weight = rng.normal(0, scale, (outputs, inputs, *kernel)).astype(np.float32)
        zeros = np.zeros(outputs, np.float32)
        window = Window((1,) * places, (1,) * places, tuple((n // 2, n // 2) for n in kernel))
        operators += [Convolution(weight, zeros, window) if places else Linear(weight, zeros), Rectifier()]
    if not _is_rectified(teacher, learned, context):
        operators.pop()
    operators += [Mean(places)] if places else []
    operators.append(Linear(np.asarray(head, np.float32), bias))
    change = Replace(own.layer, source, own.output, operators)
    masks = {name: mask for name, mask in model.masks.items() if name not in (own.weight, own.bias)}
    record = step.model_dump(mode="json")
    result = model.edited((change,), record, masks)
    return StepResult(result, {**record, "layer": own.layer, "widths": [read, width, width, reads, own.shape[1]]})


def map_of(model: Model, head: LayerMatrix, who: str, context: Context) -> Tap:
    """The map whose mean over all places the last layer reads.

    Raises
    ------
    SlimlineError : it reads something else.
    """
    tap = Inside(model, who).map
    if tap is not None:
        seen: dict[str, Array] = {}
        batch = _batches(model, context)[:1]
        model.adapter.observe(
            model.native, batch, [tap.name, head.input], lambda name, value: seen.update({name: np.array(value)})
        )
        places = tuple(axis for axis in range(1, len(tap.shape)) if axis != tap.axis)
        means, read = seen[tap.name].mean(places), seen[head.input].reshape(-1, tap.channels)
        if np.allclose(means, read, rtol=1e-3, atol=1e-4 * float(np.abs(means).max())):
            return tap
    raise SlimlineError(
        f"{head.layer} of the {who} does not read the mean over all places of a map: leave on: map out of TeacherHead."
    )


def _sides(tap: Tap) -> str:
    return " × ".join(map(str, tap.size))


def _is_rectified(teacher: Model, value: str, context: Context) -> bool:
    """Whether a value is nowhere negative."""
    least: list[float] = []
    batches = _batches(teacher, context)
    teacher.adapter.observe(teacher.native, batches, [value], lambda _, array: least.append(float(array.min())))
    return min(least) >= 0


def _batches(model: Model, context: Context) -> list[tuple[Array, ...]]:
    """Training samples, where there are any."""
    if context.data is not None and context.data.has("train"):
        return first(context.data.split("train"), _SAMPLES)
    return [model.example]


def held_head(step: TeacherHead, student: Model) -> Company:
    """The company of a training of `student`, in which its last layer stays as it is."""
    head, stored = head_of(student, "student"), student.parameters()
    tensors = {name: np.array(stored[name]) for name in (head.weight, head.bias) if name is not None}
    return Company((step,), lambda updates: HeldWeights(tensors))


class HeldWeights(Companion):
    """Puts weights back after every optimiser step."""

    def __init__(self, tensors: Mapping[str, Array]) -> None:
        self.tensors = tensors

    def after(self, trainer: Trainer, rate: float, batch: Batch) -> None:
        """Put them back."""
        trainer.set_weights(self.tensors)
