"""The Core ML target: packages decoded and compared with the program that they are made of; nothing runs here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import slimline as sl
from slimline.basics.errors import SlimlineError

pytest.importorskip("coremltools")

from slimline.model.lowering import write
from slimline.runtimes.base import runtime
from slimline.runtimes.coreml import CoreML
from slimline.runtimes.coreml import runtime as target
from slimline.runtimes.coreml_package import Package
from slimline.runtimes.forms import EXPORTED_PROGRAM, Form
from tests.runtimes import mobile


@pytest.fixture(scope="module")
def float_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sl.export(mobile.model(), "coreml", tmp_path_factory.mktemp("float"))


@pytest.fixture(scope="module")
def integer(tmp_path_factory: pytest.TempPathFactory) -> tuple[sl.Model, Form, Path]:
    model = mobile.quantized("coreml")
    path = tmp_path_factory.mktemp("integer") / "model.mlpackage"
    return model, write(target, model, path), path


def _files(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_a_package_of_float16(float_path: Path) -> None:
    assert set(_files(float_path)) == {
        "Manifest.json",
        "Data/com.apple.CoreML/model.mlmodel",
        "Data/com.apple.CoreML/weights/weight.bin",
    }
    package = Package(float_path)
    assert package.inputs() == [("x", (None, 3, 8, 8), "float32")]
    assert package.outputs() == [("output", (None, 5), "float32")]
    kinds = {array.dtype for array in package.constants() if array.size > 100}
    assert kinds == {np.dtype(np.float16)}
    ranges = package.model.description.input[0].type.multiArrayType.shapeRange.sizeRanges
    assert (ranges[0].lowerBound, ranges[0].upperBound) == (1, 1024)


def test_integers_are_those_that_were_calibrated(integer: tuple[sl.Model, Form, Path]) -> None:
    model, _, path = integer
    package = Package(path)
    assert model.quantization is not None
    grids = model.quantization.weights
    packed = [each.arrays for each in package.weights()]
    assert sorted(len(each["scale"]) for each in packed) == sorted(len(grid.scale) for grid in grids.values())
    assert all(each["quantized_data"].dtype == np.int8 and int(each["axis"]) == 0 for each in packed)
    activations = {float(np.float16(float(grid.scale))) for grid in model.quantization.activations.values()}
    assert {scale for _, scale, _ in package.grids()} <= activations
    assert package.integer_products() == 5


def test_the_same_bytes_each_time(integer: tuple[sl.Model, Form, Path], tmp_path: Path) -> None:
    write(target, mobile.quantized("coreml"), tmp_path / "model.mlpackage")
    assert _files(tmp_path / "model.mlpackage") == _files(integer[2])
    manifest = json.loads((integer[2] / "Manifest.json").read_text())
    assert manifest["rootModelIdentifier"] in manifest["itemInfoEntries"]


def test_float32_on_request(tmp_path: Path) -> None:
    exact = CoreML("float32")
    model = mobile.model()
    form = write(exact, model, tmp_path / "model.mlpackage")
    assert exact.verify(form, tmp_path / "model.mlpackage") is None
    kinds = {array.dtype for array in Package(tmp_path / "model.mlpackage").constants() if array.size > 100}
    assert kinds == {np.dtype(np.float32)}
    with pytest.raises(SlimlineError, match="does not hold"):
        target.verify(form, tmp_path / "model.mlpackage")


def test_another_models_package_is_refused(integer: tuple[sl.Model, Form, Path], float_path: Path) -> None:
    _, form, path = integer
    assert target.verify(form, path) is None
    with pytest.raises(SlimlineError, match=r"does not hold stem\.weight"):
        target.verify(form, float_path)


@pytest.mark.parametrize("what", ["weight", "scale", "shape", "grid"])
def test_what_was_altered_is_seen(integer: tuple[sl.Model, Form, Path], what: str) -> None:
    model, _, path = integer
    program = model.adapter.form(model.native, EXPORTED_PROGRAM, model.example, True)
    message = "does not hold"
    if what == "weight":
        program.state_dict["first.weight_integers"].flatten()[7] += 1
    elif what == "scale":
        scales = program.state_dict["first.weight_scale"].clone()  # the model has it too
        scales[3] *= 1.1
        program.state_dict["first.weight_scale"] = scales
    elif what == "shape":
        node = program.graph.find_nodes(op="placeholder")[-1]
        node.meta["val"] = node.meta["val"][..., :7]
        message = "has inputs"
    else:
        for node in program.graph.nodes:
            if str(node.target) == "quantized_decomposed.quantize_per_tensor.default":
                node.update_arg(1, node.args[1] * 2)
        message = "rounds to a grid"
    with pytest.raises(SlimlineError, match=message):
        target.verify(Form(EXPORTED_PROGRAM, program, True), path)


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight[0, 0] = 1e5
    with pytest.raises(SlimlineError, match=r"weight has numbers that float16 does not"):
        sl.export(sl.load(layer, np.ones((2, 4), np.float32)), "coreml", tmp_path / "new")
    assert not list(tmp_path.iterdir())


def _altered(content: bytes, how: str) -> bytes:
    half = len(content) // 2
    return {"half": content[:half], "empty": b"", "zeros": bytes(len(content))}[how]


@pytest.mark.parametrize("part", ["weights/weight.bin", "model.mlmodel"])
@pytest.mark.parametrize("how", ["half", "empty", "zeros"])
def test_a_damaged_package_is_refused(
    integer: tuple[sl.Model, Form, Path], tmp_path: Path, part: str, how: str
) -> None:
    _, form, path = integer
    copy = tmp_path / path.name
    shutil.copytree(path, copy)
    file = copy / "Data" / "com.apple.CoreML" / part
    file.write_bytes(_altered(file.read_bytes(), how))
    with pytest.raises(SlimlineError, match="export the model again"):
        target.verify(form, copy)


def test_nothing_is_run_here_and_nothing_is_printed(float_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SlimlineError, match="runs on Apple devices, not here"):
        runtime("coreml").load(float_path)
    with pytest.raises(SlimlineError, match="no Core ML package"):
        target.input_specs(float_path.parent)
    target.input_specs(float_path)
    assert capfd.readouterr() == ("", "")
