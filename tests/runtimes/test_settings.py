"""What may stand behind a target's name and a colon."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

pytest.importorskip("torch")
from torch import nn

import slimline as sl
from slimline.basics.errors import SlimlineError
from slimline.measure.process import Artifact, Worker
from slimline.runtimes.base import runtime

X = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> sl.Model:
    return sl.load(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).eval(), (X[:2],))


@pytest.mark.parametrize("target", ["onnxruntime:basic", "onnxruntime:unoptimized", "openvino:throughput"])
def test_a_target_with_settings_is_a_target(model: sl.Model, target: str, tmp_path: Path) -> None:
    path = sl.export(model, target, tmp_path)
    assert runtime(target).name == target
    for threads in (1, 2):
        session = runtime(target).load(path, threads)
        for rows in (X, X[:1]):
            np.testing.assert_allclose(session.run((rows,)), model.predict(rows), atol=1e-6)


def test_rows_are_split_among_streams(model: sl.Model, tmp_path: Path) -> None:
    path = sl.export(model, "openvino", tmp_path)
    session = runtime("openvino:throughput").load(path, 2)
    assert len(session.requests) == 2 and len(runtime("openvino").load(path, 2).requests) == 1
    assert session.requests[0].get_compiled_model().get_property("NUM_STREAMS") == 2


def test_the_graph_level_reaches_the_session_and_the_worker(model: sl.Model, tmp_path: Path) -> None:
    path = sl.export(model, "onnxruntime", tmp_path)
    level = runtime("onnxruntime:basic").load(path).session.get_session_options().graph_optimization_level
    assert level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with Worker(Artifact(path, "onnxruntime:basic")) as worker:
        np.testing.assert_allclose(worker.outputs((X,), 7)[0], model.predict(X), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("onnxruntim:basic", "There is no target 'onnxruntim'; did you mean 'onnxruntime'?"),
        ("onnxruntime:cuda", "There is no setting of onnxruntime on this machine 'cuda'; choose one of"),
        ("onnxruntime:azure", "There is no setting of onnxruntime on this machine 'azure'; choose one of"),
        ("onnxruntime:", "There is no setting of onnxruntime on this machine ''; choose one of"),
        ("onnxruntime:basic,all", "onnxruntime:basic,all names two settings of graph: leave all out."),
        ("openvino:troughput", "did you mean 'throughput'?"),
        ("litert:fast", "nothing to choose from: leave it out."),
    ],
)
def test_settings_that_there_are_not(name: str, said: str) -> None:
    with pytest.raises(SlimlineError) as refused:
        runtime(name)
    assert said in str(refused.value)


def test_a_provider_that_does_not_start_is_no_cpu(
    model: sl.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sl.export(model, "onnxruntime", tmp_path)
    every = [*onnxruntime.get_available_providers(), "CUDAExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: every)
    with pytest.raises(SlimlineError, match="cannot start CUDAExecutionProvider"), pytest.warns(UserWarning):
        runtime("onnxruntime:cuda").load(path)
