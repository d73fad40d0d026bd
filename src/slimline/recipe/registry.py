"""The steps there are: every module of `slimline.steps` that has a ``handler``, and the entry points of other packages.

Nothing else lists steps. A handler (`slimline.steps.base.Handler`) is named after its config, which is what a recipe
says under ``step:``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module, metadata
from pkgutil import iter_modules
from typing import Any, Protocol

from slimline.basics.errors import SlimlineError, unknown
from slimline.recipe.step import Step

log = logging.getLogger(__name__)

GROUP = "slimline.steps"
_PACKAGE = "slimline.steps"


class Registered(Protocol):
    """What the registry knows of a handler."""

    config: type[Step]


@cache
def handlers() -> Mapping[str, Any]:
    """Every handler by the name of its step, sorted.

    Raises
    ------
    SlimlineError : another package registers what cannot be imported, is no handler, or has the name of a step that is
        there.
    """
    steps = {handler.config.__name__: handler for handler in _own()}
    for name, handler in _plugins():
        if name in steps:
            raise SlimlineError(f"Two packages register a step {name}: uninstall one of them.")
        steps[name] = handler
    return dict(sorted(steps.items()))


def handler(name: str) -> Any:
    """The handler of the step called `name`."""
    if name not in handlers():
        raise unknown("step", name, handlers())
    return handlers()[name]


def configs() -> dict[str, type[Step]]:
    """The config of every step by name."""
    return {name: registered.config for name, registered in handlers().items()}


def _own() -> Iterator[Registered]:
    for module in iter_modules(import_module(_PACKAGE).__path__):
        registered = getattr(import_module(f"{_PACKAGE}.{module.name}"), "handler", None)
        if registered is not None:
            yield registered


def _plugins() -> Iterator[tuple[str, Registered]]:
    for point in metadata.entry_points(group=GROUP):
        try:
            registered = point.load()
            name = registered.config.__name__
        except Exception as reason:
            raise SlimlineError(
                f"The step {point.name!r} of the package {point.dist.name if point.dist else point.value} cannot be "
                f"used ({type(reason).__name__}: {reason}): mend or uninstall it."
            ) from reason
        log.debug("step %s from %s", name, point.value)
        yield name, registered
