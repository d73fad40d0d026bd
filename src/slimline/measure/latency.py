"""Latency of artifacts, side by side: each alive in a process of its own, timed in interleaved rounds."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import numpy as np

from slimline.basics.errors import SlimlineError
from slimline.measure.figures import Latency
from slimline.measure.limits import Amount, Part
from slimline.measure.process import Artifact, Timing, Worker, save, tile

_log = logging.getLogger(__name__)

_SHORTEST_SAMPLE = 1e-3  # seconds; shorter ones measure the clock and the loop
_CACHES_MATTER = 0.05  # seconds; a longer run fills its caches on its own account
_WARM_UP = 0.1  # seconds, and at least three runs


def measure_latency(
    artifacts: Mapping[str, Path | Artifact],
    inputs: tuple[np.ndarray, ...],
    batches: Sequence[int] = (1, 32),
    threads: int = 1,
    seconds: float = 1.0,
    min_samples: int = 30,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> dict[str, dict[int, Latency]]:
    """Time every artifact at every batch size on the same real rows.

    All processes stay alive and idle while one of them runs. In each round every artifact gives one sample, in an order
    shuffled anew, so drift of the machine hits all alike and the samples of a round are pairs. A sample is the mean of
    as many runs as last a millisecond; runs that warm up the process, or its caches after the others' turn, are not
    counted. With one thread on Linux, neither is time in which another process had the core; `Latency.waited` says
    how much that was.

    Parameters
    ----------
    artifacts : files by name.
    inputs : real rows ``(n, …)`` per input of the model, repeated where a batch has more.
    batches : batch sizes.
    threads : of each runtime.
    seconds : of timing per artifact and batch size, exceeded where `min_samples` take longer.
    min_samples : rounds at least.
    seed : of the order.
    progress : called with the part done, in (0, 1].

    Returns
    -------
    By artifact name, by batch size, in milliseconds a batch.
    """
    if not artifacts or not batches or min(batches) < 1 or min_samples < 1:
        raise SlimlineError("Latency needs an artifact, batch sizes of at least 1 and at least one sample.")
    rng = np.random.default_rng(seed)
    latencies: dict[str, dict[int, Latency]] = {name: {} for name in artifacts}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slimline-inputs-")))
        workers = {name: stack.enter_context(Worker(path, threads)) for name, path in artifacts.items()}
        for finished, batch in enumerate(batches):
            files = save(folder, tile(inputs, batch))
            runs = {name: _Runs.fitting(worker, files) for name, worker in workers.items()}
            timings: dict[str, list[Timing]] = {name: [] for name in workers}
            names, rounds, start, limit = list(workers), 0, monotonic(), seconds * len(workers)
            while rounds < min_samples or monotonic() - start < limit:
                for i in rng.permutation(len(names)):
                    name = names[i]
                    timings[name].append(workers[name].time(files, runs[name].repeats, 1, runs[name].warm))
                rounds += 1
                if progress is not None:
                    part = min(rounds / min_samples, (monotonic() - start) / limit if limit else 1.0)
                    progress((finished + min(part, 1.0)) / len(batches))
            for name in workers:
                latencies[name][batch] = latency = _latency(timings[name])
                _log.info("%s, batch %d: %.3f ms (%d samples)", name, batch, latency.median_ms, rounds)
                if latency.waited is not None and latency.busy:
                    _log.warning(
                        "The machine is busy: %s waited for a core %.0f %% of the time.", name, 100 * latency.waited
                    )
    return latencies


def _latency(timings: Sequence[Timing]) -> Latency:
    # The two clocks may disagree by a hair, and no run takes less than no time.
    seconds = np.maximum(np.concatenate([t.seconds for t in timings]), 0.0)
    waits = [w for t in timings if t.waited is not None for w in t.waited]
    waited = sum(waits) / (sum(waits) + float(seconds.sum())) if waits else None
    return Latency.of((1e3 * seconds).tolist(), waited)


@dataclass(frozen=True)
class _Runs:
    """Of one sample: how many are timed, and how many go before."""

    repeats: int
    warm: int

    @classmethod
    def fitting(cls, worker: Worker, files: Sequence[Path]) -> _Runs:
        """Warm the worker up and see how long a run takes."""
        first = worker.time(files, samples=3).seconds
        remaining = math.ceil((_WARM_UP - sum(first)) / min(first))
        once = float(np.median(worker.time(files, samples=remaining).seconds if remaining > 2 else first))
        return cls(math.ceil(_SHORTEST_SAMPLE / once), 1 if once < _CACHES_MATTER else 0)


@dataclass(frozen=True)
class Speedup:
    """How many times faster: `ratio`, and the two-sided interval from `low` to `high` at `confidence`."""

    ratio: float
    low: float
    high: float
    confidence: float


def speedup(before: Latency, after: Latency, confidence: float = 0.95, seed: int = 0, resamples: int = 2000) -> Speedup:
    """Ratio of the medians of two artifacts measured in the same rounds, ``before / after``.

    The interval is from a bootstrap of rounds in circular blocks of about the cube root of their number (Politis and
    Romano 1992), because neighbouring rounds resemble each other.
    """
    a, b = np.asarray(before.samples_ms), np.asarray(after.samples_ms)
    if a.shape != b.shape or not len(a):
        raise SlimlineError(f"A speed-up needs paired samples, not {len(a)} and {len(b)}: measure both in one call.")
    rounds = _resampled(len(a), resamples, seed)
    ratios = np.median(a[rounds], axis=1) / np.median(b[rounds], axis=1)
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Speedup(float(np.median(a) / np.median(b)), float(low), float(high), confidence)


def _resampled(count: int, resamples: int, seed: int) -> np.ndarray:
    """Rounds drawn anew, a row a sample of `count` of them."""
    block = math.ceil(count ** (1 / 3))
    starts = np.random.default_rng(seed).integers(0, count, (resamples, math.ceil(count / block)))
    rows: np.ndarray = (starts[..., None] + np.arange(block)).reshape(resamples, -1)[:, :count] % count
    return rows


def median_amount(latency: Latency, confidence: float = 0.95, seed: int = 0, resamples: int = 2000) -> Amount:
    """The median in milliseconds a batch, with a two-sided interval from the bootstrap of rounds of `speedup`.

    The interval is of the rounds that were timed: of a machine that is slower tomorrow it knows nothing.
    """
    samples = np.asarray(latency.samples_ms)
    if not len(samples):
        raise SlimlineError("The median of a latency needs samples: measure it.")
    medians = np.median(samples[_resampled(len(samples), resamples, seed)], axis=1)
    low, high = np.quantile(medians, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Amount(value=float(np.median(samples)), low=float(low), high=float(high), confidence=confidence, unit="ms")


def latency_part(before: Latency, after: Latency, seed: int = 0) -> Part:
    """The latency of `after` in parts of that of `before`, timed in the same rounds, with the interval of `speedup`;
    and its own median."""
    s = speedup(before, after, seed=seed)
    own = median_amount(after, s.confidence, seed)
    return Part(value=1 / s.ratio, low=1 / s.high, high=1 / s.low, confidence=s.confidence, amount=own)
