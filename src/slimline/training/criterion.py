"""The loss of a distillation between outputs, for a training loop of one's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from slimline.basics.errors import SlimlineError
from slimline.frameworks.base import adapter_of_tensor
from slimline.methods.distillation import joint, joint_teacher
from slimline.methods.outputs import Output
from slimline.recipe.training import Training


class DistillationLoss:
    """``loss(student, teacher, labels)`` of the framework's own tensors, with gradients.

    Parameters
    ----------
    step : whose ``loss``, ``temperature``, ``alpha`` and ``beta`` it takes, such as a `Distillation`.
    output : what the outputs mean; classes on their last axis by default, and of images on that of their channels.

    Raises
    ------
    SlimlineError : `step` is none that trains, or compares features, which are inside the networks.
    """

    def __init__(self, step: Training, output: Output | None = None) -> None:
        if not isinstance(step, Training):
            raise SlimlineError(f"step is a {type(step).__name__}: give one that trains, such as a Distillation.")
        if step.features:
            raise SlimlineError(
                "Features are inside the networks, and this loss sees outputs: leave features out, or take "
                "what slimline.prepare gives."
            )
        self.step, self.output = step, output

    def __call__(self, student: Any, teacher: Any, labels: Any | None = None) -> Any:
        """The loss, a scalar tensor.

        Parameters
        ----------
        student : raw outputs (logits), ``(batch, …)``.
        teacher : the teacher's, of the same shape, without gradients; several teachers' in a list.
        labels : class numbers, or of the outputs' shape where these are no classes; None has none.

        Raises
        ------
        SlimlineError : outputs of different shapes.
        """
        step, teachers = self.step, teacher if isinstance(teacher, list | tuple) else [teacher]
        adapter = adapter_of_tensor(student)
        for each in teachers:
            if tuple(each.shape) != tuple(student.shape):
                raise SlimlineError(
                    f"The student's outputs are {tuple(student.shape)} and the teacher's {tuple(each.shape)}: they "
                    "must have the same classes."
                )
        inside = adapter.layout == "channels_first" and len(student.shape) > 3
        output = self.output or Output("classes", axis=1 if inside else len(student.shape) - 1)
        outputs = [replace(output, shape=tuple(student.shape), labelled=labels is not None)]
        xp = adapter.namespace
        taught = joint_teacher(xp, step.loss, outputs, [[each] for each in teachers], step.temperature)
        settings = {"temperature": step.temperature, "alpha": step.alpha, "beta": step.beta}
        return joint(xp, step.loss, outputs, [student], taught, [labels], **settings)
