"""What others did to the machine meanwhile; their processes are played by one that is still alive."""

from __future__ import annotations

import subprocess
import sys
import time

from slimline.measure import load

SPIN = "import time\nend = time.monotonic() + {}\nwhile time.monotonic() < end: pass"


def test_others_are_counted_and_what_is_ours_is_not(monkeypatch):
    spent = iter([{"user": 10.0, "system": 1.0, "idle": 5.0}, {"user": 13.0, "system": 1.5, "idle": 9.0}])
    own = iter([(1.0, 0.0, 0.0, 0.0), (2.0, 0.0, 0.5, 0.0)])
    clock = iter([0.0, 10.0])

    def times():
        class Named:
            user, system, children_user, children_system = next(own)

        return Named

    class Machine:
        def __init__(self, found):
            self.__dict__.update(found)

    monkeypatch.setattr("psutil.cpu_times", lambda: Machine(next(spent)))
    monkeypatch.setattr(load.os, "times", times)
    monkeypatch.setattr(load, "monotonic", lambda: next(clock))
    monkeypatch.setattr(load.os, "cpu_count", lambda: 2)
    result, others = load.watched(lambda: "done")
    assert result == "done"
    assert others == (3.5 - 1.5) / 20


def test_a_living_process_is_another():
    with subprocess.Popen([sys.executable, "-c", SPIN.format(30)]) as other:
        time.sleep(1.0)
        _, others = load.watched(lambda: time.sleep(1.5))
        other.kill()
    assert others > 0.02


def test_only_much_is_said():
    assert load.busy(0.05) == ""
    assert load.busy(0.34).startswith("The machine was busy: other processes used 34% of its cores while latency")
