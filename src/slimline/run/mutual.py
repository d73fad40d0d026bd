"""Students that teach each other, outside of any run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slimline.basics import arguments
from slimline.basics.arguments import takes
from slimline.basics.errors import SlimlineError
from slimline.data.data import is_data
from slimline.frameworks.device import device_name, on
from slimline.model.model import Model, is_model
from slimline.recipe.training import Training
from slimline.report.console import telling
from slimline.steps.base import Tell
from slimline.training.mutual import learn_together
from slimline.training.trial import try_augment

if TYPE_CHECKING:
    from slimline.data import Data


def _are_students(name: str, value: Any) -> None:
    """Refuse what is no list of models; see `slimline.basics.arguments.takes`."""
    if not isinstance(value, Sequence):
        raise SlimlineError(f"{name} is a {type(value).__name__}: give a list of slimline models.")
    for each in value:
        is_model(f"One of {name}", each)


def _is_training(name: str, value: Any) -> None:
    """Refuse what is no step that trains; see `slimline.basics.arguments.takes`."""
    if not isinstance(value, Training):
        raise SlimlineError(f"{name} is a {type(value).__name__}: give one that trains, such as slimline.Distillation.")


@takes(
    students=_are_students,
    step=_is_training,
    data=is_data,
    seed=arguments.seed,
    progress=arguments.progress,
    device=arguments.optional(device_name),
)
def mutual(
    students: Sequence[Model],
    step: Training,
    data: Data,
    *,
    seed: int = 0,
    progress: Tell | bool | None = None,
    device: str | None = None,
) -> list[Model]:
    """Networks that were trained together, each towards the mean of the others as they are at every step and towards
    the labels (deep mutual learning; Zhang et al. 2018, arXiv:1706.00384); of each its best epoch.

    Parameters
    ----------
    students : two or more of one framework, inputs and outputs; they stay as they are.
    step : how they are trained, such as ``Distillation(alpha=0.5, temperature=1)``; without features, means of weights,
        early stop and plateau.
    seed, progress, device : as of `apply`.

    Raises
    ------
    SlimlineError : students that do not fit together, or settings for one student alone.
    """
    if not students:
        raise SlimlineError("Mutual learning is among several students, and there are none: give two.")
    for student in students:
        student.check_float()
        if reason := student.adapter.untrainable(student.native):
            raise SlimlineError(f"A student needs gradients, but {reason}: give others.")
    data = data.check(students[0].inputs)
    try_augment(data)
    with on(students[0].adapter, device), telling(progress) as tell:
        return [each.model for each in learn_together(students, step, data, seed, tell)]
