"""Steps done to a model outside of any run, and what they would do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar, overload

from slimline.basics import arguments
from slimline.basics.arguments import takes
from slimline.basics.errors import SlimlineError
from slimline.data.data import is_data
from slimline.frameworks.device import device_name, on
from slimline.model.model import Model
from slimline.model.parts import PartedModel, is_any_model
from slimline.recipe import Step
from slimline.recipe.recipe import check_order
from slimline.recipe.step import are_steps
from slimline.recipe.training import Training
from slimline.report.console import telling
from slimline.steps.base import Context, Tell, handler_of, neighbours, perform
from slimline.steps.channels import parted
from slimline.training.teacher import teachers_for
from slimline.training.trial import try_augment

if TYPE_CHECKING:
    from slimline.data import Data
    from slimline.plans import AnyPlan
    from slimline.steps.channels.parted import PartedPlan

M = TypeVar("M", Model, PartedModel)


@takes(
    model=is_any_model,
    steps=are_steps,
    data=arguments.optional(is_data),
    target=arguments.optional(arguments.text),
    seed=arguments.seed,
    progress=arguments.progress,
    device=arguments.optional(device_name),
)
def apply(
    model: M,
    steps: Step | Sequence[Step],
    data: Data | None = None,
    *,
    target: str | None = None,
    seed: int = 0,
    progress: Tell | bool | None = None,
    teacher: Any = None,
    device: str | None = None,
) -> M:
    """A new model to which the steps were done, one after the other; `model` stays as it is.

    Parameters
    ----------
    data : needed by recovery, quantization and gradient criteria.
    target : the runtime that quantization is for; the framework's usual one by default.
    progress : as of `compress`.
    teacher : what training learns from, anything `load` takes, or a list of several, whose probabilities are averaged;
        by default the uncompressed model that `model` was made
        of, also by earlier calls. A model that was saved and loaded does not know it any more.
    device : where training, calibration and gradients are computed: ``cuda``, ``cuda:1``, ``mps`` or ``cpu``; by
        default what the environment variable ``SLIMLINE_DEVICE`` says, else the best there is.
    """
    sequence = (steps,) if isinstance(steps, Step) else tuple(steps)
    if isinstance(model, PartedModel):
        if teacher is not None:
            raise SlimlineError("A model by parts is not trained here: drop teacher=, and train its native module.")
        return parted.apply(model, sequence, seed)
    check_order_after(sequence, model, teacher)
    if data is not None:
        data = data.check(model.inputs)
        if any("train" in step.needs for step in sequence):
            try_augment(data)
    if len(sequence) > 1:
        check(sequence, model)
    tutor = teachers_for(model, teacher, sequence)
    with on(model.adapter, device), telling(progress) as tell:
        for position, step in enumerate(sequence):
            context = Context(
                tutor, data, target or model.usual_target, seed, *neighbours(sequence, position), tell=tell
            )
            model = perform(step, model, context).model
    return model


def check(steps: Sequence[Step], model: Model, target: str | None = None) -> None:
    """Refuse what `steps` could not do to `model`, or `target`, where it is known, could not hold; see `check` and
    `check_target` of `slimline.steps.base.Handler`."""
    for position, step in enumerate(steps):
        handler_of(step).check(step, model, steps[:position])
        if target is not None:
            handler_of(step).check_target(step, target, model)


@overload
def plan(
    model: Model, step: Step, data: Data | None = None, seed: int = 0, *, device: str | None = None
) -> AnyPlan: ...
@overload
def plan(
    model: PartedModel, step: Step, data: Data | None = None, seed: int = 0, *, device: str | None = None
) -> PartedPlan: ...
@takes(
    model=is_any_model,
    step=are_steps,
    data=arguments.optional(is_data),
    seed=arguments.seed,
    device=arguments.optional(device_name),
)
def plan(
    model: Model | PartedModel, step: Step, data: Data | None = None, seed: int = 0, *, device: str | None = None
) -> AnyPlan | PartedPlan:
    """What `step` removes from `model`, without removing it: a plan that can `mask` and `apply`.

    Parameters
    ----------
    step : a structural step.
    data : for criteria that measure.
    seed : of random choices.
    device : as of `apply`.

    Raises
    ------
    SlimlineError : for a step that has no plan, a glob that matches nothing, a goal out of reach, or missing data.
    """
    for part in model.parts.values() if isinstance(model, PartedModel) else (model,):
        part.check_float()
    if isinstance(model, PartedModel):
        return parted.plan_parts(model, step, seed)
    with on(model.adapter, device):
        return handler_of(step).plan(step, model, data, seed)


def check_order_after(steps: Sequence[Step], model: Model, teacher: Any) -> None:
    """Refuse an order that has no meaning after what was done to `model`, and training, or the compiling of it, where
    there is none."""
    learning = next((step.step for step in steps if step.needs_gradients), None)
    if learning and (reason := model.adapter.untrainable(model.native)):
        raise SlimlineError(
            f"{learning} needs gradients, but {reason}: leave it out (criteria of weights and activations, "
            "compensation, sparsity and quantization need none), or load the network in the framework, or on the "
            "backend, that trains it."
        )
    compiled = next((step.step for step in steps if isinstance(step, Training) and step.compiled), None)
    if compiled and (reason := model.adapter.uncompilable()):
        raise SlimlineError(f"{compiled} cannot be compiled, as {reason}: leave compiled out.")
    history = [str(entry.get("step")) for entry in model.history]
    quantized = model.quantization is not None
    check_order(steps, history, follows=bool(history) or quantized or teacher is not None, quantized=quantized)
