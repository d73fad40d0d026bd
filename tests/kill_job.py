"""A small but complete compression for a process of its own that dies at a chosen point: FRAMEWORK OUTPUT [CALL].

With CALL, the process kills itself at that call of the system that writes (from 1), in the middle of what it writes.
Without one it prints at the end how many there were. Clocks are replaced by hashes of what they would time, so that
all that is decided depends on nothing but the files; a run that is there already is resumed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import slimline as sl
from slimline.measure.figures import Latency
from tests import compress_job

STEPS = [
    sl.ChannelPruning(ratio=0.5),
    sl.Distillation(epochs=2, batch_size=512, refresh_batches=1),
    sl.StaticQuantization(samples=64),
]
CALLS = ("fsync", "write", "mkdir", "rename", "replace", "unlink", "rmdir", "ftruncate")


def timed(paths: Mapping[str, Path], rows: Any, batches: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """In place of `measure_latency`: milliseconds that only the artifact's bytes decide."""

    def of(path: Path, batch: int) -> Latency:
        digest = hashlib.sha256(Path(path).read_bytes()).digest()
        return Latency.of([1 + digest[0] / 100 + i / 1e4 for i in range(30)])

    return {name: {batch: of(path, batch) for batch in batches} for name, path in paths.items()}


def without_clocks() -> None:
    for name in ("run.proof", "search.fit", "steps.quantization.undo", "measure.latency", "measure.size"):
        import_module(f"slimline.{name}")
    from slimline.measure.size import Memory
    from slimline.runtimes.base import names, runtime

    for module in [m for name, m in sys.modules.items() if name.startswith("slimline")]:
        for attribute, fake in (
            ("measure_latency", timed),
            ("measure_memory", lambda *args, **kwargs: Memory(2, 1)),
        ):
            if attribute in vars(module):
                setattr(module, attribute, fake)
    for name in names():
        type(runtime(name)).profile = lambda self, *args: {}


def counted(die_at: int | None) -> list[int]:
    """Count the calls that write, and die in the one that is meant; the count."""
    count = [0]

    def wrapped(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == die_at:
                if name == "write":
                    with contextlib.suppress(OSError):
                        call(args[0], bytes(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return None if name == "fsync" else call(*args, **kwargs)  # a kill, unlike a power cut, loses no page

        return counting

    for name in CALLS:
        setattr(os, name, wrapped(name, getattr(os, name)))
    return count


def main(framework: str, output: str, call: str | None = None) -> None:
    model, data = compress_job.model(framework), compress_job.data(framework)
    without_clocks()
    count = counted(None if call is None else int(call))
    if (Path(output) / "journal.jsonl").exists():
        sl.resume(output, model, data)
    else:
        sl.compress(model, data, recipe=STEPS, budget=sl.Budget(max_drop=0.5), output=output, batch_sizes=(1,), seed=3)
    print(count[0], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
