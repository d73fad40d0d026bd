"""Latency: costs in a known ratio, interleaved rounds, and the interval of a speed-up."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from slimline.basics.errors import SlimlineError
from slimline.measure import Latency, latency, measure_latency, speedup

pytestmark = pytest.mark.alone


def test_four_times_the_work_takes_four_times_the_time(artifact):
    rng = np.random.default_rng(0)
    artifacts = {"one": artifact(384, 6)[0], "four": artifact(384, 24)[0]}
    x = rng.normal(size=(5, 384)).astype(np.float32)
    parts = []
    found = measure_latency(artifacts, (x,), batches=(8, 64), seconds=0.1, min_samples=12, progress=parts.append)
    for batch in (8, 64):
        one, four = found["one"][batch], found["four"][batch]
        assert len(one.samples_ms) == len(four.samples_ms) >= 12
        assert one.p10_ms <= one.median_ms <= one.p90_ms
        assert 2.5 < speedup(four, one).ratio < 6
    assert found["one"][64].median_ms > 2 * found["one"][8].median_ms
    assert parts == sorted(parts) and parts[-1] == pytest.approx(1.0)


def test_a_known_time_is_measured(fake):
    found = measure_latency({"a": fake("a", "sleeps 0.004")}, (np.ones((1, 2)),), (1,), seconds=0, min_samples=5)
    assert 4.0 < found["a"][1].median_ms < 40.0
    assert len(found["a"][1].samples_ms) == 5


def test_rounds_are_interleaved_and_shuffled(fake, monkeypatch):
    asked = ""

    class Spy(latency.Worker):
        def time(self, inputs, repeats=1, samples=1, warm=0):
            nonlocal asked
            asked += self.artifact.path.stem
            return super().time(inputs, repeats, samples, warm)

    monkeypatch.setattr(latency, "Worker", Spy)
    artifacts = {name: fake(name, "sleeps 0.01") for name in "abc"}
    measure_latency(artifacts, (np.ones((1, 2)),), (1,), seconds=0, min_samples=16, seed=3)
    rounds = [asked[-48:][i : i + 3] for i in range(0, 48, 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 2


def test_short_runs_are_repeated_to_a_millisecond(artifact, fake, tmp_path):
    measure_latency({"a": fake("a", "sleeps 0.0002")}, (np.ones((1, 2)),), (1,), seconds=0, min_samples=10)
    runs = len((tmp_path / "log").read_text())
    assert runs > 10 * 3 + 3  # more than one run a sample


def test_another_process_on_the_core_does_not_count(artifact):
    """Three busy processes on the worker's one core: wall-clock time is four times as long, latency hardly longer.

    A run takes many of the scheduler's time slices: one that is shorter than a slice may never have to wait.
    """
    path, x = artifact(384, 6)[0], (np.ones((1, 384), np.float32),)

    def measured() -> Latency:
        return measure_latency({"a": path}, x, (4096,), seconds=0, min_samples=8)["a"][4096]

    core = {min(os.sched_getaffinity(0))}
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, core)  # inherited by the processes
    try:
        quiet = measured()
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
        try:
            crowded = measured()
        finally:
            for process in busy:
                process.kill()
                process.wait()
    finally:
        os.sched_setaffinity(0, everywhere)
    assert crowded.waited > 0.15
    assert crowded.median_ms < 2.5 * quiet.median_ms
    assert min(crowded.samples_ms) > 0.3 * quiet.median_ms


def test_waiting_is_not_taken_off_with_more_threads(artifact):
    found = measure_latency({"a": artifact(16)[0]}, (np.ones((1, 16), np.float32),), (1,), threads=2, seconds=0)
    assert found["a"][1].waited is None


def test_an_artifact_is_as_fast_as_itself(artifact):
    path = artifact(384, 6)[0]
    found = measure_latency({"a": path, "b": path}, (np.ones((32, 384), np.float32),), (32,), seconds=0.5)
    assert speedup(found["a"][32], found["b"][32]).ratio == pytest.approx(1.0, abs=0.3)


def test_speedup_interval():
    rng = np.random.default_rng(0)
    drift = 1 + 0.5 * np.linspace(0, 1, 200) + rng.normal(0, 0.02, 200)  # slows down half as much again, for both alike
    before, after = Latency.of(6 * drift), Latency.of(2 * drift * (1 + rng.normal(0, 0.01, 200)))
    found = speedup(before, after)
    assert found.low < 3 < found.high
    assert found.high - found.low < 0.1
    assert found == speedup(before, after)
    assert found.ratio == before.median_ms / after.median_ms


def test_speedup_interval_covers():
    covered = 0
    for i in range(200):
        local = np.random.default_rng(i)
        a, b = 2 * local.lognormal(0, 0.1, 60), local.lognormal(0, 0.1, 60)
        found = speedup(Latency.of(a), Latency.of(b), 0.9, seed=i, resamples=400)
        covered += found.low <= 2 <= found.high
    assert 0.82 < covered / 200 < 0.97


def test_bad_requests(artifact):
    x = (np.ones((1, 16), np.float32),)
    for artifacts, batches in [({}, (1,)), ({"a": artifact(16)[0]}, ()), ({"a": artifact(16)[0]}, (0,))]:
        with pytest.raises(SlimlineError, match="Latency needs"):
            measure_latency(artifacts, x, batches)
    with pytest.raises(SlimlineError, match="no input rows"):
        measure_latency({"a": artifact(16)[0]}, (np.ones((0, 16)),))
    with pytest.raises(SlimlineError, match="paired"):
        speedup(Latency.of([1, 2]), Latency.of([1, 2, 3]))
