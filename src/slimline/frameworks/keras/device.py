"""Where TensorFlow computes: by default wherever it places operators itself, which is on its first GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import tensorflow as tf

from slimline.frameworks.device import choose

P = ParamSpec("P")
R = TypeVar("R")


class Placed(Protocol):
    """What remembers where it computes."""

    _wished: str | None


S = TypeVar("S", bound=Placed)


def device(wished: str | None) -> str:
    """The device that a wish means here, see `slimline.frameworks.device`; Apple's plug-in calls its GPU one too."""
    count = len(tf.config.list_physical_devices("GPU"))
    apple = sys.platform == "darwin"
    return choose(wished, {"cuda": 0 if apple else count, "mps": count if apple else 0, "cpu": 1})


def computing(wished: str | None) -> AbstractContextManager[Any]:
    """Compute on the device that a wish means; None leaves the choice to TensorFlow, operator by operator."""
    if wished is None:
        return nullcontext()
    kind, _, number = device(wished).partition(":")
    context: AbstractContextManager[Any] = tf.device("/CPU:0" if kind == "cpu" else f"/GPU:{number or 0}")
    return context


def placed(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Let a method compute where its object does."""

    @wraps(method)
    def run(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with computing(self._wished):
            return method(self, *args, **kwargs)

    return run
