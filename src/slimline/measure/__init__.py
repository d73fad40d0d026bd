"""Measurement of artifacts, in fresh processes, and the certificate of what was lost.

Only names live here; each is imported when first used. (The function `parity` is in the module of that name.)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimline.measure.accuracy import agreement, correct, outputs, score, scored
    from slimline.measure.certificate import Certificate, certify
    from slimline.measure.figures import Figures, Latency
    from slimline.measure.latency import Speedup, latency_part, measure_latency, median_amount, speedup
    from slimline.measure.limits import Amount, Cost, Limit, Part, Trial
    from slimline.measure.parity import Parity
    from slimline.measure.process import Worker
    from slimline.measure.results import LayerRow, LayerState, Report, environment
    from slimline.measure.size import Memory, file_bytes, measure_memory, memory_part

_HOMES = {
    "agreement": "accuracy",
    "correct": "accuracy",
    "outputs": "accuracy",
    "score": "accuracy",
    "scored": "accuracy",
    "Certificate": "certificate",
    "certify": "certificate",
    "Speedup": "latency",
    "latency_part": "latency",
    "measure_latency": "latency",
    "median_amount": "latency",
    "speedup": "latency",
    "Amount": "limits",
    "Cost": "limits",
    "Limit": "limits",
    "Part": "limits",
    "Trial": "limits",
    "Parity": "parity",
    "Worker": "process",
    "Figures": "figures",
    "Latency": "figures",
    "LayerRow": "results",
    "LayerState": "results",
    "Report": "results",
    "environment": "results",
    "Memory": "size",
    "file_bytes": "size",
    "measure_memory": "size",
    "memory_part": "size",
}

__all__ = [
    "Amount",
    "Certificate",
    "Cost",
    "Figures",
    "Latency",
    "LayerRow",
    "LayerState",
    "Limit",
    "Memory",
    "Parity",
    "Part",
    "Report",
    "Speedup",
    "Trial",
    "Worker",
    "agreement",
    "certify",
    "correct",
    "environment",
    "file_bytes",
    "latency_part",
    "measure_latency",
    "measure_memory",
    "median_amount",
    "memory_part",
    "outputs",
    "score",
    "scored",
    "speedup",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
