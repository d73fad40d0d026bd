"""The ExecuTorch target, against torch, the simulation of integers, and the graph that XNNPACK gets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import slimline as sl
from slimline.basics.errors import SlimlineError

pytest.importorskip("executorch")

from slimline.measure.process import Worker
from slimline.model.lowering import check, write
from slimline.runtimes.base import runtime
from slimline.runtimes.forms import EXPORTED_PROGRAM
from tests.runtimes import mobile

TARGET = runtime("executorch")


@pytest.fixture(scope="module")
def float_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sl.export(mobile.model(), "executorch", tmp_path_factory.mktemp("float"))


@pytest.fixture(scope="module")
def integer(tmp_path_factory: pytest.TempPathFactory) -> tuple[sl.Model, Path]:
    model = mobile.quantized("executorch")
    return model, sl.export(model, "executorch", tmp_path_factory.mktemp("integer"))


def test_float_answers_as_torch_at_any_batch(float_path: Path) -> None:
    model, session = mobile.model(), TARGET.load(float_path)
    for count in (1, 4, 33):
        answers = session.run((mobile.images(count),))
        np.testing.assert_allclose(answers, model.outputs(mobile.images(count))[0], rtol=1e-4, atol=1e-5)
    assert TARGET.input_specs(float_path) == [("x", (None, 3, 8, 8), "float32")]
    assert set(TARGET.integer_layers(float_path).values()) == {"float"}


def test_integers_answer_as_their_simulation_and_all_run_as_integers(integer: tuple[sl.Model, Path]) -> None:
    model, path = integer
    assert check(TARGET, model, path).passed
    layers = TARGET.integer_layers(path)
    assert {"stem", "first", "second", "hidden", "head"} <= set(layers)
    assert {name for name, kind in layers.items() if kind == "float"} <= {"constant_pad_nd"}


def test_integers_are_smaller(integer: tuple[sl.Model, Path], float_path: Path) -> None:
    assert integer[1].stat().st_size < float_path.stat().st_size


@pytest.mark.slow
def test_the_same_bytes_each_time_and_no_paths_in_them(integer: tuple[sl.Model, Path], tmp_path: Path) -> None:
    write(TARGET, mobile.quantized("executorch"), tmp_path / "again.pte")
    content = (tmp_path / "again.pte").read_bytes()
    assert content == integer[1].read_bytes()
    assert b"/tmp" not in content and b".py" not in content


def test_it_is_run_and_timed_in_a_process(float_path: Path) -> None:
    images = mobile.images(6)
    expected = TARGET.load(float_path).run((images,))
    with Worker(float_path) as worker:
        np.testing.assert_array_equal(worker.outputs((images,), 4)[0], expected)


def test_wrong_inputs_are_refused_in_a_sentence(float_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    session = TARGET.load(float_path)
    for wrong in (np.zeros((2, 3, 9, 8), np.float32), np.zeros((1025, 3, 8, 8), np.float32)):
        with pytest.raises(SlimlineError, match=r"Input 'x' of model.pte has shape \(up to 1024, 3, 8, 8\), not"):
            session.run((wrong,))
    with pytest.raises(SlimlineError, match="takes 1 inputs, not 2"):
        session.run((mobile.images(), mobile.images()))
    assert capfd.readouterr() == ("", "")


def test_files_that_are_none_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for content in (b"", b"no program", np.random.default_rng(0).bytes(300)):  # the last once ended the process
        (tmp_path / "x.pte").write_bytes(content)
        with pytest.raises(SlimlineError, match="is no ExecuTorch program"):
            TARGET.load(tmp_path / "x.pte")
    (tmp_path / "x.pte").write_bytes(b"....ET12 and no more")
    with pytest.raises(SlimlineError, match="ExecuTorch cannot load"):
        TARGET.load(tmp_path / "x.pte")
    with pytest.raises(SlimlineError, match="There is no file"):
        TARGET.input_specs(tmp_path / "y.pte")
    assert capfd.readouterr() == ("", "")


def test_integer_weights_beside_float_activations_are_refused(tmp_path: Path) -> None:
    from slimline.runtimes.executorch import _refuse_weight_only

    model = mobile.quantized("executorch")
    program = model.adapter.form(model.native, EXPORTED_PROGRAM, model.example, True)
    _refuse_weight_only(program)
    conv = next(node for node in program.graph.nodes if str(node.target) == "aten.conv2d.default")
    conv.replace_input_with(conv.args[0], program.graph.find_nodes(op="placeholder")[-1])
    with pytest.raises(SlimlineError, match=r"'stem'.*quantize its activations too"):
        _refuse_weight_only(program)
