"""Which device is chosen, without any framework."""

from __future__ import annotations

import pytest

from slimline.basics.errors import SlimlineError
from slimline.frameworks.device import VARIABLE, choose, device_name, on, using, wish

ALL = {"cuda": 2, "mps": 1, "cpu": 1}


@pytest.mark.parametrize(
    ("counts", "best"),
    [(ALL, "cuda:0"), ({"mps": 1, "cpu": 1}, "mps"), ({"cuda": 0, "mps": 0, "cpu": 1}, "cpu"), ({}, "cpu")],
)
def test_the_best_there_is_where_nothing_is_wished(counts, best):
    assert choose(None, counts) == best


@pytest.mark.parametrize(
    ("wished", "found"), [("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("mps", "mps"), ("cpu", "cpu")]
)
def test_what_is_wished_where_it_is_there(wished, found):
    assert choose(wished, ALL) == found


@pytest.mark.parametrize(
    ("wished", "counts", "said"),
    [
        ("cuda", {"cpu": 1}, "There is no CUDA device here: leave device out, or choose cpu."),
        ("cuda:1", {"cpu": 1}, "There is no CUDA device here: leave device out, or choose cpu."),
        ("mps", {"cuda": 1, "cpu": 1}, "There is no MPS device here: leave device out, or choose cpu."),
        ("cuda:2", ALL, "There is no cuda:2 here: choose cuda:0 to cuda:1, or leave device out."),
        ("cuda:1", {"cuda": 1}, "There is no cuda:1 here: choose cuda:0, or leave device out."),
    ],
)
def test_what_is_not_there_is_refused_in_a_sentence(wished, counts, said):
    with pytest.raises(SlimlineError) as error:
        choose(wished, counts)
    assert str(error.value) == said


@pytest.mark.parametrize(
    "name", ["gpu", "cuda:", "cuda:-1", "cuda:01", "CUDA", "cpu:0", "mps:0", "", "cuda\n", 0, True]
)
def test_what_is_no_device_is_refused_in_a_sentence(name):
    with pytest.raises(SlimlineError) as error:
        device_name("device", name)
    assert str(error.value) == f"device is {str(name)!r}: give cpu, mps, cuda or, by its number, cuda:1."


class Adapter:
    def device(self, wished):
        return choose(wished, {"cuda": 1})


def test_a_call_is_heard_before_the_environment_and_only_while_it_runs(monkeypatch):
    monkeypatch.delenv(VARIABLE)
    assert wish() is None
    monkeypatch.setenv(VARIABLE, "mps")
    assert wish() == "mps"
    with using("cuda"):
        with using(None):
            assert wish() == "cuda"
        with on(Adapter(), "cpu"):
            assert wish() == "cpu"
        assert wish() == "cuda"
    with pytest.raises(SlimlineError, match="no MPS device"), on(Adapter(), None):
        raise AssertionError
    assert wish() == "mps"


def test_the_environment_is_checked(monkeypatch):
    monkeypatch.setenv(VARIABLE, "gpu")
    with pytest.raises(SlimlineError, match=r"SLIMLINE_DEVICE is 'gpu': give cpu"):
        wish()
    monkeypatch.setenv(VARIABLE, "")
    assert wish() is None
