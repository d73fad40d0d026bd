"""Training in few bits in a loop of the user's own: `prepare`, train what it gives, `convert`."""

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


@takes(model=is_model, step=are_steps, data=arguments.optional(is_data))
def prepare(model: Model, step: Step, data: Data | None = None, target: str | None = None) -> Prepared:
    """What `step` would train, to be trained in a loop of your own; `convert` makes the result of it.

    ::

        prepared = sl.prepare(model, sl.QuantizationAwareTraining(weights="int4", activations="uint4"), data)
        net = prepared.native.train()
        for x, y in batches:
            optimizer.zero_grad(); loss(net(x), y).backward(); optimizer.step()
        small = sl.convert(prepared)

    Parameters
    ----------
    step : a `QuantizationAwareTraining`; what it says of training is not used.
    data : with calibration (or training) samples, for activations.
    target : the runtime that the result is for; None takes the framework's usual one.

    Raises
    ------
    SlimlineError : what the step refuses, and a step that trains nothing in such a loop.
    """
    check_order_after((step,), model, None)
    if data is not None:
        data = data.check(model.inputs)
    return handler_of(step).prepare(step, model, Context(None, data, target or model.usual_target))


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
