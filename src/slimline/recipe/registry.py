"""The steps there are: every module of `slimline.steps` that has a ``handler``, and the entry points of other packages.

Nothing else lists steps. A handler (`slimline.steps.base.Handler`) is named after its config, which is what a recipe
says under ``step:``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from slimline.basics.errors import unknown
from slimline.basics.plugins import registered
from slimline.recipe.step import Step

GROUP = "slimline.steps"


@cache
def handlers() -> Mapping[str, Any]:
    """Every handler by the name of its step, sorted.

    Raises
    ------
    SlimlineError : another package registers what cannot be imported, is no handler, or has the name of a step that is
        there.
    """
    return registered("step", "slimline.steps", "handler", GROUP, lambda handler: handler.config.__name__)


def handler(name: str) -> Any:
    """The handler of the step called `name`."""
    if name not in handlers():
        raise unknown("step", name, handlers())
    return handlers()[name]


def configs() -> dict[str, type[Step]]:
    """The config of every step by name."""
    return {name: registered.config for name, registered in handlers().items()}
