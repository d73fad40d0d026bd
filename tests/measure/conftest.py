"""Artifacts whose outputs and costs are known, and a runtime of our own that misbehaves on demand."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from slimline.measure.process import Artifact


@pytest.fixture(scope="session")
def artifact(tmp_path_factory):
    """Makes an ONNX file that multiplies ``(n, width)`` by the same matrix `times` over: a known result and cost."""
    from onnx import TensorProto, helper, numpy_helper, save

    folder = tmp_path_factory.mktemp("artifacts")

    def make(width: int, times: int = 1, separate: bool = False) -> tuple[Path, np.ndarray]:
        path = folder / f"{width}-{times}-{separate}.onnx"
        matrix = np.random.default_rng(width).normal(0, width**-0.5, (width, width)).astype(np.float32)
        # Separate copies take memory; a little noise keeps a runtime from sharing them.
        weights = [numpy_helper.from_array(matrix + (i * 1e-7 if separate else 0), f"w{i}") for i in range(times)]
        names = [f"w{i}" if separate else "w0" for i in range(times)]
        steps = ["x", *(f"h{i}" for i in range(1, times)), "y"]
        graph = helper.make_graph(
            [helper.make_node("MatMul", [steps[i], names[i]], [steps[i + 1]]) for i in range(times)],
            "matmuls",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", width])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", width])],
            weights if separate else weights[:1],
        )
        save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
        return path, matrix

    return make


_FAKE = """
import os, sys, time
from pathlib import Path
import slimline.runtimes.base as base

class Session:
    def __init__(self, path):
        self.path, (self.kind, *rest) = path, path.read_text().split()
        self.seconds = float(rest[0]) if rest else 0.0
        print("noise from python"); os.write(1, b"noise from a library\\n")

    def outputs(self, inputs):
        with (self.path.parent / "log").open("a") as log:
            log.write(self.path.stem)
        os.write(1, b"more noise")
        if self.kind == "dies":
            sys.stderr.write("first line\\nlast words\\n\\n"); sys.stderr.flush(); os._exit(7)
        if self.kind == "raises":
            raise ValueError("what the runtime says\\nand advises")
        time.sleep(self.seconds)
        return (inputs[0] * 2,)

class Runtime:
    def load(self, path, threads):
        return Session(path)

real = base.runtime
base.runtime = lambda name: Runtime() if name == "fake" else real(name)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Makes artifacts of a noisy runtime that doubles its input, after some seconds, or fails; runs go to ``log``."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(_FAKE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]))

    def make(name: str, behaviour: str) -> Artifact:
        path = tmp_path / f"{name}.fake"
        path.write_text(behaviour)
        return Artifact(path, "fake")

    return make
