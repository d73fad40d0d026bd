"""What slimline has several of, found where it lies: modules of its own, and entry points of other packages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from importlib import import_module, metadata
from pkgutil import iter_modules
from typing import Any

from slimline.basics.errors import SlimlineError

log = logging.getLogger(__name__)


def registered(what: str, package: str, attribute: str, group: str, name: Callable[[Any], str]) -> Mapping[str, Any]:
    """By name: the object `attribute`, no function, of every module of `package` that has one, and behind them the
    entry points in `group`, each sorted.

    Parameters
    ----------
    what : one is called, for messages.
    name : of one.

    Raises
    ------
    SlimlineError : another package registers what cannot be imported, has no name, or the name of one that is there.
    """
    own = {name(each): each for each in _own(package, attribute)}
    return dict([*sorted(own.items()), *sorted(plugins(what, group, name, own).items())])


def plugins(what: str, group: str, name: Callable[[Any], str], taken: Collection[str]) -> dict[str, Any]:
    """By name, the entry points in `group`; see `registered`."""
    by_name: dict[str, Any] = {}
    for called, each in _plugins(what, group, name):
        if called in taken or called in by_name:
            raise SlimlineError(f"Two packages register a {what} {called}: uninstall one of them.")
        by_name[called] = each
    return by_name


def installed(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those of `packages` that are installed."""
    versions = {}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _own(package: str, attribute: str) -> Iterator[Any]:
    for module in iter_modules(import_module(package).__path__):
        each = getattr(import_module(f"{package}.{module.name}"), attribute, None)
        if each is not None and not callable(each):
            yield each


def _plugins(what: str, group: str, name: Callable[[Any], str]) -> Iterator[tuple[str, Any]]:
    for point in metadata.entry_points(group=group):
        try:
            each = point.load()
            called = name(each)
        except Exception as reason:
            raise SlimlineError(
                f"The {what} {point.name!r} of the package {point.dist.name if point.dist else point.value} cannot be "
                f"used ({type(reason).__name__}: {reason}): mend or uninstall it."
            ) from reason
        log.debug("%s %s from %s", what, called, point.value)
        yield called, each
