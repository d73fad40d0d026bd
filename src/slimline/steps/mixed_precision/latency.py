"""Formats of least error within a latency: the runtime's own profile says what a layer costs, and the clock whether the
sum is right."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from slimline.basics.errors import SlimlineError
from slimline.files.decisions import checked
from slimline.methods.factorization import allocate
from slimline.runtimes.base import names, runtime
from slimline.steps.base import Context
from slimline.steps.clock import Candidates, spent_by
from slimline.steps.mixed_precision.choose import Option
from slimline.steps.quantization.undo import Artifacts

_log = logging.getLogger(__name__)
_ROUNDS = 5  # choices that are timed, at most
_MARGIN = 0.98  # of what a choice is allowed to take once the clock has spoken against one


class Timed(BaseModel):
    """What the clock said: the options by number, the part of the float latency that they take together, and how many
    choices were timed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    options: dict[str, int]
    latency: float
    timed: int


def check_profile(target: str) -> None:
    """Refuse a target that cannot tell here what a layer costs."""
    if "profile" not in runtime(target).abilities:
        others = " or ".join(name for name in names() if "profile" in runtime(name).abilities)
        raise SlimlineError(
            f"{target} does not tell here what a layer costs: give max_size instead of max_latency, or choose the "
            f"target {others}."
        )


def within_latency(
    artifacts: Artifacts, every: Mapping[str, Sequence[Option]], part: float, context: Context
) -> tuple[dict[str, Option], Timed]:
    """By layer the format, together of least error within a `part` of the float latency; and what the clock said.

    Raises
    ------
    SlimlineError : a target that cannot be timed or profiled, or a part that no choice is within, with the least.
    """
    check_profile(artifacts.target)
    with tempfile.TemporaryDirectory(prefix="slimline-latency-") as folder:
        artifacts.folder = Path(folder)
        answer = context.decide("mixed-latency", lambda: choose(artifacts, every, part, context.seed))
    timed = checked(Timed, answer, "what the clock said of formats")
    return {layer: options[timed.options[layer]] for layer, options in every.items()}, timed


def choose(artifacts: Candidates, every: Mapping[str, Sequence[Option]], part: float, seed: int = 0) -> dict[str, Any]:
    """The fields of `Timed`."""
    from slimline.measure import latency_part

    layers, (integer, float_) = list(every), artifacts.profiles()
    if not integer or not float_:
        raise SlimlineError(
            f"{artifacts.target} does not tell what a layer costs: give max_size instead of max_latency."
        )
    whole = sum(float_.values())
    short, long = spent_by(layers, integer), spent_by(layers, float_)
    rest = sum(integer.values()) - sum(short.values())
    costs = [[long[x] if o.format == "float32" else short[x] for o in every[x]] for x in layers]
    errors = [[option.error for option in every[x]] for x in layers]
    fastest = sum(map(min, costs))
    limit, least = part * whole - rest, float("inf")
    for number in range(1, _ROUNDS + 1):
        # Where the profile sees no choice, the clock is asked of the fastest one.
        picked = allocate(costs, errors, max(limit, fastest))
        assert picked is not None
        floating = tuple(x for x, k in zip(layers, picked, strict=True) if every[x][k].format == "float32")
        times = artifacts.times({"float": artifacts.path(None), "mixed": artifacts.path(floating)})
        taken = latency_part(times["float"], times["mixed"], seed).value
        _log.info("%d layers in float take %.3g of the float latency", len(floating), taken)
        if taken <= part:
            return {"options": dict(zip(layers, picked, strict=True)), "latency": taken, "timed": number}
        least = min(least, taken)
        if limit <= fastest:
            break
        limit = (limit + rest) * _MARGIN * part / taken - rest
    raise SlimlineError(
        f"No choice of formats is within max_latency={part:.3g} on {artifacts.target}: {least:.3g} of the float "
        "latency was the least; raise it, or prune first."
    )
