"""One artifact in numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from slimline.basics import text

BUSY = 0.1  # part of the time spent waiting for a core from which a figure is to be doubted

Count = Annotated[int, Field(ge=0)]
Milliseconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Latency(BaseModel):
    """Milliseconds a batch: median, 10th and 90th percentile, and every sample in the order of the rounds.

    `waited` is the part of the wall-clock time in which other processes had the core; it is not in the samples. None
    where it is not known, and the samples are plain wall-clock time.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    median_ms: Milliseconds
    p10_ms: Milliseconds
    p90_ms: Milliseconds
    samples_ms: tuple[Milliseconds, ...]
    waited: Annotated[float, Field(ge=0, le=1)] | None = None

    @classmethod
    def of(cls, samples_ms: Iterable[float], waited: float | None = None) -> Latency:
        """From the samples, at least one."""
        samples = tuple(samples_ms)
        p10, median, p90 = (float(q) for q in np.quantile(samples, [0.1, 0.5, 0.9]))
        return cls(median_ms=median, p10_ms=p10, p90_ms=p90, samples_ms=samples, waited=waited)

    @property
    def busy(self) -> bool:
        """Whether others had the core for so long that the figures are to be doubted."""
        return self.waited is not None and self.waited > BUSY

    def __str__(self) -> str:
        busy = f", waited for a core {self.waited:.0%} of the time" if self.waited is not None and self.busy else ""
        spread = f"p10 to p90 {self.p10_ms:.3g} to {self.p90_ms:.3g}"
        return f"{self.median_ms:.3g} ms ({spread}, {len(self.samples_ms)} samples{busy})"

    def __repr__(self) -> str:
        return f"<Latency {self}>"


class Figures(BaseModel):
    """One artifact in numbers; None is "not measured".

    Attributes
    ----------
    accuracy : mean score on the certification split, of the metric the certificate names.
    file_bytes : of the artifact.
    parameters : stored numbers that training changes.
    macs : multiply-accumulates for one sample.
    integer_macs : part of them that the runtime executes on integers.
    peak_memory_bytes : most resident memory of a process that loads and runs it, interpreter and libraries included.
    baseline_memory_bytes : resident before the runtime and the artifact were loaded.
    latency : by batch size.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    accuracy: Annotated[float, Field(allow_inf_nan=False)] | None = None
    file_bytes: Count | None = None
    parameters: Count | None = None
    macs: Count | None = None
    integer_macs: Annotated[float, Field(ge=0, le=1)] | None = None
    peak_memory_bytes: Count | None = None
    baseline_memory_bytes: Count | None = None
    latency: dict[Annotated[int, Field(ge=1)], Latency] = {}

    def __str__(self) -> str:
        parts = [] if self.accuracy is None else [f"mean score {self.accuracy:.4g}"]
        parts += [] if self.file_bytes is None else [f"file {text.bytes_(self.file_bytes)}"]
        parts += [] if self.parameters is None else [f"{text.count(self.parameters)} parameters"]
        parts += [] if self.macs is None else [f"{text.count(self.macs)} MACs a sample"]
        parts += [] if self.integer_macs is None else [f"{self.integer_macs:.0%} of them in integers"]
        parts += [f"{v.median_ms:.3g} ms at batch {batch}" for batch, v in sorted(self.latency.items())]
        parts += [] if self.peak_memory_bytes is None else [f"peak memory {text.bytes_(self.peak_memory_bytes)}"]
        return ", ".join(parts) or text.NOT_MEASURED

    def __repr__(self) -> str:
        return f"<Figures {self}>"
