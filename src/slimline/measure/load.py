"""How busy others kept the machine while something ran: what can be seen where no thread's waiting can be counted."""

from __future__ import annotations

import os
from collections.abc import Callable
from time import monotonic
from typing import TypeVar

from slimline.measure.figures import BUSY

T = TypeVar("T")


def watched(work: Callable[[], T]) -> tuple[T, float]:
    """What `work` gives, and the part of the machine's cores that processes of others used meanwhile, in [0, 1]."""
    before, start = _others(), monotonic()
    result = work()
    cores = os.cpu_count() or 1
    return result, min(1.0, max(0.0, (_others() - before) / max(1e-9, (monotonic() - start) * cores)))


def busy(others: float) -> str:
    """The sentence for a machine of which others used that part, where it is reason for doubt; else empty."""
    if others <= BUSY:
        return ""
    return (
        f"The machine was busy: other processes used {others:.0%} of its cores while latency was measured, which is "
        "not taken off: measure again while nothing else runs."
    )


def _others() -> float:
    """Seconds of all cores that were spent on others than this process and its children that have ended."""
    import psutil

    spent = psutil.cpu_times()
    own = os.times()
    everything = sum(getattr(spent, kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq", "steal"))
    return everything - (own.user + own.system + own.children_user + own.children_system)
