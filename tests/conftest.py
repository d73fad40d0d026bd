"""Settings of all tests."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Before any library starts its threads, and inherited by the processes that tests start: tests run side by side, and
# threads that wait for a core by spinning slow each other down tenfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Where training and calibration are tested, here and in the processes that tests start: on the CPU, or on a GPU that
# whoever has one names.
os.environ["SLIMLINE_DEVICE"] = os.environ.get("SLIMLINE_TEST_DEVICE", "cpu")

# What slimline remembers of its user is not this user's while tests run, nor in the processes that they start.
os.environ["SLIMLINE_STATE"] = tempfile.mkdtemp(prefix="slimline-state-")
atexit.register(shutil.rmtree, os.environ["SLIMLINE_STATE"], ignore_errors=True)

# pytest would format thousands of torch's trace records, which doubles the time of an export.
logging.getLogger("torch.__trace").propagate = False

# The same examples in every run, and no clock: what fails on a busy machine says nothing of the code.
settings.register_profile("slimline", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("slimline")


@pytest.fixture
def device() -> str:
    """Where training, calibration and Gram matrices are tested."""
    return os.environ["SLIMLINE_DEVICE"]


@pytest.fixture(autouse=True)
def state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test starts with nothing remembered, so none depends on which ran before."""
    monkeypatch.setenv("SLIMLINE_STATE", str(tmp_path_factory.mktemp("state")))


@pytest.fixture
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs measure no time and no memory at their end, which is most of what they take: for tests of anything else."""
    from slimline.measure.size import Memory
    from tests import kill_job

    monkeypatch.setattr("slimline.run.proof.measure_latency", kill_job.timed)
    monkeypatch.setattr("slimline.run.proof.measure_memory", lambda *args, **kwargs: Memory(2, 1))


@pytest.fixture
def layer_clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Says what a choice of layers takes by the milliseconds of each, without noise; no artifact is written."""
    from slimline.measure.figures import Latency
    from slimline.steps import clock

    def use(heavy: dict[str, float], light: dict[str, float]) -> None:
        backs: dict[Path, Any] = {}

        def path(artifacts: Any, back: Any) -> Path:
            name = Path("/none", str(back and sorted(back)))
            backs[name] = back
            return name

        def times(artifacts: Any, paths: dict[str, Path]) -> dict[str, Latency]:
            def ms(back: Any) -> float:
                return 1 + sum(heavy[n] if back is None or n in back else light[n] for n in artifacts.layers())

            return {name: Latency.of([ms(backs[each])] * 9) for name, each in paths.items()}

        for name, fake in {
            "path": path,
            "times": times,
            "profiles": lambda artifacts: (light, heavy),
            "batch": lambda artifacts: 1,
        }.items():
            monkeypatch.setattr(clock.Timed, name, fake)

    return use
