"""``report.json`` as the design page fixes it, and the environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from slimline.basics.errors import SlimlineError
from slimline.measure import Figures, Latency, LayerRow, LayerState, Report, certify, environment
from slimline.measure.parity import parity


def report():
    figures = Figures(accuracy=0.94, file_bytes=10, parameters=3, macs=5, latency={1: Latency.of([1, 2, 3])})
    return Report(
        target="onnxruntime",
        original=figures,
        compressed=Figures(),
        certificate=certify(np.ones(500), np.ones(500), 0.01),
        parity=parity(np.eye(3), np.eye(3)),
        refused=[{"what": "conv1", "reason": "slower"}],
        steps=[{"step": "ChannelPruning", "ratio": 0.5}],
        layers=[LayerRow(layer="fc", kind="linear", before=LayerState(width=10, parameters=100), after=None)],
        environment=environment(),
        of_a_later_version={"kept": True},
    )


def test_schema_one():
    found = json.loads(report().to_json())
    assert found["schema"] == 1 and "version" not in found
    assert set(found["certificate"]) >= {"verdict", "observed_drop", "bound", "confidence", "n"}
    figures = {"accuracy", "file_bytes", "parameters", "macs", "peak_memory_bytes", "latency"}
    assert set(found["original"]) >= figures and set(found["compressed"]) >= figures
    assert found["original"]["latency"]["1"] == {
        "median_ms": 2.0,
        "p10_ms": pytest.approx(1.2),
        "p90_ms": pytest.approx(2.8),
        "samples_ms": [1.0, 2.0, 3.0],
        "waited": None,
    }
    assert found["compressed"]["accuracy"] is None
    assert found["of_a_later_version"] == {"kept": True}


def test_round_trip():
    assert Report.from_json(report().to_json()) == report()
    with pytest.raises(SlimlineError, match="has schema 2, and this slimline reads schema 1: update slimline"):
        Report.from_json(report().to_json().replace('"schema": 1', '"schema": 2'))


def test_environment_is_json_and_true():
    found = environment(threads=3)
    assert json.loads(json.dumps(found)) == found
    assert found["threads"] == 3 and found["cores"] == len(os.sched_getaffinity(0))
    assert found["packages"]["numpy"] == np.__version__
    assert found["python"] == sys.version.split()[0]
    assert found["memory_bytes"] > 2**28 and found["cpu"]


def test_environment_names_the_settings(monkeypatch):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    assert environment()["settings"]["OPENBLAS_CORETYPE"] == "Haswell"


def test_names_are_lazy():
    code = (
        "import sys, importlib; m = importlib.import_module('slimline.measure')\n"
        "assert not {'numpy', 'scipy', 'pydantic'} & set(sys.modules), sys.modules\n"
    )
    code += "for name in m.__all__: getattr(m, name)\n"
    code += "assert not {'torch', 'tensorflow', 'keras', 'onnxruntime', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
    code += "assert not {'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
