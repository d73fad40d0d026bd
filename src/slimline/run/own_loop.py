"""Training in a loop of the user's own, in few bits or by a teacher: `prepare`, train what it gives, `convert`."""

from __future__ import annotations

from typing import Any

from slimline.basics import arguments
from slimline.basics.arguments import takes
from slimline.basics.errors import SlimlineError
from slimline.data import Data
from slimline.data.data import is_data
from slimline.model.model import Model, is_model
from slimline.recipe.step import Step, are_steps
from slimline.run.apply import check_order_after
from slimline.steps.base import Context, Prepared, handler_of
from slimline.training.teacher import teachers_for


@takes(model=is_model, step=are_steps, data=arguments.optional(is_data), seed=arguments.seed)
def prepare(
    model: Model,
    step: Step,
    data: Data | None = None,
    target: str | None = None,
    *,
    teacher: Any = None,
    seed: int = 0,
) -> Prepared:
    """What `step` would train, to be trained in a loop of your own; `convert` makes the result of it.

    ::

        prepared = sl.prepare(model, sl.QuantizationAwareTraining(weights="int4", activations="uint4"), data)
        net = prepared.native.train()
        for x, y in batches:
            optimizer.zero_grad(); loss(net(x), y).backward(); optimizer.step()
        small = sl.convert(prepared)

    Of a `Distillation` the network brings its loss with teacher, features and views: ``net.loss(x, y)`` gives it where
    the loop is written out, and ``fit`` of a framework that has one needs no other.

    Parameters
    ----------
    step : a `QuantizationAwareTraining` or a `Distillation`; what they say of optimisers and epochs is not used.
    data : with calibration (or training) samples, for activations; of a `Distillation` training samples and labels,
        which say what outputs mean.
    target : the runtime that the result is for; None takes the framework's usual one.
    teacher : as of `apply`.
    seed : of views, and of what features learn.

    Raises
    ------
    SlimlineError : what the step refuses, and a step that trains nothing in such a loop.
    """
    check_order_after((step,), model, teacher)
    if data is not None:
        data = data.check(model.inputs)
    tutor = teachers_for(model, teacher, (step,)) if teacher is not None or step.kind == "recovery" else None
    return handler_of(step).prepare(step, model, Context(tutor, data, target or model.usual_target, seed))


def _is_prepared(name: str, value: Any) -> None:
    if not isinstance(value, Prepared):
        raise SlimlineError(
            f"{name} is a {type(value).__name__}, not what slimline.prepare gave: train its native, and give it back."
        )


@takes(prepared=_is_prepared)
def convert(prepared: Prepared) -> Model:
    """The model, as `slimline.apply` would give it, of what `prepare` gave and you have trained.

    Parameters
    ----------
    prepared : may be trained on, and converted again.
    """
    return prepared.finish()
