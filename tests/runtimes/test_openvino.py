"""The OpenVINO target, against torch, against the simulation, and against what its CPU plugin really executes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import slimline as sl  # noqa: E402
from slimline.basics.errors import SlimlineError  # noqa: E402
from slimline.graph.edits import FoldNorms  # noqa: E402
from slimline.measure import file_bytes  # noqa: E402
from slimline.measure.ledger import digest  # noqa: E402
from slimline.model.lowering import write  # noqa: E402
from slimline.runtimes.base import runtime_for  # noqa: E402
from slimline.runtimes.openvino import runtime  # noqa: E402
from slimline.steps.quantization.calibration import calibrate  # noqa: E402
from slimline.steps.quantization.step import StaticQuantization  # noqa: E402
from tests import compress_job  # noqa: E402
from tests.digit_models import NETS, Recurrent, digits, fitted  # noqa: E402


@pytest.fixture(scope="module", params=["inverted", "perceptron"])
def lowered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    """A network, its quantized model, and both artifacts."""
    torch.manual_seed(0)
    module = fitted(NETS[request.param])
    x = digits()
    model = sl.load(module, (x[:2],))
    quantized = calibrate(model, StaticQuantization(), [(x[:256],)], "openvino")
    folder = tmp_path_factory.mktemp(request.param)
    write(runtime, model, folder / "float.xml")
    write(runtime, quantized, folder / "integer.xml")
    yield {
        "name": request.param,
        "module": module,
        "model": model,
        "quantized": quantized,
        "float": folder / "float.xml",
        "integer": folder / "integer.xml",
        "x": x[1024:1424],
    }


def test_float_artifact_is_the_users_module_at_any_batch(lowered: dict) -> None:
    session = runtime.load(lowered["float"])
    for batch in (1, 7, 400):
        x = lowered["x"][:batch]
        with torch.no_grad():
            wish = lowered["module"](torch.from_numpy(x)).numpy()
        assert np.abs(session.run((x,)) - wish).max() <= 1e-4 * np.abs(wish).max()


def test_integer_artifact_is_the_simulation(lowered: dict) -> None:
    x = lowered["x"]
    got = runtime.load(lowered["integer"]).run((x,))
    wish = lowered["quantized"].predict(x)
    assert (got.argmax(1) == wish.argmax(1)).mean() >= 0.99
    assert np.abs(got - wish).max() <= 0.05 * np.abs(wish).max()
    assert np.abs(got - wish).mean() <= 0.005 * np.abs(wish).max()


def test_the_plugin_executes_integer_kernels(lowered: dict) -> None:
    layers = runtime.integer_layers(lowered["integer"])
    assert set(layers.values()) == {"integer"}
    assert set(lowered["quantized"].quantization.layers) <= set(layers)
    in_float = runtime.integer_layers(lowered["float"])
    assert set(in_float.values()) == {"float"} and set(lowered["quantized"].quantization.layers) <= set(in_float)


def test_the_file_holds_the_grids_integers(lowered: dict) -> None:
    from openvino import Core

    constants = [op for op in Core().read_model(lowered["integer"]).get_ops() if op.get_type_name() == "Constant"]
    stored = [op.data for op in constants if op.get_element_type().get_type_name() == "i8"]
    folded = lowered["model"].adapter.parameters(lowered["model"].edit(FoldNorms()))
    grids = lowered["quantized"].quantization.weights
    assert len(stored) == len(grids)
    for name, grid in grids.items():
        assert any(np.array_equal(array, grid.encode(folded[name])) for array in stored), name
    floats = sum(op.data.size for op in constants if op.get_element_type().get_type_name() == "f32")
    assert floats < 6 * sum(grid.scale.size for grid in grids.values()) + 40  # no weight is left in float


@pytest.mark.parametrize("lowered", ["perceptron"], indirect=True)
def test_the_same_model_gives_the_same_bytes_that_hold_no_paths(lowered: dict, tmp_path: Path) -> None:
    write(runtime, lowered["quantized"], tmp_path / "again.xml")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.bin", "again.xml"]  # no temporary file stays
    for again, first in zip(*map(runtime.files, (tmp_path / "again.xml", lowered["integer"])), strict=True):
        assert again.read_bytes() == first.read_bytes()
    text = lowered["integer"].read_text()
    assert not any(word in text for word in ("/tmp", str(tmp_path), "conversion", "input_model"))


@pytest.mark.parametrize("lowered", ["inverted"], indirect=True)
def test_another_process_writes_the_same_bytes_and_prints_nothing(lowered: dict, tmp_path: Path) -> None:
    path = lowered["quantized"].save(tmp_path / "q.pt2")
    code = """
