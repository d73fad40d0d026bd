"""What quantization does without: PyTorch where ONNX is quantized, and all samples in memory at once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slimline as sl
from slimline.model import Model, portions
from slimline.model.equality import echo
from slimline.runtimes.base import runtime
from slimline.steps.base import Context
from slimline.steps.quantization.step import StaticQuantization
from slimline.steps.quantization.undo import StaticArtifacts
from tests.frameworks.onnx.graphs import images, model

X = np.random.default_rng(1).standard_normal((12, 3, 6, 6)).astype(np.float32)
DATA = sl.Data(calibration=((X,),))
JOB = """
import sys
import numpy as np
import slimline as sl

x = np.load(sys.argv[1] + "/x.npy")
step = sl.StaticQuantization(undo=False)
small = sl.apply(sl.load(sys.argv[1] + "/model.onnx"), step, sl.Data(calibration=((x,),)), target="onnxruntime")
sl.export(small, "onnxruntime", sys.argv[1] + "/small.onnx")
print(sorted({"torch", "tensorflow", "keras", "openvino", "scipy.stats"} & set(sys.modules)))
"""


def test_quantization_of_onnx_imports_no_other_framework(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(images("d = Relu(c)").SerializeToString())
    np.save(tmp_path / "x.npy", X)
    done = subprocess.run([sys.executable, "-c", JOB, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    assert runtime("onnxruntime").load(tmp_path / "small.onnx").run((X,)).shape == (12, 5)


def loaded() -> Model:
    return sl.load(images("d = Relu(c)"))


def test_answers_in_portions_are_those_of_all_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network, sizes = loaded(), []

    def run(part: tuple[np.ndarray, ...]) -> Sequence[np.ndarray]:
        sizes.append(len(part[0]))
        return network.outputs(*part)

    (together,) = portions.answers(network, run, (X,))
    computed = 4 * (3 * 36 + 2 * 12 * 16 + 2 * 12 + 5)  # bytes: the image, both planes, their means twice, the answer
    for rows in (5, 1):
        monkeypatch.setattr(portions, "BYTES", rows * computed)
        assert np.allclose(portions.answers(network, run, (X,))[0], together, atol=1e-6)
    assert sizes == [12, 5, 5, 2, *[1] * 12]


@pytest.mark.parametrize("fixed", [True, False])
def test_what_is_no_answer_to_each_row_is_asked_of_all(fixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portions, "BYTES", 1)
    if fixed:
        network = sl.load(model("y = Mul(x, w)", {"w": np.full((3, 6, 6), 2.0, np.float32)}, "float[12,3,6,6] x"))
    else:
        network = sl.load(
            model("a = Mul(x, w) y = ReduceSum(a)", {"w": np.ones((3, 6, 6), np.float32)}, output="float y")
        )
    (expected,) = network.outputs(X)
    assert np.array_equal(portions.answers(network, lambda part: network.outputs(*part), (X,))[0], expected)


def test_an_artifact_is_held_against_its_simulation_in_portions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts = StaticArtifacts(loaded(), StaticQuantization(), Context(None, DATA, "onnxruntime"))
    artifacts.folder = tmp_path
    simulation, sizes = artifacts.variant(()), []
    whole, moved = artifacts.parity(()), echo(simulation, (X,))
    outputs = type(simulation.adapter).outputs

    def watched(adapter: Any, native: Any, inputs: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        sizes.append(len(inputs[0]))
        return outputs(adapter, native, inputs)

    monkeypatch.setattr(type(simulation.adapter), "outputs", watched)
    monkeypatch.setattr(portions, "BYTES", 1)
    parity = artifacts.parity(())
    assert sizes == [1] * 12 and parity.n == whole.n == 12 and parity.passed
    assert parity.mean_error == pytest.approx(whole.mean_error, abs=1e-3)
    assert np.allclose(echo(simulation, (X,))[0], moved[0], atol=1e-5)
