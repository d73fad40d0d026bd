"""``report.json``: what a run found, in a versioned, stable form; and the machine it was found on."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from slimline.measure.certificate import Certificate
from slimline.measure.limits import Limit, Trial
from slimline.measure.parity import Parity


class Latency(BaseModel):
    """Milliseconds a batch: median, 10th and 90th percentile, and every sample in the order of the rounds.

    `waited` is the part of the wall-clock time in which other processes had the core; it is not in the samples. None
    where it is not known, and the samples are plain wall-clock time.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    median_ms: float
    p10_ms: float
    p90_ms: float
    samples_ms: tuple[float, ...]
    waited: float | None = None

    @classmethod
    def of(cls, samples_ms: Iterable[float], waited: float | None = None) -> Latency:
        """From the samples, at least one."""
        samples = tuple(samples_ms)
        p10, median, p90 = (float(q) for q in np.quantile(samples, [0.1, 0.5, 0.9]))
        return cls(median_ms=median, p10_ms=p10, p90_ms=p90, samples_ms=samples, waited=waited)


class Figures(BaseModel):
    """One artifact in numbers; None is "not measured".

    Attributes
    ----------
    accuracy : mean score on the certification split, of the metric the certificate names.
    file_bytes : of the artifact.
    parameters : stored numbers that training changes.
    macs : multiply-accumulates for one sample.
    peak_memory_bytes : most resident memory of a process that loads and runs it, interpreter and libraries included.
    baseline_memory_bytes : resident before the runtime and the artifact were loaded.
    latency : by batch size.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    accuracy: float | None = None
    file_bytes: int | None = None
    parameters: int | None = None
    macs: int | None = None
    peak_memory_bytes: int | None = None
    baseline_memory_bytes: int | None = None
    latency: dict[int, Latency] = {}


class LayerState(BaseModel):
    """One layer: shape of its weight, parameters, multiply-accumulates for one sample, output channels, and the part of
    its weight that is zero."""

    model_config = ConfigDict(frozen=True, extra="allow")

    shape: tuple[int, ...] | None = None
    parameters: int | None = None
    macs: int | None = None
    width: int | None = None
    sparsity: float | None = None


class LayerRow(BaseModel):
    """One layer before and after; `after` is None if it was removed."""

    model_config = ConfigDict(frozen=True, extra="allow")

    layer: str
    kind: str
    before: LayerState
    after: LayerState | None
    precision: Literal["float", "int8"] = "float"
    note: str = ""


class Refusal(BaseModel):
    """A step, layer or wish that was refused or undone, and why."""

    model_config = ConfigDict(frozen=True, extra="allow")

    what: str
    reason: str


class Frozen(BaseModel):
    """A unit that could not be pruned, and why."""

    model_config = ConfigDict(frozen=True, extra="allow")

    unit: str
    reason: str


class Report(BaseModel):
    """The whole of ``report.json``, schema 1. Fields may be added, never renamed; unknown ones are kept.

    `limits` says of every limit on latency, size and MACs what became of it, `unmet` in words those that were missed;
    `trials` is all that was tried in order to decide.
    """

    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True, serialize_by_alias=True)

    version: Literal[1] = Field(1, alias="schema")
    target: str
    original: Figures
    compressed: Figures
    certificate: Certificate
    parity: Parity
    refused: tuple[Refusal, ...] = ()
    unmet: tuple[str, ...] = ()
    limits: tuple[Limit, ...] = ()
    trials: tuple[Trial, ...] = ()
    frozen: tuple[Frozen, ...] = ()
    steps: tuple[dict[str, Any], ...] = ()
    layers: tuple[LayerRow, ...] = ()
    history: tuple[dict[str, Any], ...] = ()
    command: tuple[str, ...] | None = None
    recipe: str = ""
    environment: dict[str, Any] = {}

    def to_json(self) -> str:
        """The file's text; NaN never occurs in it."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """What `to_json` wrote."""
        return cls.model_validate_json(text)


# fmt: off
_PACKAGES = (
    "slimline", "numpy", "scipy", "torch", "tensorflow", "tensorflow-cpu", "keras", "onnx", "onnxscript",
    "onnxruntime", "openvino", "ai-edge-litert", "ai-edge-quantizer", "safetensors", "pydantic", "scikit-learn",
)
_FLAGS = (
    "avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_int8",
    "amx_bf16", "asimddp", "i8mm", "sve",
)

_SETTINGS = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENBLAS_CORETYPE", "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA", "KERAS_BACKEND", "TF_ENABLE_ONEDNN_OPTS", "LD_PRELOAD", "MALLOC_ARENA_MAX",
)
# fmt: on


def environment(threads: int = 1) -> dict[str, Any]:
    """The machine and the software, as far as they decide what was measured.

    Keys: ``cpu``, ``cpu_flags`` (those that decide which kernels run), ``cores`` (that this process may use),
    ``memory_bytes``, ``system``, ``python``, ``packages`` (versions of those installed), ``threads`` (of the runtimes),
    ``settings`` (environment variables that change kernels or threads), ``slimline``.
    """
    import psutil

    model, flags = _cpu()
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": model,
        "cpu_flags": [f for f in _FLAGS if f in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": packages,
        "threads": threads,
        "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
        "slimline": packages.get("slimline"),
    }


def _cpu() -> tuple[str, frozenset[str]]:
    """The processor's name, and its flags where the system tells them."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine(), frozenset()
    pairs = [line.split(":", 1) for line in info.read_text().splitlines() if ":" in line]
    facts = {key.strip(): value.strip() for key, value in reversed(pairs)}
    flags = frozenset((facts.get("flags") or facts.get("Features") or "").split())
    return facts.get("model name", platform.machine()), flags
