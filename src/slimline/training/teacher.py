"""Which network training learns from: the uncompressed one that a model was made of, or another that the user names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import Array, adapter_for
from slimline.model import Model
from slimline.model.parts import PartedModel
from slimline.recipe import Step, Training

UNKNOWN = (
    "has been compressed before, and what it was made of is not known, as files do not hold it: name the network to "
    "learn from with teacher= (--teacher), such as the uncompressed model"
)
_PADDED = tuple(2**n for n in range(3, 11))
"""Multiples to which tables of words are padded."""

Teacher = Model | tuple[Model, ...] | None
"""What training learns from: one network, several, or none."""


def every_teacher(teacher: Teacher) -> tuple[Model, ...]:
    """All of them."""
    if isinstance(teacher, tuple):
        return teacher
    return () if teacher is None else (teacher,)


def teachers_for(student: Model, named: Any, steps: Sequence[Step]) -> Teacher:
    """What `teacher_for` gives; of a list or tuple of several that are named, each."""
    if not isinstance(named, list | tuple):
        return teacher_for(student, named, steps)
    if not named:
        raise SlimlineError("teacher= is empty: name one or several networks to learn from, or leave it out.")
    return tuple(model for each in named if (model := teacher_for(student, each, steps)) is not None)


def teacher_for(student: Model, named: Any, steps: Sequence[Step]) -> Model | None:
    """The model that training in `steps` learns from; None where none of them does.

    Parameters
    ----------
    student : what the steps are done to.
    named : the user's `Model`, a model of a framework or a path; None takes the model that `student` was made of.

    Raises
    ------
    SlimlineError : no teacher is known where one is needed, one is named that nothing learns from, or one whose
        framework, inputs or outputs are not the student's.
    """
    learning = [step for step in steps if isinstance(step, Training)]
    if learning and not student.graph.learning:
        raise SlimlineError(
            f"{learning[0].step} has nothing to train, as all weights are frozen: set requires_grad or trainable to "
            "True for those that may change before slimline.load."
        )
    if named is None and not learning:
        return None
    if named is None:
        known = student.uncompressed
        if known is None and (needs := next((s.step for s in learning if s.learns_from_teacher), None)):
            raise SlimlineError(f"{needs} learns from the uncompressed network, but this model {UNKNOWN}.")
        return known
    if not learning:
        raise SlimlineError("No step learns from a teacher: drop teacher= (--teacher), or add a Distillation step.")
    teacher = _loaded(student, named)
    _check(student, teacher)
    return teacher


def fingerprint(model: Model) -> str:
    """SHA-256 of all stored tensors, with their names, in hex."""
    digest = hashlib.sha256()
    for name, array in sorted(model.parameters().items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _loaded(student: Model, named: Any) -> Model:
    from slimline.model.loading import load

    if isinstance(named, list | tuple):
        raise SlimlineError("A run learns from one teacher: name one, or use slimline.apply, which takes several.")
    if isinstance(named, PartedModel):
        raise SlimlineError("A model by parts cannot teach: name a model that is captured whole.")
    if not isinstance(named, Model | str | Path):
        _same_framework(student, adapter_for(named).name)
    teacher = load(named, None if isinstance(named, Model) else student.example)
    _same_framework(student, teacher.framework)
    return teacher


def _same_framework(student: Model, framework: str) -> None:
    if framework != student.framework:
        raise SlimlineError(
            f"A {student.framework} student cannot learn from a {framework} teacher: load both in one framework."
        )


def _check(student: Model, teacher: Model) -> None:
    """Refuse a teacher that does not answer the student's inputs with outputs of the student's shape, or that knows
    other words."""
    own_words, words = _vocabularies(student), _vocabularies(teacher)
    for position in own_words.keys() & words.keys():
        few, many = sorted((own_words[position], words[position]))
        if few != many and not any(many == -(-few // size) * size for size in _PADDED):
            raise SlimlineError(
                f"The student's input {student.graph.inputs[position]!r} names one of {own_words[position]} tokens and "
                f"the teacher's one of {words[position]}: name a teacher of the same tokeniser."
            )
    try:
        answers = teacher.outputs(*student.example)
    except Exception as reason:  # each framework has its own ways of not taking inputs
        raise SlimlineError(
            f"The teacher takes inputs {_shapes(teacher.example)} and the student {_shapes(student.example)}: "
            "name a teacher for the student's inputs."
        ) from reason
    own = student.outputs(*student.example)
    shapes, taught = (_shapes(each, dtypes=False) for each in (own, answers))
    if shapes != taught:
        raise SlimlineError(
            f"The teacher's outputs {taught} and the student's {shapes} differ in shape: "
            "name a teacher of the same outputs, such as the same classes."
        )
    if obstacle := teacher.adapter.untrainable(teacher.native):
        raise SlimlineError(f"The teacher is to answer beside the student, but {obstacle}: name another teacher.")
    if not all(np.isfinite(array).all() for array in answers):
        raise SlimlineError("The teacher answers the example inputs with NaN or infinity: name one that is trained.")


def _vocabularies(model: Model) -> dict[int, int]:
    """By position of an input that is looked up in a table, how many rows that has."""
    graph = model.graph
    sources = {name: position for position, name in enumerate(graph.inputs)}
    for node in graph.nodes:
        if node.attributes.get("function") == "identity" and node.inputs[0] in sources:  # such as a cast
            sources[node.outputs[0]] = sources[str(node.inputs[0])]
    tables = [node for node in graph.nodes if node.kind == "embedding" and node.inputs[0] in sources]
    return {sources[str(node.inputs[0])]: graph.values[str(node.inputs[1])].shape[0] for node in reversed(tables)}


def _shapes(arrays: Sequence[Array], dtypes: bool = True) -> str:
    return ", ".join(f"{a.dtype if dtypes else ''}{a.shape[1:]}" for a in arrays)
