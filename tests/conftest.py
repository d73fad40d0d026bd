"""Settings of all tests."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile

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