import sys
import slimline as sl
sl.export(sl.load(sys.argv[1]), "openvino", sys.argv[2])
assert "openvino_telemetry" not in sys.modules
"""
    command = [sys.executable, "-W", "ignore", "-c", code, str(path), str(tmp_path / "other.xml")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")
    for other, first in zip(*map(runtime.files, (tmp_path / "other.xml", lowered["integer"])), strict=True):
        assert other.read_bytes() == first.read_bytes()


def test_an_artifact_is_both_of_its_files(lowered: dict, tmp_path: Path) -> None:
    graph, weights = runtime.files(lowered["integer"])
    assert file_bytes(graph) == graph.stat().st_size + weights.stat().st_size
    for file in (graph, weights):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    copy = tmp_path / graph.name
    assert digest(copy) == digest(graph) and runtime_for(copy) is runtime
    copy.with_suffix(".bin").write_bytes(bytes(weights.stat().st_size))
    assert digest(copy) != digest(graph)


def test_profile_and_input_specs(lowered: dict) -> None:
    assert runtime.input_specs(lowered["integer"])[0][1:] == ((None, 1, 8, 8), "float32")
    times = runtime.profile(lowered["integer"], (lowered["x"][:8],), runs=3)
    for layer in lowered["quantized"].quantization.layers:
        assert any(name.startswith(f"{layer} (") and ms > 0 for name, ms in times.items())


def test_recurrent_layers_at_any_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Recurrent(nn.LSTM).eval()
    x = np.random.default_rng(0).normal(size=(7, 6, 5)).astype(np.float32)
    write(runtime, sl.load(module, (x[:2],)), tmp_path / "loop.xml")
    session = runtime.load(tmp_path / "loop.xml")
    for batch in (7, 1):
        with torch.no_grad():
            wish = module(torch.from_numpy(x[:batch])).numpy()
        np.testing.assert_allclose(session.run((x[:batch],)), wish, atol=1e-5)


class Words(nn.Module):
    """Words and how often they occur in; a score of each and where it is largest out."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(30, 8), nn.Linear(8, 4, bias=False)

    def forward(self, words: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        score = self.head(self.table(words) * counts[..., None])
        return score, score.argmax(-1)


def test_all_inputs_and_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    words, counts = rng.integers(0, 30, (6, 5)), rng.random((6, 5)).astype(np.float32)
    module = Words().eval()
    path = sl.export(sl.load(module, (words[:2], counts[:2])), "openvino", tmp_path)
    assert runtime.input_specs(path) == [("words", (None, 5), "int64"), ("counts", (None, 5), "float32")]
    with torch.no_grad():
        wish = module(torch.from_numpy(words), torch.from_numpy(counts))
    found = runtime.load(path).outputs((words, counts))
    np.testing.assert_allclose(found[0], wish[0].numpy(), atol=1e-6)
    np.testing.assert_array_equal(found[1], wish[1].numpy())


@pytest.mark.parametrize("size", [(32, 16, 3, 3), (32, 64)], ids=["convolution", "linear"])
def test_integer_products_are_exact(size: tuple[int, ...], tmp_path: Path) -> None:
    """The largest weights times the largest activations: with a bit too many, x86 without VNNI would saturate."""
    rng = np.random.default_rng(0)
    most = 2 ** (runtime.weight_bits - 1) - 1
    weight = rng.integers(most // 2, most + 1, size)
    weight.reshape(len(weight), -1)[:, 0] = most
    layer = nn.Linear(size[1], size[0], bias=False) if len(size) == 2 else nn.Conv2d(size[1], size[0], size[2])
    if len(size) == 4:
        nn.init.zeros_(layer.bias)
    layer.weight.data = torch.from_numpy(weight.astype(np.float32))
    x = rng.integers(200, 256, (4, size[1], *size[2:])).astype(np.float32)
    x[0].flat[0] = 255
    model = sl.load(layer.eval(), (x,))
    write(runtime, calibrate(model, StaticQuantization(observer="minmax"), [(x,)], "openvino"), tmp_path / "q.xml")
    assert set(runtime.integer_layers(tmp_path / "q.xml").values()) == {"integer"}
    exact = np.einsum("ni,oi->no", x.reshape(4, -1).astype(np.int64), weight.reshape(len(weight), -1))
    found = runtime.load(tmp_path / "q.xml").run((x,)).reshape(exact.shape)
    # What is left is the last bits of scales such as 255 / 255.
    np.testing.assert_allclose(found, exact, rtol=2e-2 if len(size) == 4 else 1e-6)


def test_kept_layers_stay_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = digits()[:64]
    model = sl.load(NETS["residual"]().eval(), (x[:2],))
    quantized = calibrate(model, StaticQuantization(keep=("head", "stages.0.0.conv1")), [(x,)], "openvino")
    write(runtime, quantized, tmp_path / "mixed.xml")
    layers = runtime.integer_layers(tmp_path / "mixed.xml")
    assert layers["head"] == layers["stages.0.0.conv1"] == "float"
    assert layers["stem"] == layers["stages.1.0.conv2"] == "integer"
    wish = quantized.predict(x)
    assert np.abs(runtime.load(tmp_path / "mixed.xml").run((x,)) - wish).mean() <= 0.005 * np.abs(wish).max()


def test_arithmetic_is_float32_on_as_many_threads_as_told(lowered: dict) -> None:
    compiled = runtime.load(lowered["float"], 2).requests[0].get_compiled_model()
    told = {name: compiled.get_property(name) for name in ("INFERENCE_NUM_THREADS", "NUM_STREAMS")}
    assert told == {"INFERENCE_NUM_THREADS": 2, "NUM_STREAMS": 1}
    assert compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"


def _refused(path: Path) -> str:
    with pytest.raises(SlimlineError) as refused:
        runtime.load(path)
    assert path.name in str(refused.value) and "\n" not in str(refused.value)
    return str(refused.value)


def test_bad_files_and_inputs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = sl.load(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()).eval(), (digits()[:2],))
    graph, weights = runtime.files(sl.export(model, "openvino", tmp_path))
    (tmp_path / "text.xml").write_text("not a model at all")
    (tmp_path / "page.xml").write_text("<html></html>")
    (tmp_path / "alone.xml").write_bytes(graph.read_bytes())
    for name, cut in (("cut", graph.read_bytes()[:900]), ("short", graph.read_bytes())):
        (tmp_path / f"{name}.xml").write_bytes(cut)
        (tmp_path / f"{name}.bin").write_bytes(weights.read_bytes()[:8])
    assert "no OpenVINO model" in _refused(tmp_path / "text.xml")
    assert "no OpenVINO model" in _refused(tmp_path / "page.xml")
    assert "cannot be read" in _refused(tmp_path / "missing.xml")
    assert "put alone.bin" in _refused(tmp_path / "alone.xml")
    assert "damaged" in _refused(tmp_path / "cut.xml")
    assert "damaged" in _refused(tmp_path / "short.xml")
    session = runtime.load(graph)
    with pytest.raises(SlimlineError, match=r"\(any, 1, 8, 8\), not \(2, 1, 9, 8\)"):
        session.run((np.zeros((2, 1, 9, 8), np.float32),))
    with pytest.raises(SlimlineError, match="takes 1 inputs"):
        session.run(())
    assert capfd.readouterr() == ("", "")


def test_an_operator_that_openvino_lacks_is_named(tmp_path: Path) -> None:
    class Odd(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.det(super().forward(x))

    x = np.random.default_rng(0).normal(size=(2, 3, 3)).astype(np.float32)
    with pytest.raises(SlimlineError, match=r"OpenVINO cannot read the model .*Det"):
        sl.export(sl.load(Odd(3, 3).eval(), (x,)), "openvino", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_for_openvino(tmp_path: Path) -> None:
    run = sl.compress(
        compress_job.model("torch"),
        compress_job.data("torch"),
        target="openvino",
        recipe=[sl.ChannelPruning(ratio=0.5), sl.StaticQuantization(undo=False, samples=64)],
        budget=sl.Budget(max_drop=1.0),
        batch_sizes=(8,),
        output=tmp_path / "run",
    )
    assert run.artifact == tmp_path / "run" / "openvino" / "model.xml"
    report = run.report
    assert report.target == "openvino" and report.parity.passed and not run.verify()
    assert report.compressed.file_bytes == file_bytes(run.artifact)
    assert report.compressed.integer_macs == 1 and report.original.integer_macs == 0
    assert report.compressed.latency[8].median_ms > 0
    assert "openvino" in report.environment["packages"]
    run.artifact.with_suffix(".bin").write_bytes(b"")
    assert [str(difference) for difference in run.verify()] == ["openvino/model.bin was altered"]
