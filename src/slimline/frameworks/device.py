"""Where training, calibration and gradients are computed: one setting that the public calls make and adapters read.

The setting is ambient (a context variable) and no argument: between ``sl.compress(device=)`` and the few places that
compute lie some thirty functions of steps, plans and searches, none of which decides anything by it, and all of which
other packages may add to. What computes (`TorchTrainer`, `observe`, `gradients`) takes its device as a plain argument,
which only the adapters fill in from here, so each is tested without any setting.

A *wish* is what a user says (``cuda``, ``cuda:1``, ``mps``, ``cpu``, or None for the best there is), a *device* what an
adapter makes of it here (``cuda:0``, ``mps``, ``cpu``). Artifacts are measured where their target runs them, and models
lie on the CPU before and after.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from slimline.basics.errors import SlimlineError

if TYPE_CHECKING:
    from slimline.frameworks.base import Adapter

KINDS = ("cuda", "mps", "cpu")
"""From the best to what is always there."""
VARIABLE = "SLIMLINE_DEVICE"
"""The environment variable that says what is wished where a call says nothing."""

_TITLES = {"cuda": "CUDA", "mps": "MPS"}
_NAME = re.compile(r"cuda(:(0|[1-9][0-9]{0,2}))?|mps|cpu")
_wish: ContextVar[str | None] = ContextVar("slimline_device", default=None)


def device_name(name: str, value: Any) -> None:
    """A device, whether there is one or not; `name` is what the argument is called."""
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise SlimlineError(f"{name} is {str(value)[:40]!r}: give cpu, mps, cuda or, by its number, cuda:1.")


def wish() -> str | None:
    """What the public call that runs now was told, else what the environment says; None for the best there is."""
    wished = _wish.get()
    if wished is None and (stated := os.environ.get(VARIABLE)):
        device_name(VARIABLE, stated)
        wished = stated
    return wished


@contextmanager
def using(name: str | None) -> Iterator[None]:
    """Let adapters compute on the device called `name` meanwhile; None leaves what is wished already."""
    token = _wish.set(_wish.get() if name is None else name)
    try:
        yield
    finally:
        _wish.reset(token)


@contextmanager
def on(adapter: Adapter, name: str | None) -> Iterator[None]:
    """The same, where a device that is wished and that `adapter` does not find is refused before work.

    Where none is wished, or the CPU, nothing is asked: to find devices, ONNX would import PyTorch, which its
    quantization does without.

    Raises
    ------
    SlimlineError : it is not there.
    """
    with using(name):
        if (wished := wish()) not in (None, "cpu"):
            adapter.device(wished)
        yield


def choose(wished: str | None, counts: Mapping[str, int]) -> str:
    """The device that a wish means, of those that there are.

    Parameters
    ----------
    counts : how many devices of each of `KINDS` a framework finds here.

    Raises
    ------
    SlimlineError : it is not there.
    """
    if wished is None:
        wished = next(kind for kind in KINDS if kind == "cpu" or counts.get(kind))
    device_name("device", wished)
    kind, _, number = wished.partition(":")
    if kind == "cpu":
        return kind
    count = counts.get(kind, 0)
    if not count:
        raise SlimlineError(f"There is no {_TITLES[kind]} device here: leave device out, or choose cpu.")
    if int(number or 0) >= count:
        last = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise SlimlineError(f"There is no {wished} here: choose {last}, or leave device out.")
    return kind if kind == "mps" else f"{kind}:{int(number or 0)}"
