"""How much room an artifact takes: on disk, and in memory while it runs."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.measure.limits import Part
from slimline.measure.process import Artifact, Worker, save, tile
from slimline.runtimes.base import files_of


def file_bytes(artifact: Path) -> int:
    """Bytes of all files of an artifact."""
    if not artifact.exists():
        raise SlimlineError(f"There is no artifact at {artifact}: check the path.")
    return sum(file.stat().st_size for file in files_of(artifact))


@dataclass(frozen=True)
class Memory:
    """Resident memory of a process that loads one artifact and runs it.

    Attributes
    ----------
    peak_bytes : the most that was resident, Python and the runtime's libraries included; None where unknown.
    baseline_bytes : what was resident before the runtime and the artifact were loaded.
    """

    peak_bytes: int | None
    baseline_bytes: int | None


def measure_memory(
    artifact: Path | Artifact, inputs: tuple[np.ndarray, ...], batch: int = 1, threads: int = 1
) -> Memory:
    """Load `artifact` in a process of its own, run one batch of real rows three times, and read the peak (VmHWM)."""
    with tempfile.TemporaryDirectory(prefix="slimline-inputs-") as folder, Worker(artifact, threads) as worker:
        worker.time(save(Path(folder), tile(inputs, batch)), repeats=3)
        return Memory(*worker.memory())


def memory_part(before: Memory, after: Memory) -> Part | None:
    """The peak of the whole process that runs `after`, in parts of that of `before`; None where it is unknown.

    It is one reading without an interval. The interpreter and the runtime's libraries are in both peaks.
    """
    if before.peak_bytes is None or after.peak_bytes is None:
        return None
    return Part.exact(after.peak_bytes, before.peak_bytes, "B")
